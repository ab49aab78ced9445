"""`absorber bench recall` from flags to records and tables."""

import pytest


@pytest.fixture
def novels(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for book in range(4):
        lines = [f"Book {book}, line {line}: the {line * 7 % 13} ships sailed.\n" for line in range(120)]
        (folder / f"book{book}.txt").write_text("".join(lines))
    return folder


def settings(tmp_path, text):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return path


SMALL = """
[recall]
context_tokens = 160
sync_tokens = 64
ages = [1, 2]
[absorb]
max_steps = 2
rank = 2
anchor_texts = 2
anchor_tokens = 8
study = "light"
study_passages = 2
"""


def test_from_flags_to_records(cli, novels, tmp_path):
    output = tmp_path / "records.jsonl"
    flags = ("--data-dir", novels, "--output", output, "--rounds", "2", "--streams", "2", "--model", "tiny")
    config = ("--config", settings(tmp_path, SMALL))
    done = cli("bench", "recall", "truncation", "absorber", *flags, *config, "--json")
    assert done.code == 0
    assert [(row["method"], row["age"]) for row in done.of("row")] == [
        (method, age) for method in ("truncation", "absorber") for age in ("1", "2")
    ]
    assert {event["round"] for event in done.of("progress")} == {1, 2}
    shown = cli("bench", "table", output, "--picture", tmp_path / "recall.png")
    assert shown.code == 0
    assert "other wording" in shown.out
    assert (tmp_path / "recall.png").exists()


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ("num_facts = 0", "1 or more"),
        ("ages = [0]", "1 or more"),
        ("ages = 5", "ages in [recall] is a list"),
        ("num_facts = [1]", "num_facts in [recall] is no list"),
        ("age = 3", "unknown setting age in"),
    ],
)
def test_bad_settings(cli, novels, tmp_path, table, word):
    config = settings(tmp_path, f"[recall]\n{table}\n")
    flags = ("--data-dir", novels, "--output", tmp_path / "r.jsonl", "--model", "tiny", "--config", config)
    done = cli("bench", "recall", *flags)
    assert done.code == 2
    assert word in done.err


def test_at_most_twelve_flags(cli):
    text = cli("bench", "recall", "--help").out
    flags = {word for word in text.split() if word.startswith("--") and word != "--"}
    assert "--config" in flags
    assert len({flag for flag in flags if not flag.startswith("--no-")}) <= 12
