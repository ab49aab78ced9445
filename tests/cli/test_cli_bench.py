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
def test_bad_flags(cli, novels, tmp_path, flags, word, monkeypatch):
    monkeypatch.setattr("absorber.bench.retention.DRIFT_KINDS", ("books",))
    output = tmp_path / "records.jsonl"
    done = cli("bench", "retention", *flags, "--data-dir", novels, "--output", output, "--model", "tiny")
    assert done.code == 2
    assert word in done.err
    assert not output.exists()


def test_books_alone_are_refused_before_a_model_is_loaded(cli, novels, tmp_path, monkeypatch):
    monkeypatch.setattr("absorber.models.load", lambda *args, **options: pytest.fail("a model was loaded"))
    done = cli("bench", "retention", "--data-dir", novels, "--output", tmp_path / "records.jsonl")
    assert done.code == 2
    assert "has no dialogues" in done.err
    assert "drift is measured on" in done.err
    assert "samsum/*.json and wikitext2/*.txt" in done.err
    done = cli("bench", "recall", "--data-dir", novels / "none", "--output", tmp_path / "records.jsonl")
    assert f"there is no folder {novels / 'none'}" in done.err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("[Icl]\nnum_queries = 4\n", "[Icl], which belongs to no task and no method; do you mean [icl]?"),
        ("[temp_lora]\nrank = 2\n", "do you mean [temp-lora]?"),
        ("[reasonning]\nnum_queries = 9\n", "do you mean [reasoning]?"),
        ("[xyz]\nrank = 2\n", "there are absorb, retention, "),
        ("num_queries = 4\n", "num_queries outside of any table"),
    ],
)
def test_a_table_that_nobody_reads(cli, novels, tmp_path, settings, words):
    (tmp_path / "s.toml").write_text(settings)
    where = ("--data-dir", novels, "--output", tmp_path / "records.jsonl", "--config", tmp_path / "s.toml")
    done = cli("bench", "recall", *where, "--model", "tiny")
    assert done.code == 2
    assert words in done.err.replace("\n", " ")


def test_tables_of_other_tasks_and_methods_are_let_be(tmp_path):
    from absorber.cli.bench_run import read_tables

    names = ("absorb", "icl", "families", "cost", "snapkv", "temp-lora-16", "absorber-light")
    (tmp_path / "s.toml").write_text("".join(f"[{name}]\n" for name in names))
    assert set(read_tables(tmp_path / "s.toml")) == set(names)


def test_ages_that_no_fact_grows_to(cli, novels, tmp_path):
    (tmp_path / "s.toml").write_text("[recall]\nages = [5, 6]\n")
    where = ("--data-dir", novels, "--output", tmp_path / "records.jsonl", "--config", tmp_path / "s.toml")
    done = cli("bench", "recall", "--rounds", "4", *where, "--model", "tiny")
    assert done.code == 2
    assert "after 4 rounds no fact is of an age among ages = [5, 6]" in done.err.replace("\n", " ")
    assert cli("bench", "recall", "--rounds", "5", *where, "--model", "none").err.count("ages") == 0


def test_a_missing_file_of_records(cli, tmp_path):
    assert cli("bench", "table", tmp_path / "none.jsonl").code == 2
