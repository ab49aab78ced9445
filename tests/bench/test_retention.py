"""The protocol on a tiny model: same streams for all, references that are what they say, halves that do not meet."""

import json

import pytest
import torch

from absorber.backbone import inspect, sink_token
from absorber.bench.data import documents, streams
from absorber.bench.figures import draw_retention, retention_rows
from absorber.bench.methods import METHODS, LoRA, method
from absorber.bench.records import Record, read_records
from absorber.bench.retention import Retention
from absorber.bench.runner import Listener, run_task
from absorber.errors import AbsorptionError, BenchmarkError

TASK = Retention(num_rounds=2, num_streams=2, context_tokens=16, sync_tokens=32, passage_tokens=16)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("novels", "samsum", "wikitext2"):
        (folder / name).mkdir()
    for book in range(4):
        lines = [f"Book {book}, line {line}: the {line * 7 % 13} ships sailed.\n" for line in range(60)]
        (folder / "novels" / f"book{book}.txt").write_text("".join(lines))
    talks = [{"id": str(i), "dialogue": f"Ann: is it {i}?\r\nBob: it is {i * 3}, of course."} for i in range(20)]
    (folder / "samsum" / "talks.json").write_text(json.dumps(talks))
    articles = "".join(
        f" = Thing {i} = \n\n Thing {i} is a thing of {i} parts . \n = = Use = = \n It is used .\n" for i in range(20)
    )
    (folder / "wikitext2" / "text.txt").write_text(articles)
    return folder


def few_steps(name):
    return LoRA(METHODS[name].absorb_config.replace(max_steps=2, rank=2, anchor_texts=2, anchor_tokens=8))


@pytest.mark.parametrize("kind", ["books", "dialogues", "encyclopedia", "code"])
def test_halves_share_no_document(kind, data_dir):
    choose, report = (dict(documents(kind, data_dir, split)) for split in ("choose", "report"))
    assert choose
    assert report
    assert not set(choose) & set(report)
    assert abs(len(choose) - len(report)) <= 1


def test_streams_are_text_of_the_documents_and_the_same_for_a_seed(tokenizer, data_dir):
    pairs = documents("dialogues", data_dir, "report")
    one, again, other = (
        streams(tokenizer, pairs, kind="dialogues", num_streams=3, num_tokens=100, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    first = tokenizer.decode(one[0]).split("\n\n")[0]
    assert first in {text for _, text in pairs}


def test_too_little_text_is_an_error(tokenizer, data_dir, tmp_path):
    pairs = documents("books", data_dir, "report")
    with pytest.raises(BenchmarkError, match="fewer streams"):
        streams(tokenizer, pairs, kind="books", num_streams=2, num_tokens=10**5, seed=0)
    with pytest.raises(BenchmarkError, match="no books"):
        documents("books", tmp_path, "report")


def test_full_attention_is_its_own_reference(model, tokenizer, data_dir):
    texts = TASK.prepare(model, tokenizer, data_dir)
    found = list(TASK.measure(method("full"), inspect(model), texts, sink_id=sink_token(model, tokenizer)))
    assert [checkpoint.round for checkpoint in found] == [1, 2]
    for checkpoint in found:
        assert checkpoint.metrics["windowed_nll"] == pytest.approx(checkpoint.metrics["full_nll"], abs=1e-5)
        assert checkpoint.metrics["windowed_kl"] == pytest.approx([0, 0], abs=1e-5)


def test_truncation_reads_the_last_m_tokens(model, tokenizer, data_dir):
    texts = TASK.prepare(model, tokenizer, data_dir)
    sink = sink_token(model, tokenizer)
    found = list(TASK.measure(method("truncation"), inspect(model), texts, sink_id=sink))
    end = TASK.sync_tokens + TASK.context_tokens
    for row in range(2):
        ids = texts.token_ids_BT[row, end - TASK.sync_tokens : end + TASK.passage_tokens]
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor([sink]), ids])[None]).logits[0, TASK.sync_tokens : -1]
        nll = torch.nn.functional.cross_entropy(logits, ids[-TASK.passage_tokens :])
        assert found[0].metrics["windowed_nll"][row] == pytest.approx(nll.item(), abs=1e-4)
    assert found[0].metrics["drift_nll/code"] == [0.0, 0.0]


