"""Every bad input: a named error with what to do, exit code 2, no traceback, nothing half written."""

import json
import sys

import pytest
import torch

from absorber.models import load
from absorber.store import locked
from cli.running import SMALL, TEXT


def refused(result, kind, *words):
    """Check the error of a command that ran with --json."""
    assert result.code == 2, result.out + result.err
    error = result.events[-1]
    assert (error["event"], error["type"]) == ("error", kind), error
    assert all(word in error["message"] for word in words), error["message"]
    return error["message"]


@pytest.fixture
def untouched(tmp_path):
    """Fails if a command left anything in the folder; lock files are no work."""

    def names():
        return {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.suffix != ".lock"}

    before = names()
    yield lambda: before.update(names())
    assert names() == before


@pytest.fixture
def no_model(monkeypatch):
    """Fails if a model is loaded, which is dear, before a bad input is refused."""
    import absorber.models

    def refuse(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(absorber.models, "load", refuse)


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("command", [("absorb", "--output"), ("stream", "--session")])
@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no text"),
        (b" \n\t\r\n ", "holds no text"),
        (b"\xef\xbb\xbf", "holds no text"),
        (b"caf\xe9 au lait", "byte 0xe9 at byte 3"),
        (b"good " * 20 + b"\xc3", "byte 0xc3 at byte 100"),
    ],
)
def test_bad_text(cli, tmp_path, request, command, piped, content, words):
    if not (piped and command[0] == "stream"):  # a pipe that is read as it comes shows its end last
        request.getfixturevalue("no_model")
    source = "-" if piped else write(tmp_path / "text.txt", content)
    before = set(tmp_path.iterdir())
    name, flag = command
    stdin = content if piped else b""
    refused(cli(name, source, flag, tmp_path / "made", *SMALL, "--json", stdin=stdin), "ContextError", words)
    assert {path for path in tmp_path.iterdir() if path.suffix != ".lock"} == before


@pytest.mark.parametrize("command", [("absorb", "--output"), ("stream", "--session")])
def test_bad_byte_late_in_a_long_file(cli, tmp_path, no_model, command):
    source = write(tmp_path / "long.txt", b"x" * 200_000 + b"\xff")
    refused(cli(command[0], source, command[1], tmp_path / "made", *SMALL, "--json"), "ContextError", "at byte 200000")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("command", [("absorb", "--output"), ("stream", "--session")])
def test_missing_source(cli, tmp_path, untouched, no_model, command):
    arguments = [command[1], tmp_path / "made", "--json"]
    refused(cli(command[0], tmp_path / "none.txt", *arguments), "ContextError", "there is no file")
    refused(cli(command[0], tmp_path, *arguments), "ContextError", "is a folder")


@pytest.mark.parametrize("command", [("absorb", "--output"), ("stream", "--session")])
@pytest.mark.parametrize("kind", ["foreign", "file", "below_a_file"])
def test_place_that_is_not_ours(cli, book, tmp_path, no_model, command, kind):
    place = tmp_path / "place"
    if kind == "foreign":
        place.mkdir()
        write(place / "thesis.doc", b"dear")
    elif kind == "file":
        write(place, b"dear")
    else:
        write(place, b"dear")
        place = place / "deeper"
    before = set(tmp_path.rglob("*"))
    refused(cli(command[0], book, command[1], place, *SMALL, "--json"), "MemoryFileError", "place", "choose")
    assert set(tmp_path.rglob("*")) == before


def test_chat_in_a_foreign_folder(cli, tmp_path, untouched, no_model):
    write(tmp_path / "mine.txt", b"dear")
    untouched()
    refused(cli("chat", "--session", tmp_path, "--json", stdin=b"Hi\n"), "MemoryFileError", "not ours")


@pytest.mark.parametrize(
    "arguments", [["ask", "{}", "Who?"], ["absorb", "{book}", "{}", "--output", "{out}"], ["chat", "{}"]]
)
def test_missing_and_foreign_memory(cli, book, tmp_path, no_model, arguments):
    def call(folder):
        words = [word.format(folder, book=book, out=tmp_path / "out") for word in arguments]
        return cli(*words, "--json", stdin=b"Hi\n")

    refused(call(tmp_path / "none"), "MemoryFileError", "there is no folder")
    (tmp_path / "foreign").mkdir()
    refused(call(tmp_path / "foreign"), "MemoryFileError", "absorber.json")
    assert not (tmp_path / "out").exists()


def test_memory_of_another_model(cli, book, memory, tmp_path):
    model, tokenizer = load("tiny", device="cpu")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    other = ["--model", tmp_path / "other", "--device", "cpu", "--json"]
    refused(cli("ask", memory, "Who?", *other), "MemoryMismatchError", "another model", "tiny")
    refused(cli("absorb", book, memory, "--output", tmp_path / "out", *other), "MemoryMismatchError")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["absorber.json", "adapter_model.safetensors", "adapter_config.json"])
def test_damaged_memory(cli, memory, damage):
    write(memory / damage, b"{ not")
    refused(cli("ask", memory, "Who?", "--device", "cpu", "--json"), "MemoryFileError")


def test_damaged_session(cli, book, tmp_path):
    folder = tmp_path / "session"
    assert cli("stream", book, "--session", folder, *SMALL).code == 0
    write(folder / "session.json", b'{"format": 1}')
    refused(cli("stream", book, "--session", folder, "--json"), "MemoryFileError", "damaged")


