"""`--batch` of every command of `absorber bench` that reads streams."""

import pytest

from absorber.bench import ablation, everything, made_up, runner
from absorber.cli.bench import app

COMMANDS = ("retention", "recall", "icl", "reasoning", "summary", "ablation", "all")


@pytest.fixture
def flags(tmp_path):
    folder = made_up.write(tmp_path / "data")
    return ("--data-dir", folder, "--output", tmp_path / "records.jsonl", "--model", "tiny", "--device", "cpu")


@pytest.mark.parametrize("command", COMMANDS)
def test_it_comes_to_the_run(cli, flags, command, monkeypatch):
    heard = []

    def heard_by(*args, batch, **rest):
        heard.append(batch)
        return []

    for module in (runner, ablation, everything):
        monkeypatch.setattr(module, "run_task", heard_by)
    what = {"all": ("icl", "--quick"), "ablation": ("sink",)}.get(command, ("truncation",))
    assert cli("bench", command, *what, *flags).code == 0
    assert cli("bench", command, *what, *flags, "--batch", "3").code == 0
    assert heard == [None, 3]
    assert cli("bench", command, *what, *flags, "--batch", "0").code == 2
    assert len(heard) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_at_most_twelve_flags(command):
    arguments = app[command].assemble_argument_collection(parse_docstring=False)
    flags = {option for argument in arguments for option in argument.names if option.startswith("--")}
    assert {"--batch", "--json"} <= flags
    assert len({flag for flag in flags if not flag.startswith("--no-")}) <= 12


def test_streams_are_read_one_after_another(cli, flags, tmp_path):
    config = tmp_path / "settings.toml"
    config.write_text("[reasoning]\ncontext_tokens = 120\nsync_tokens = 140\nmax_new_tokens = 2\n")
    sizes = ("--streams", "2", "--rounds", "2", "--batch", "1", "--config", config)
    done = cli("bench", "reasoning", "truncation", *flags, *sizes, "--json")
    assert done.code == 0
    notes = [event["message"] for event in done.of("note")]
    assert [note for note in notes if "streams" in note] == [f"truncation: streams {at} to {at} of 2" for at in (1, 2)]
    assert [event["round"] for event in done.of("progress")] == [1, 2, 1, 2]
