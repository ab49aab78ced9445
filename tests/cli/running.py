"""How the tests run the command line, and on what."""

import json
import os
import subprocess
import sys

WINDOW = ["--context-tokens", "40", "--sync-tokens", "60"]
SMALL = ["--model", "tiny", "--device", "cpu", "--steps", "2", "--rank", "2", "--learning-rate", "0.001", *WINDOW]
TEXT = "".join(f"Line {number} says that [red]Alice[/red] saw {number * 7} rabbits.\n" for number in range(8))


class Result:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def events(self):
        """The JSON lines; fails if something else stands on stdout."""
        return [json.loads(line, parse_constant=_no_constant) for line in self.out.splitlines()]

    def of(self, name):
        return [event for event in self.events if event["event"] == name]


def _no_constant(word):
    raise AssertionError(f"{word} is not JSON")


def start(*arguments, **options):
    """Start the command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "absorber", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        **options,
    )
