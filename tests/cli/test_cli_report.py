"""`absorber report` from files of records to a page."""

import dataclasses
import inspect

import pytest
import torch

from absorber.bench.records import Record, append_records, environment
from absorber.cli import app
from absorber.cli.report import report


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.jsonl"
    first = Record(
        task="icl",
        method="truncation",
        model="tiny",
        metric="accuracy",
        value=0.375,
        unit="ratio",
        num_samples=8,
        context_length=2048,
        round=2,
        seed=0,
        config={"task": {"dataset": "trec"}, "method": {}, "chance": 0.25},
        dtype="float32",
        **environment(torch.device("cpu")),
    )
    append_records(path, [first, dataclasses.replace(first, method="full", value=0.5)])
    return path


def test_from_records_to_files(cli, records, tmp_path):
    places = [tmp_path / "deep" / name for name in ("report.html", "report.md", "report.csv")]
    done = cli("report", records, "--output", places[0], "--markdown", places[1], "--csv", places[2])
    assert done.code == 0
    assert all(str(place) in done.out for place in places)
    assert all("37.5" in place.read_text() for place in places[:2])
    assert len(places[2].read_text().splitlines()) == 3
    again = places[0].read_text()
    told = cli("report", records, "--output", places[0], "--json")
    assert [event["num_records"] for event in told.of("done")] == [2]
    assert places[0].read_text() == again


@pytest.mark.parametrize(
    ("text", "word"), [(None, "there is no file"), ("", "has no records"), ('{"a": 1}\n', "line 1 of")]
)
def test_bad_files_are_named_and_nothing_is_written(cli, tmp_path, text, word):
    path, page = tmp_path / "records.jsonl", tmp_path / "report.html"
    if text is not None:
        path.write_text(text)
    done = cli("report", path, "--output", page)
    assert done.code == 2
    assert word in done.err
    assert not page.exists()


def test_a_place_that_cannot_be_written(cli, records, tmp_path):
    done = cli("report", records, "--output", tmp_path)
    assert done.code == 2
    assert "cannot write" in done.err
    assert cli("report").code == 2


def test_flags_are_few_and_explained():
    arguments = app["report"].assemble_argument_collection(parse_docstring=False)
    flags = {option for argument in arguments for option in argument.names if option.startswith("--")}
    assert {"--output", "--markdown", "--csv", "--json"} <= flags
    assert len(flags) <= 12
    described = inspect.getdoc(report)
    assert all(f"{name}:" in described for name in inspect.signature(report).parameters)