@pytest.mark.parametrize("command", [("absorb", "{book}", "--output", "{}"), ("stream", "{book}", "--session", "{}")])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rank", "0"], "rank must be 1 or more; got 0"),
        (["--context-tokens", "0"], "context_tokens must be 1 or more"),
        (["--sync-tokens", "0"], "sync_tokens must be"),
        (["--steps", "0"], "max_steps must be"),
        (["--learning-rate", "nan"], "learning_rate must be"),
        (["--preset", "papper"], "there is no preset 'papper'"),
        (["--config", "{toml}"], "unknown setting rnak"),
        (["--config", "{none}"], "cannot read the settings file"),
    ],
)
def test_bad_setting(cli, book, tmp_path, no_model, command, flags, words):
    toml = write(tmp_path / "bad.toml", b"[absorb]\nrnak = 3\n")
    before = set(tmp_path.iterdir())
    arguments = [word.format(tmp_path / "made", book=book) for word in command]
    flags = [word.format(toml=toml, none=tmp_path / "none.toml") for word in flags]
    refused(cli(*arguments, *flags, "--json"), "ConfigError", words)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", [("absorb", "{book}", "--output", "{}"), ("stream", "{book}", "--session", "{}")])
class TestWhatOnlyTheModelShows:
    """These are found once the model is there; nothing is written all the same."""

    def call(self, cli, book, tmp_path, command, *flags):
        arguments = [word.format(tmp_path / "made", book=book) for word in command]
        result = cli(*arguments, *SMALL, *flags, "--json")
        assert not (tmp_path / "made").exists()
        return result

    def test_window_larger_than_the_positions(self, cli, book, tmp_path, command):
        result = self.call(cli, book, tmp_path, command, "--sync-tokens", "9000")
        refused(result, "ConfigError", "9041", "8192")

    def test_unknown_device(self, cli, book, tmp_path, command):
        refused(self.call(cli, book, tmp_path, command, "--device", "abacus"), "ConfigError", "abacus")

    def test_unknown_model(self, cli, book, tmp_path, command, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        result = self.call(cli, book, tmp_path, command, "--model", "nobody/nothing")
        refused(result, "ModelError", "nobody/nothing")

    def test_loss_that_is_not_a_number(self, cli, book, tmp_path, command):
        model, tokenizer = load("tiny", device="cpu")
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
        model.save_pretrained(tmp_path / "nan")
        tokenizer.save_pretrained(tmp_path / "nan")
        refused(self.call(cli, book, tmp_path, command, "--model", tmp_path / "nan"), "DivergedError", "nan")

    def test_every_round_rolled_back(self, cli, book, tmp_path, command):
        refused(self.call(cli, book, tmp_path, command, "--learning-rate", "1e9"), "DivergedError", "rolled back")

    def test_no_room_on_the_device(self, cli, book, tmp_path, command, monkeypatch):
        import absorber.absorption

        def full(*arguments, **options):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(absorber.absorption, "teach", full)
        refused(self.call(cli, book, tmp_path, command), "DeviceMemoryError", "no room", "smaller")


def test_busy_session(cli, book, tmp_path, no_model):
    with locked(tmp_path / "session"):
        refused(cli("stream", book, "--session", tmp_path / "session", "--json"), "SessionBusyError")
        refused(cli("chat", "--session", tmp_path / "session", "--json"), "SessionBusyError")
    assert not (tmp_path / "session").exists()


@pytest.mark.parametrize(("question", "stdin"), [("", b""), ("  ", b""), ("-", b""), ("-", b"\xff"), ("\udcff", b"")])
def test_bad_question(cli, memory, no_model, question, stdin):
    refused(cli("ask", memory, question, "--json", stdin=stdin), "ContextError")


def test_chat_line_that_is_not_utf8(cli, tmp_path):
    result = cli("chat", *SMALL, "--json", stdin=b"caf\xe9\n")
    refused(result, "ContextError", "not UTF-8")


@pytest.mark.parametrize(
    "arguments",
    [
        ["absorb"],
        ["absorb", "x"],
        ["absorb", "x", "--output", "y", "--rank", "many"],
        ["absorb", "x", "--output", "y", "--no-such-flag"],
        ["ask", "x"],
        ["stream", "x"],
        ["nonsense"],
        ["--nonsense"],
    ],
)
def test_usage(cli, untouched, arguments):
    result = cli(*arguments)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert result.out == ""
    refused(cli(*arguments, "--json"), "UsageError", "absorber --help")


def test_error_for_people_keeps_brackets(cli, tmp_path):
    result = cli("absorb", tmp_path / "[red]none[/red].txt", "--output", tmp_path / "x")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: there is no file ")
    assert "[red]none[/red].txt" in result.err


def test_no_standard_input(cli, monkeypatch, capsys, tmp_path):
    from absorber.cli import run

    monkeypatch.setattr(sys, "stdin", None)
    assert run(["absorb", "-", "--output", str(tmp_path / "x")]) == 2
    assert "closed" in capsys.readouterr().err


def test_errors_are_one_json_line(cli, tmp_path):
    result = cli("ask", tmp_path / "none", "Who?", "--json")
    assert result.err == ""
    assert json.loads(result.out)["event"] == "error"
    assert TEXT not in result.out
