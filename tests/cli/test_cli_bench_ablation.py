"""`absorber bench ablation` from flags to records and tables."""

import pytest

from absorber.bench import retention
from absorber.bench.ablation_tables import TABLES


@pytest.fixture
def novels(tmp_path, monkeypatch):
    monkeypatch.setattr(retention.Retention.prepare, "__kwdefaults__", {"drift_kinds": ("books",)})
    folder = tmp_path / "data"
    folder.mkdir()
    for book in range(4):
        lines = [f"Book {book}, line {line}: the {line * 7 % 13} ships sailed.\n" for line in range(120)]
        (folder / f"book{book}.txt").write_text("".join(lines))
    return folder


def test_one_table_from_flags_to_records(cli, novels, tmp_path):
    output = tmp_path / "records.jsonl"
    flags = ("--data-dir", novels, "--output", output, "--tokens", "512", "--streams", "2", "--model", "tiny")
    done = cli("bench", "ablation", "sink", *flags, "--json")
    assert done.code == 0
    assert [row["variant"] for row in done.of("row")] == ["shared (default)", "none"]
    assert {event["variant"] for event in done.of("progress")} >= {"sink/shared", "sink/none"}
    shown = cli("bench", "table", output)
    assert shown.code == 0
    assert TABLES["sink"].asks in shown.out
    assert "shared (default)" in shown.out


def test_list_measures_nothing(cli):
    shown = cli("bench", "ablation", "--list")
    assert shown.code == 0
    assert all(f"\n{name}: {table.asks}" in shown.out for name, table in TABLES.items())
    listed = cli("bench", "ablation", "window", "--list", "--json").of("table")
    assert [(event["table"], len(event["variants"])) for event in listed] == [("window", 9)]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("magic",), "there is no table magic"),
        (("--kind", "songs"), "kind is one of"),
        (("--tokens", "0"), "1 or more"),
        ((), "needs --data-dir and --output"),
    ],
)
def test_bad_flags(cli, flags, word):
    done = cli("bench", "ablation", *flags, "--model", "tiny")
    assert done.code == 2
    assert word in done.err


def test_at_most_twelve_flags_and_every_one_explained(cli):
    text = cli("bench", "ablation", "--help").out
    flags = {word for word in text.split() if word.startswith("--") and word != "--"}
    assert "--list" in flags
    assert len({flag for flag in flags if not flag.startswith("--no-")}) <= 12
