"""`absorber bench families` from flags to records and tables."""

import pytest

from family_texts import SMALL, write_books


@pytest.fixture
def flags(tmp_path):
    settings, values = tmp_path / "settings.toml", dict(SMALL)
    size, tokens = values.pop("size"), values.pop("tokens")
    lines = ["[families]", *(f"{name} = {value}" for name, value in values.items())]
    settings.write_text("\n".join([*lines, "[absorb]", "max_steps = 2", "rank = 2", "anchor_texts = 2"]))
    places = ("--data-dir", write_books(tmp_path / "books"), "--output", tmp_path / "records.jsonl")
    more = ("--checkpoints", tmp_path / "kept", "--size", size, "--tokens", tokens, "--config", settings)
    return (*places, *more, "--device", "cpu")


def test_families(cli, flags, tmp_path):
    done = cli("bench", "families", "transformer", "ttt", "truncation", *flags, "--json")
    assert done.code == 0
    assert {event["family"] for event in done.of("progress")} == {"transformer", "ttt", "truncation"}
    assert done.of("done")[0]["failures"] == []
    rows = [row for row in done.of("row") if "parameters" in row]
    assert [row["family"] for row in rows] == ["transformer", "ttt"]
    shown = cli("bench", "table", tmp_path / "records.jsonl").out
    assert "training nll at the end" in shown
    assert "truncation" in shown
    page = tmp_path / "report.html"
    assert cli("report", tmp_path / "records.jsonl", "--output", page, "--markdown", tmp_path / "report.md").code == 0
    assert "pairs recalled after so many tokens" in page.read_text()


@pytest.mark.parametrize(
    ("more", "word"),
    [(("lstm",), "there is no family"), (("ttt", "--tokens", "5"), "a step a row"), (("ttt", "--size", "9b"), "size")],
)
def test_bad_flags(cli, flags, more, word):
    done = cli("bench", "families", *flags, *more)
    assert done.code == 2
    assert word in done.err


def test_at_most_twelve_flags(cli):
    text = cli("bench", "families", "--help").out
    flags = {word for word in text.split() if word.startswith("--") and word != "--"}
    assert "--checkpoints" in flags
    assert len({flag for flag in flags if not flag.startswith("--no-")}) <= 12
