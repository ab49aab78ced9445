"""What shows only in a process of its own: signals, pipes, and the two ways to start."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from absorber.cli import run
from absorber.version import __version__
from cli.running import SMALL, TEXT


@pytest.fixture
def long_book(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 200, encoding="utf-8")
    return path


def interrupt_after_first_round(process):
    for line in process.stdout:
        if json.loads(line)["event"] == "round":
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert process.returncode == 130
    last = json.loads(out.splitlines()[-1])
    assert last["event"] == "interrupted"
    return last


def test_ctrl_c_during_absorb(process, long_book, tmp_path, cli):
    folder = tmp_path / "memory"
    last = interrupt_after_first_round(process("absorb", long_book, "--output", folder, *SMALL, "--json"))
    content = json.loads((folder / "absorber.json").read_text())
    assert content["num_rounds"] == last["num_rounds"] >= 1
    assert cli("ask", folder, "Who?", "--max-new-tokens", "2", "--device", "cpu").code == 0


def test_ctrl_c_during_stream(process, long_book, tmp_path):
    folder = tmp_path / "session"
    interrupt_after_first_round(process("stream", long_book, "--session", folder, *SMALL, "--json"))
    rounds = json.loads((folder / "memory" / "absorber.json").read_text())["num_rounds"]
    assert rounds >= 1
    resumed = process("stream", long_book, "--session", folder, "--device", "cpu", "--json")
    interrupt_after_first_round(resumed)
    assert json.loads((folder / "memory" / "absorber.json").read_text())["num_rounds"] > rounds


def test_reader_that_leaves_does_not_end_the_work(process, book, tmp_path):
    running = process("absorb", book, "--output", tmp_path / "memory", *SMALL, "--json")
    running.stdout.readline()
    running.stdout.close()
    assert running.wait(timeout=60) == 0
    assert running.stderr.read() == ""
    assert (tmp_path / "memory" / "absorber.json").is_file()


def test_two_ways_to_start():
    script = Path(sys.executable).with_name("absorber")
    for command in ([sys.executable, "-m", "absorber"], [str(script)]):
        if Path(command[0]).exists():
            shown = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True)
            assert shown.stdout.strip() == __version__


def test_bad_input_in_a_process():
    failed = subprocess.run([sys.executable, "-m", "absorber", "absorb"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert run(["absorb"]) == 2
