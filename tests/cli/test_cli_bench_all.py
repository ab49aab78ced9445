"""`absorber bench all` from flags to records, progress and exit code."""

import pytest

from absorber.bench.methods import METHODS
from absorber.bench.methods.truncation import Truncation
from absorber.cli.bench_all import spell_seconds
from absorber.errors import AbsorptionError


class Failing(Truncation):
    def begin(self, setting):
        raise AbsorptionError("it cannot be carried out")


@pytest.fixture
def run(cli, tmp_path, monkeypatch):
    for name in set(METHODS) - {"full", "truncation"}:
        monkeypatch.delitem(METHODS, name)
    output = tmp_path / "records.jsonl"

    def call(*flags):
        return cli("bench", "all", *flags, "--quick", "--model", "tiny", "--device", "cpu", "--output", output)

    return call


def test_without_a_folder_the_texts_are_made_up_and_a_run_is_not_repeated(cli, run, tmp_path):
    done = run("icl", "recall", "--json")
    assert done.code == 0
    assert [row["task"] for row in done.of("row")] == ["recall", "icl"]
    progress = done.of("progress")
    assert [(event["done"], event["total"]) for event in progress] == [(number, 4) for number in (1, 2, 3, 4)]
    assert progress[-1]["seconds_left"] == 0
    again = run("icl", "recall", "--json")
    assert {(row["measured"], row["known"], row["failed"]) for row in again.of("row")} == {("0", "2", "0")}
    page = tmp_path / "report.html"
    assert cli("report", tmp_path / "records.jsonl", "--output", page).code == 0
    assert "icl" in page.read_text()


def test_a_method_that_fails_is_shown_at_the_end(run, monkeypatch):
    monkeypatch.setitem(METHODS, "bad", Failing())
    done = run("reasoning")
    assert done.code == 1
    assert "failed: reasoning, bad: AbsorptionError: it cannot be carried out" in done.out
    assert "[2/3, about" in done.err
    (event,) = run("reasoning", "--json").of("failed")
    assert (event["task"], event["method"], event["type"]) == ("reasoning", "bad", "AbsorptionError")


def test_bad_names_and_tables(run, tmp_path):
    assert run("songs").code == 2
    config = tmp_path / "settings.toml"
    config.write_text("[icl]\nloud = 1\n")
    done = run("icl", "--config", config)
    assert done.code == 2
    assert "unknown setting loud" in done.err


def test_times_as_people_say_them():
    assert [spell_seconds(seconds) for seconds in (4.4, 240.0, 9000.0)] == ["4 s", "4 min", "2.5 h"]
