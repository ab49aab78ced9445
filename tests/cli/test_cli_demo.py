"""The demonstration measures what it says, draws it, and saves a memory that can be asked."""

import json

import pytest

from absorber.bench import demo as demonstration
from absorber.bench.scoring import gap_closed
from cli.running import SMALL


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demonstration, "CONFIG", demonstration.CONFIG.replace(max_steps=2, rank=4, learning_rate=1e-2))
    short = demonstration.STREAM.replace(context_tokens=16, sync_tokens=32, max_new_tokens=4)
    monkeypatch.setattr(demonstration, "STREAM", short)


def test_the_figures_are_those_of_the_run(cli, tmp_path, small):
    done = cli("demo", "--model", "tiny", "--rounds", "3", "--output", tmp_path / "out", "--json")
    assert done.code == 0
    last = done.events[-1]
    assert last == json.loads((tmp_path / "out" / "demo.json").read_text()) | {
        "event": "done",
        "folder": str(tmp_path / "out"),
    }
    assert last["num_tokens"] == 3 * 16 + 32
    assert [line["number"] for line in last["rounds"]] == [1, 2, 3]
    assert max(last["window_cache_bytes"]) == last["window_cache_bytes"][0] < last["full_cache_bytes"][-1]
    ratio = gap_closed(last["nll_window"], last["nll_window_memory"], last["nll_full"])
    assert last["windowed_gap_closed"] == (pytest.approx(ratio) if ratio == ratio else None)
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert cli("ask", tmp_path / "out" / "memory", "Who?", "--max-new-tokens", "3").code == 0


def test_it_says_if_the_memory_did_not_help(cli, tmp_path, small, monkeypatch):
    monkeypatch.setattr(demonstration.Demonstration, "helped", False)
    done = cli("demo", "--model", "tiny", "--rounds", "1", "--output", tmp_path / "out")
    assert "DID NOT HELP" in done.out


def test_a_place_that_is_taken_is_refused_before_anything_runs(cli, tmp_path):
    (tmp_path / "out").write_text("mine")
    done = cli("demo", "--model", "tiny", "--output", tmp_path / "out")
    assert done.code == 2
    assert "is a file" in done.err


def test_too_many_rounds_are_refused(cli, tmp_path):
    done = cli("demo", "--model", "tiny", "--rounds", "41", "--output", tmp_path / "out")
    assert done.code == 2
    assert not (tmp_path / "out").exists()


def test_rounds_that_learn_nothing_are_reported(cli, book, tmp_path):
    (tmp_path / "settings.toml").write_text("[absorb]\nthreshold = 1e9\n")
    done = cli("absorb", book, "--output", tmp_path / "memory", *SMALL, "--config", tmp_path / "settings.toml")
    assert done.code == 0
    assert "nothing was learned" in done.err
