"""Records come back as they were written; intervals cover what they should."""

import dataclasses
import math
import random

import pytest
import torch

from absorber.bench import made_up
from absorber.bench.methods import METHODS
from absorber.bench.reasoning import Reasoning
from absorber.bench.records import (
    Record,
    append_records,
    environment,
    gap_interval,
    mean_interval,
    read_records,
)
from absorber.bench.runner import run_task
from absorber.errors import BenchmarkError

TASK = Reasoning(num_rounds=1, num_streams=1, context_tokens=120, sync_tokens=140, num_queries=1, max_new_tokens=2)


def record(**changes):
    values = {
        "task": "retention",
        "method": "full",
        "model": "tiny",
        "metric": "windowed_nll",
        "value": 1.5,
        "unit": "nats",
        "num_samples": 2,
        "context_length": 10,
        "round": 1,
        "seed": 0,
        "config": {"a": [1, 2]},
        "per_sample": [1.0, 2.0],
        "dtype": "float32",
        **environment(torch.device("cpu")),
    }
    return Record(**(values | changes))


def test_records_come_back(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    append_records(path, [record(), record(value=math.nan)])
    append_records(path, [record(seed=1)])
    first, second, third = read_records(path)
    assert first == record()
    assert math.isnan(second.value)
    assert third.seed == 1
    assert "NaN" not in path.read_text()
    assert read_records(tmp_path / "none") == []


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    append_records(path, [record()])
    path.write_text(path.read_text() + '{"task": 1}\n')
    with pytest.raises(BenchmarkError, match="line 2"):
        read_records(path)


def test_what_makes_a_measurement_another():
    assert record().key == record(value=2.0, seconds=3.0, round=4).key
    for changes in ({"seed": 1}, {"config": {}}, {"method": "sink"}, {"device": "x"}):
        assert dataclasses.replace(record(), **changes).key != record().key


def test_no_record_says_where_a_model_lies(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my-model"
    folder.mkdir()
    data_dir = made_up.write(tmp_path / "data")
    for place, name in ((str(folder), "my-model"), ("somebody/model", "somebody/model")):
        monkeypatch.setattr(model.config, "_name_or_path", place)
        where = {"data_dir": data_dir, "output": tmp_path / f"{folder.name}.jsonl"}
        run_task(TASK, {"truncation": METHODS["truncation"]}, model, tokenizer, **where)
        assert read_records(where["output"])[-1].model == name


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    dice = random.Random(0)
    covered = 0
    for _ in range(200):
        _, low, high = mean_interval([dice.gauss(1.0, 1.0) for _ in range(24)])
        covered += low <= 1.0 <= high
    assert 175 <= covered <= 199


def test_the_gap_is_paired():
    full = [random.Random(1).gauss(3, 1) + index for index in range(24)]
    without, own = [value + 1.0 for value in full], [value + 0.25 for value in full]
    value, low, high = gap_interval(without, own, full)
    assert value == pytest.approx(0.75)
    assert low == pytest.approx(0.75)
    assert high == pytest.approx(0.75)
    assert math.isnan(gap_interval(full, own, full)[0])