def test_a_run_resumes_and_one_failure_does_not_end_it(model, tokenizer, data_dir, tmp_path, monkeypatch):
    class Failing(LoRA):
        def begin(self, setting):
            raise AbsorptionError("no")

    methods = {"truncation": METHODS["truncation"], "bad": Failing(METHODS["dcd"].absorb_config)}
    methods["absorber"] = few_steps("absorber")
    failed, measured = [], []
    listener = Listener(
        on_failure=lambda name, error: failed.append(name), on_method=lambda name, records: measured.append(name)
    )
    output = tmp_path / "records.jsonl"
    first = run_task(TASK, methods, model, tokenizer, data_dir=data_dir, output=output, listener=listener)
    assert (failed, measured) == (["bad"], ["truncation", "absorber"])
    again = run_task(TASK, methods, model, tokenizer, data_dir=data_dir, output=output, listener=listener)
    assert measured == ["truncation", "absorber"]
    assert repr(again) == repr(first) == repr(read_records(output))
    heads, rows = retention_rows(first)
    assert [row[:4] for row in rows] == [("books", "2", name, "0") for name in ("truncation", "absorber")]
    assert len(heads) == len(rows[0])
    assert rows[0][7].startswith("+0.0000")
    draw_retention(first, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BenchmarkError, match="no records of streams of code"):
        draw_retention(first, tmp_path / "picture.png", kind="code")


def synthetic(method, rounds, *, num_rounds, seed=0, kind="books"):
    """Records of windowed nll and gap, by round."""
    shared = {
        "task": "retention",
        "method": method,
        "model": "m",
        "unit": "",
        "num_samples": 1,
        "context_length": 0,
        "seed": seed,
        "config": {"task": {"kind": kind, "num_rounds": num_rounds}},
        "device": "cpu",
        "dtype": "float32",
        "versions": {},
        "git": "",
    }
    return [
        Record(metric=metric, value=value, round=number, **shared)
        for number, value in rounds.items()
        for metric in ("windowed_nll", "windowed_gap_closed", "contextless_gap_closed")
    ]


def test_a_row_per_seed_and_length_with_its_worst_round():
    records = synthetic("truncation", {10: 3.0, 20: 3.0}, num_rounds=20, seed=1)
    records += synthetic("absorber", {10: 3.5, 20: 2.5}, num_rounds=20, seed=1)
    records += synthetic("absorber", {10: 2.0}, num_rounds=10, seed=1)
    records += synthetic("absorber", {10: 2.0, 20: 2.0}, num_rounds=20, seed=2)
    heads, rows = retention_rows(records)
    worst = {row[1:4]: row[heads.index("worst round, nats")] for row in rows}
    assert worst == {
        ("20", "truncation", "1"): "+0.0000 (round 20)",
        ("20", "absorber", "1"): "+0.5000 (round 10)",
        ("10", "absorber", "1"): "no truncation",
        ("20", "absorber", "2"): "no truncation",
    }


def test_a_run_with_less_to_show_has_a_row_and_is_compared_with():
    reference = [
        record for record in synthetic("truncation", {10: 3.0}, num_rounds=10, seed=1) if "gap" not in record.metric
    ]
    heads, rows = retention_rows(reference + synthetic("absorber", {10: 2.5}, num_rounds=10, seed=1))
    cells = [dict(zip(heads, row, strict=True)) for row in rows]
    assert [cell["windowed gap closed"] for cell in cells] == ["", "250 %"]
    assert [cell["worst round, nats"] for cell in cells] == ["+0.0000 (round 10)", "-0.5000 (round 10)"]


@pytest.mark.parametrize("name", [name for name, way in METHODS.items() if isinstance(way, LoRA)])
def test_every_adapter_method_changes_what_is_said_and_leaves_the_model(name, model, tokenizer, data_dir):
    texts = TASK.prepare(model, tokenizer, data_dir, drift_kinds=("code",))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sink = sink_token(model, tokenizer)
    own, none = (
        list(TASK.measure(way, inspect(model), texts, sink_id=sink))[-1].metrics
        for way in (few_steps(name), method("truncation"))
    )
    assert own["windowed_nll"] != none["windowed_nll"]
    assert own["full_nll"] == none["full_nll"]
    for rule in ("entropy", "likelihood"):
        for place in ("", "/code"):
            gated, opened = own[f"gated_drift_nll/{rule}{place}"], own[f"gate_open/{rule}{place}"]
            ungated = own[f"gated_drift_nll/off{place}"]
            assert gated == [value * is_open for value, is_open in zip(ungated, opened, strict=True)]
            assert set(opened) <= {0.0, 1.0}
            assert all(ungated)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_unknown_method_is_an_error():
    with pytest.raises(BenchmarkError, match="there are full, truncation"):
        method("magic")
