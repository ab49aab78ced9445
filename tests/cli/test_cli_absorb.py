import json

import pytest
import torch

import absorber
from absorber.models import load
from cli.running import SMALL, TEXT, WINDOW


def provenance(folder):
    return json.loads((folder / "absorber.json").read_text(encoding="utf-8"))


def test_table_and_next_command(cli, book, tmp_path):
    folder = tmp_path / "with [markup] in it"
    result = cli("absorb", book, "--output", folder, *SMALL)
    assert result.code == 0
    assert f"{len(TEXT):,}" in result.out
    assert f"next: absorber ask '{folder}'" in result.out
    assert "round 1: 40 tokens, loss " in result.err


def test_json_lines_tell_every_round(cli, book, tmp_path):
    folder = tmp_path / "memory"
    result = cli("absorb", book, "--output", folder, *SMALL, "--json")
    assert result.code == 0
    assert result.err == ""
    rounds, done = result.of("round"), result.events[-1]
    assert done["event"] == "done"
    assert [line["number"] for line in rounds] == list(range(1, done["num_rounds"] + 1))
    assert sum(line["context_tokens"] for line in rounds) == done["absorbed_tokens"] == len(TEXT)
    assert done["memory_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert done["loss_before"] == pytest.approx(sum(line["loss_before"] for line in rounds) / len(rounds))


def test_equals_the_library(cli, book, memory):
    model, tokenizer = load("tiny", device="cpu")
    config = absorber.AbsorbConfig(max_steps=2, rank=2, learning_rate=1e-3)
    stream = absorber.StreamConfig(context_tokens=40, sync_tokens=60)
    ours = absorber.Memory.load(memory, model)
    theirs = absorber.absorb(model, tokenizer, TEXT, config, stream)
    assert (ours.config, ours.stream, ours.num_rounds) == (theirs.config, theirs.stream, theirs.num_rounds)
    for one, other in zip(ours.adapter.parameters(), theirs.adapter.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_standard_input_equals_the_file(cli, memory, tmp_path):
    folder = tmp_path / "piped"
    assert cli("absorb", "-", "--output", folder, *SMALL, stdin=TEXT.encode()).code == 0
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (memory / weights).read_bytes()


def test_mark_and_line_ends_of_windows_do_not_matter(cli, memory, tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert cli("absorb", path, "--output", tmp_path / "other", *SMALL).code == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() == (memory / weights).read_bytes()


def test_goes_on_from_a_memory_with_its_settings(cli, book, memory, tmp_path):
    before = provenance(memory)
    result = cli("absorb", book, memory, "--output", tmp_path / "longer", "--device", "cpu")
    assert result.code == 0
    after = provenance(tmp_path / "longer")
    assert after["config"] == before["config"]
    assert after["num_tokens"] == 2 * before["num_tokens"]
    assert provenance(memory) == before


def test_flags_override_the_file_which_overrides_the_preset(cli, book, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text("[absorb]\nrank = 3\nmax_steps = 1\n[stream]\ncontext_tokens = 50\n", encoding="utf-8")
    arguments = ["--preset", "paper", "--config", path, "--rank", "2", "--sync-tokens", "60", "--seed", "7"]
    folder = tmp_path / "memory"
    result = cli("absorb", book, "--output", folder, "--model", "tiny", "--device", "cpu", *arguments)
    assert result.code == 0, result.err
    content = provenance(folder)
    settings = {**content["config"], **content["stream"]}
    expected = {"rank": 2, "max_steps": 1, "context_tokens": 50, "sync_tokens": 60, "seed": 7, "sink": "none"}
    assert {key: settings[key] for key in expected} == expected


def test_last_of_a_repeated_flag_counts(cli, book, tmp_path):
    assert cli("absorb", book, "--output", tmp_path / "memory", *SMALL, "--rank", "3").code == 0
    assert provenance(tmp_path / "memory")["config"]["rank"] == 3


def test_older_memory_is_replaced(cli, book, memory):
    assert (
        cli("absorb", book, "--output", memory, *SMALL[:-4], "--context-tokens", "50", "--sync-tokens", "60").code == 0
    )
    assert provenance(memory)["stream"]["context_tokens"] == 50


def test_interrupt_keeps_the_rounds_that_were_accepted(cli, book, tmp_path, monkeypatch):
    interrupt_round(monkeypatch, 3)
    result = cli("absorb", book, "--output", tmp_path / "memory", *SMALL, "--json")
    assert result.code == 130
    assert result.events[-1]["event"] == "interrupted"
    assert result.events[-1]["num_rounds"] == provenance(tmp_path / "memory")["num_rounds"] == 2
    monkeypatch.undo()
    assert cli("ask", tmp_path / "memory", "Who?", "--max-new-tokens", "2", "--device", "cpu").code == 0


def test_interrupt_before_the_first_round_writes_nothing(cli, book, tmp_path, monkeypatch):
    interrupt_round(monkeypatch, 1)
    result = cli("absorb", book, "--output", tmp_path / "memory", *SMALL)
    assert result.code == 130
    assert "nothing was written" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def test_window_flags_are_in_the_ledger(memory):
    assert {line["context_tokens"] for line in provenance(memory)["ledger"][:-1]} == {int(WINDOW[1])}


def interrupt_round(monkeypatch, number):
    """Ctrl-C in the middle of a round."""
    import absorber.absorption

    count = 0
    original = absorber.absorption.take_step

    def step(*arguments):
        nonlocal count
        count += 1
        original(*arguments)
        if count == 2 * number:  # two steps a round
            raise KeyboardInterrupt

    monkeypatch.setattr(absorber.absorption, "take_step", step)
