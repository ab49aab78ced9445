import json

import pytest

from absorber.cli import opening
from cli.running import SMALL, TEXT


def state(folder):
    return json.loads((folder / "session.json").read_text(encoding="utf-8"))


def provenance(folder):
    return json.loads((folder / "memory" / "absorber.json").read_text(encoding="utf-8"))


@pytest.fixture
def session(cli, book, tmp_path):
    folder = tmp_path / "session"
    assert cli("stream", book, "--session", folder, *SMALL).code == 0
    return folder


def test_everything_is_absorbed_or_in_the_window(cli, book, tmp_path):
    folder = tmp_path / "session"
    result = cli("stream", book, "--session", folder, *SMALL, "--json")
    done = result.events[-1]
    assert (result.code, done["event"], done["new_tokens"]) == (0, "done", len(TEXT))
    assert done["absorbed_tokens"] + done["window_tokens"] == len(TEXT)
    assert done["window_tokens"] == len(state(folder)["window"]) < 100
    assert list(state(folder)["sources"]) == [str(book.resolve())]


def test_file_is_gone_on_with_where_it_stopped(cli, book, session, tmp_path):
    assert cli("stream", book, "--session", session, "--json").events[-1]["new_tokens"] == 0
    with book.open("a", encoding="utf-8") as file:
        file.write("And then she woke up.\n" * 10)
    result = cli("stream", book, "--session", session, "--device", "cpu", "--json")
    assert result.events[-1]["new_tokens"] == 220
    cli("stream", book, "--session", tmp_path / "at_once", *SMALL)
    assert state(session)["window"] == state(tmp_path / "at_once")["window"]
    assert provenance(session)["num_rounds"] == provenance(tmp_path / "at_once")["num_rounds"]


def test_standard_input_is_always_appended(cli, session):
    for _ in range(2):
        result = cli("stream", "-", "--session", session, "--json", stdin=b"Hello there.\n")
        assert result.events[-1]["new_tokens"] == 13


def test_same_flags_may_be_given_again(cli, book, session):
    assert cli("stream", book, "--session", session, *SMALL).code == 0


def test_other_settings_are_refused(cli, book, session):
    before = state(session)
    result = cli("stream", book, "--session", session, "--rank", "3", "--sync-tokens", "50")
    assert result.code == 2
    assert "rank 2 (got 3)" in result.err
    assert "sync_tokens 60 (got 50)" in result.err
    assert state(session) == before


def test_interrupt_keeps_what_was_read(cli, book, tmp_path, monkeypatch):
    import absorber.absorption

    calls = []
    original = absorber.absorption.take_step

    def step(*arguments):
        calls.append(1)
        original(*arguments)
        if len(calls) == 5:  # in the third round
            raise KeyboardInterrupt

    monkeypatch.setattr(absorber.absorption, "take_step", step)
    folder = tmp_path / "session"
    result = cli("stream", book, "--session", folder, *SMALL, "--json")
    assert (result.code, result.events[-1]["event"], result.events[-1]["num_rounds"]) == (130, "interrupted", 2)
    assert provenance(folder)["num_rounds"] == 2
    assert state(folder)["pending"]
    monkeypatch.undo()
    assert cli("stream", book, "--session", folder, "--json").code == 0
    cli("stream", book, "--session", tmp_path / "at_once", *SMALL)
    weights = "memory/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "at_once" / weights).read_bytes()


def test_saved_during_the_run(cli, book, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "_SAVE_EVERY_SECONDS", 0.0)
    saved = []
    original = opening.KeptSession.save
    monkeypatch.setattr(opening.KeptSession, "save", lambda kept: (original(kept), saved.append(state(kept._folder))))
    result = cli("stream", book, "--session", tmp_path / "session", *SMALL, "--json")
    assert len(saved) == result.events[-1]["num_rounds"] + 1
    assert all(len(one["window"]) + len(one["pending"]) for one in saved[:-1])


def test_error_on_the_way_keeps_what_was_absorbed(cli, book, tmp_path, monkeypatch):
    import torch

    import absorber.absorption

    calls = []
    original = absorber.absorption.Lessons  # made once a round

    def lessons(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return original(*arguments, **options)

    monkeypatch.setattr(absorber.absorption, "Lessons", lessons)
    folder = tmp_path / "session"
    result = cli("stream", book, "--session", folder, *SMALL, "--json")
    assert (result.code, result.events[-1]["type"]) == (2, "DeviceMemoryError")
    assert provenance(folder)["num_rounds"] == 2
    assert cli("stream", book, "--session", folder, "--json").code == 0


def test_ask_reads_the_window_and_changes_nothing(cli, session):
    before = {path: path.read_bytes() for path in session.rglob("*") if path.is_file()}
    assert cli("ask", session, "Who?", "--max-new-tokens", "3", "--device", "cpu").code == 0
    assert {path: path.read_bytes() for path in session.rglob("*") if path.is_file()} == before
