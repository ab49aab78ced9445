"""`absorber bench icl`, `reasoning` and `summary` from flags to records and tables."""

import sys

import pytest

from absorber.bench import made_up

SMALL = """
[{0}]
context_tokens = 120
sync_tokens = 140
num_queries = 2
{1}
[absorb]
max_steps = 1
rank = 2
anchor_texts = 2
anchor_tokens = 8
study = "off"
"""
MORE = {"icl": "num_classes = 3", "reasoning": "max_new_tokens = 2", "summary": "max_new_tokens = 2"}


@pytest.fixture
def folder(tmp_path):
    return made_up.write(tmp_path / "data")


def settings(tmp_path, task, more=None):
    path = tmp_path / "settings.toml"
    path.write_text(SMALL.format(task, MORE[task] if more is None else more))
    return path


@pytest.mark.parametrize(
    ("task", "flags"),
    [("icl", ("--dataset", "banking77")), ("reasoning", ()), ("summary", ("--dataset", "squality"))],
)
def test_from_flags_to_records(cli, folder, tmp_path, task, flags):
    output = tmp_path / "records.jsonl"
    common = ("--data-dir", folder, "--output", output, "--rounds", "2", "--streams", "2", "--model", "tiny", *flags)
    done = cli("bench", task, "truncation", "absorber", *common, "--config", settings(tmp_path, task), "--json")
    assert done.code == 0
    assert [(row["method"], row["view"]) for row in done.of("row")] == [
        (method, view) for method in ("truncation", "absorber") for view in ("windowed", "contextless")
    ]
    assert {event["round"] for event in done.of("progress")} == {1, 2}
    if task == "icl":
        assert {row["by chance"] for row in done.of("row")} == {"33.3 %"}
    shown = cli("bench", "table", output)
    assert shown.code == 0
    assert "contextless" in shown.out


@pytest.mark.parametrize(
    ("task", "flags", "more", "word"),
    [
        ("icl", ("--dataset", "books"), "", "kind is one of ag_news, trec, banking77"),
        ("summary", ("--dataset", "musique"), "", "kind is one of samsum, squality"),
        ("icl", (), "num_shots = 3", "unknown setting num_shots in"),
        ("reasoning", (), "max_new_tokens = 0", "1 or more"),
        ("reasoning", ("--rounds", "999"), "", "Use fewer rounds"),
    ],
)
def test_bad_settings(cli, folder, tmp_path, task, flags, more, word):
    output = tmp_path / "records.jsonl"
    config = settings(tmp_path, task, more)
    common = ("--data-dir", folder, "--output", output, "--model", "tiny", "--config", config)
    done = cli("bench", task, *common, *flags)
    assert done.code == 2
    assert word in " ".join(done.err.split())
    assert not output.exists()


def test_without_a_folder_and_without_the_package(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    done = cli("bench", "icl", "--output", tmp_path / "r.jsonl", "--model", "tiny")
    assert done.code == 2
    assert "absorber[bench]" in done.err


@pytest.mark.parametrize("task", ["icl", "reasoning", "summary"])
def test_help(cli, task):
    assert task in cli("bench", "--help").out
    text = cli("bench", task, "--help").out
    flags = {word for word in text.split() if word.startswith("--") and word != "--"}
    assert "--config" in flags
    assert len({flag for flag in flags if not flag.startswith("--no-")}) <= 12
