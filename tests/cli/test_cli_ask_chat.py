import importlib
import io
import json

import pytest

import absorber
from absorber.models import load
from cli.running import SMALL, TEXT

chat_command = importlib.import_module("absorber.cli.chat")  # the package has a function of this name

SHORT = ["--max-new-tokens", "8", "--device", "cpu"]


@pytest.fixture
def brief(tmp_path):
    """Settings for short replies."""
    path = tmp_path / "brief.toml"
    path.write_text("[stream]\nmax_new_tokens = 6\n", encoding="utf-8")
    return ["--config", path, *SMALL]


def test_answer_is_that_of_the_library(cli, memory):
    model, tokenizer = load("tiny", device="cpu")
    session = absorber.Session(model, tokenizer, memory=absorber.Memory.load(memory, model))
    done = cli("ask", memory, "Who is [bold]Alice[/bold]?", *SHORT, "--json").events[-1]
    assert done["answer"] == session.ask("Who is [bold]Alice[/bold]?", max_new_tokens=8)


def test_question_from_standard_input(cli, memory):
    piped = cli("ask", memory, "-", *SHORT, "--json", stdin=b"Who is she?\n").events[-1]
    given = cli("ask", memory, "Who is she?", *SHORT, "--json").events[-1]
    assert (piped["question"], piped["answer"]) == (given["question"], given["answer"])


def test_seed_decides_a_sampled_answer(cli, memory):
    def answer(seed):
        arguments = ["--temperature", "1", "--seed", seed, "--json"]
        return cli("ask", memory, "Who?", *SHORT, *arguments).events[-1]["answer"]

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_compare_answers_without_the_memory_too(cli, memory):
    model, tokenizer = load("tiny", device="cpu")
    plain = absorber.Session(model, tokenizer).ask("Who?", max_new_tokens=8)
    assert cli("ask", memory, "Who?", *SHORT, "--compare", "--json").events[-1]["answer_without_memory"] == plain
    assert "without memory:" in cli("ask", memory, "Who?", *SHORT, "--compare").out


def test_memory_of_a_folder_model_is_found_from_elsewhere(cli, book, tmp_path, monkeypatch):
    model, tokenizer = load("tiny", device="cpu")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert cli("absorb", book, "--output", "memory", *SMALL, "--model", "model").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli("ask", "../memory", "Who?", *SHORT).code == 0


def test_chat_replies_line_by_line(cli, brief):
    result = cli("chat", *brief, "--json", stdin=b"Hello [red]you[/red]\n\n  \nAnd now?\n/exit\nnever read\n")
    assert result.code == 0
    assert [reply["message"] for reply in result.of("reply")] == ["Hello [red]you[/red]", "And now?"]
    assert result.events[-1]["event"] == "done"


def test_chat_absorbs_what_leaves_the_window(cli, brief):
    result = cli("chat", *brief, stdin=(TEXT.replace("\n", " ") + "\n").encode())
    assert result.code == 0
    assert "round 1: 40 tokens" in result.err


def test_chat_is_kept_and_gone_on_with(cli, brief, tmp_path):
    folder = tmp_path / "talk"
    first = cli("chat", "--session", folder, *brief, "--json", stdin=b"Hello\n").events[-1]["num_tokens"]
    second = cli("chat", "--session", folder, "--json", stdin=b"Hello\n").events[-1]["num_tokens"]
    assert second > first > 0
    assert cli("chat", "--session", folder, "--rank", "3", stdin=b"Hello\n").code == 2


def test_chat_with_nothing_said_leaves_no_folder(cli, brief, tmp_path):
    assert cli("chat", "--session", tmp_path / "talk", *brief, stdin=b"/exit\n").code == 0
    assert not (tmp_path / "talk").exists()


def test_chat_begins_with_a_memory(cli, memory, tmp_path):
    folder = tmp_path / "talk"
    result = cli("chat", memory, "--session", folder, "--device", "cpu", "--json", stdin=b"Hello\n")
    assert result.code == 0
    rounds = json.loads((folder / "memory" / "absorber.json").read_text())["num_rounds"]
    assert rounds == json.loads((memory / "absorber.json").read_text())["num_rounds"] + result.events[-1]["num_rounds"]
    assert cli("chat", memory, "--session", folder, stdin=b"Hello\n").code == 2


def test_interrupt_stops_the_answer_and_not_the_conversation(cli, brief, monkeypatch):
    from absorber import decoding

    original = decoding.StaticDecoder._go_on
    calls = []

    def go_on(decoder):
        calls.append(1)
        original(decoder)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(decoding.StaticDecoder, "_go_on", go_on)
    result = cli("chat", *brief, "--json", stdin=b"Hello\nAgain\n")
    assert result.code == 0
    assert [reply["stopped"] for reply in result.of("reply")] == [True, False]


def test_interrupt_inside_the_model_does_not_spoil_the_cache():
    model, tokenizer = load("tiny", dtype="float32", device="cpu")
    session = absorber.Session(model, tokenizer)
    session.append("Alice was beginning to get very tired.")
    expected = session.ask("Who?", max_new_tokens=8)
    session = absorber.Session(model, tokenizer)
    session.append("Alice was beginning to get very tired.")

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.ask("Who?", max_new_tokens=8)
    handle.remove()
    assert session.ask("Who?", max_new_tokens=8) == expected


def test_interrupt_at_the_prompt_ends_and_keeps(cli, brief, tmp_path, monkeypatch):
    class Keyboard(io.BytesIO):
        def readline(self, *_):
            line = super().readline()
            if not line:
                raise KeyboardInterrupt
            return line

    keyboard = Keyboard(b"Hello\n")
    monkeypatch.setattr(chat_command, "standard_input", lambda: keyboard)
    result = cli("chat", "--session", tmp_path / "talk", *brief, "--json")
    assert result.code == 130
    assert (tmp_path / "talk" / "session.json").is_file()


def test_keyboard_reads_with_a_prompt_until_end_of_file(cli, brief, monkeypatch):
    lines = iter(["Hello"])
    prompts = []

    def ask(prompt):
        prompts.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(chat_command, "_is_keyboard", lambda: True)
    assert cli("chat", *brief).code == 0
    assert prompts == ["> ", "> "]


def test_doctor_says_what_fits(cli):
    result = cli("doctor", "--model", "tiny", "--device", "cpu", "--dtype", "float32", "--json")
    assert [event["event"] for event in result.events] == ["system", "model", "estimate", "estimate", "done"]
    model, _ = load("tiny", device="cpu")
    assert result.of("model")[0]["num_parameters"] == sum(weight.numel() for weight in model.parameters())
    assert result.of("system")[0]["free_bytes"] > 2**20
    assert [event["fits"] for event in result.of("estimate")] == [True, True]
    text = cli("doctor", "--model", "tiny").out
    assert "estimate" in text
    assert "transformers" in text


def test_doctor_says_what_does_not_fit(cli, monkeypatch):
    monkeypatch.setattr(importlib.import_module("absorber.cli.doctor"), "_free_bytes", lambda place: 1000)
    result = cli("doctor", "--model", "tiny", "--json")
    assert result.code == 0
    assert [event["fits"] for event in result.of("estimate")] == [False, False]


def test_doctor_does_not_fetch_the_default_model(cli):
    result = cli("doctor", "--json")
    assert (result.code, result.of("model")[0]["fetched"]) == (0, False)
