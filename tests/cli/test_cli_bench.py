"""`absorber bench` from flags to records, table and picture."""

import pytest


@pytest.fixture
def novels(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for book in range(4):
        lines = [f"Book {book}, line {line}: the {line * 7 % 13} ships sailed.\n" for line in range(60)]
        (folder / f"book{book}.txt").write_text("".join(lines))
    return folder


def test_bench_retention_and_table(cli, novels, tmp_path, monkeypatch):
    from absorber.bench import retention

    monkeypatch.setattr(retention, "DRIFT_KINDS", ("books", "code"))
    monkeypatch.setattr(retention.Retention.prepare, "__kwdefaults__", {"drift_kinds": ("books", "code")})
    settings, output = tmp_path / "s.toml", tmp_path / "records.jsonl"
    settings.write_text(
        "[retention]\ncontext_tokens = 16\nsync_tokens = 32\npassage_tokens = 16\n"
        "[absorb]\nmax_steps = 2\nrank = 2\nanchor_texts = 2\nanchor_tokens = 8\n"
    )
    flags = ("--data-dir", novels, "--output", output, "--rounds", "2", "--streams", "2", "--config", settings)
    done = cli("bench", "retention", "truncation", "absorber", *flags, "--model", "tiny", "--json")
    assert done.code == 0
    assert [row["method"] for row in done.of("row")] == ["truncation", "absorber"]
    assert [event["round"] for event in done.of("progress") if event["method"] == "absorber"] == [1, 2]
    shown = cli("bench", "table", output, "--picture", tmp_path / "p.png")
    assert shown.code == 0
    assert "absorber" in shown.out
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("magic",), "there is no method"),
        (("--kind", "songs"), "kind is one of"),
        (("--rounds", "0"), "1 or more"),
        (("--rounds", "9999"), "books hold only"),
    ],
)
def test_bad_flags(cli, novels, tmp_path, flags, word):
    output = tmp_path / "records.jsonl"
    done = cli("bench", "retention", *flags, "--data-dir", novels, "--output", output, "--model", "tiny")
    assert done.code == 2
    assert word in done.err
    assert not output.exists()


def test_a_missing_file_of_records(cli, tmp_path):
    assert cli("bench", "table", tmp_path / "none.jsonl").code == 2
