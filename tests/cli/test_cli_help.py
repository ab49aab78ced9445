import inspect
import subprocess
import sys
import time

import pytest

from absorber.cli import absorb, app, ask, chat, doctor, plan, stream
from absorber.cli.options import Settings
from absorber.version import __version__

COMMANDS = {"absorb": absorb, "ask": ask, "stream": stream, "chat": chat, "doctor": doctor, "plan": plan}


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_names_the_program(cli, arguments):
    result = cli(*arguments)
    assert result.code == 0
    assert "Usage: absorber" in result.out


def test_help_lists_every_command(cli):
    listed = cli("--help").out
    assert all(name in listed for name in (*COMMANDS, "demo", "report"))


def test_version(cli):
    assert cli("--version").out.strip() == __version__


@pytest.mark.parametrize(
    "command",
    [(), ("absorb",), ("ask",), ("stream",), ("chat",), ("doctor",), ("plan",), ("report",)],
)
def test_help_imports_no_torch(command):
    script = (
        "import sys\nfrom absorber.cli import run\n"
        f"assert run({[*command, '--help']}) == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_help_is_quick():
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "absorber", "--help"], check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    assert min(taken) < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_at_most_twelve_flags(name):
    arguments = app[name].assemble_argument_collection(parse_docstring=False)
    flags = {option for argument in arguments for option in argument.names if option.startswith("--")}
    assert 4 <= len(flags) <= 12
    assert "--json" in flags


def test_main_options_are_flags_of_what_absorbs():
    for name in ("absorb", "stream", "chat"):
        flags = {option for argument in app[name].assemble_argument_collection() for option in argument.names}
        assert {"--model", "--preset", "--config", "--rank", "--seed", "--device"} <= flags


def test_every_flag_is_explained(cli):
    for name, command in COMMANDS.items():
        described = inspect.getdoc(command)
        for parameter in inspect.signature(command).parameters:
            assert parameter == "settings" or f"{parameter}:" in described, (name, parameter)
    text = cli("absorb", "--help").out
    assert "Rank of the adapter" in text
    assert len(Settings.__dataclass_fields__) == 8
