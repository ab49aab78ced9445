"""What the tests of the command line share."""

import io
import sys

import pytest

from absorber.cli import run
from cli.running import SMALL, TEXT, Result, start


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run the command line in this process."""

    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def memory(cli, book, tmp_path):
    folder = tmp_path / "memory"
    assert cli("absorb", book, "--output", folder, *SMALL).code == 0
    return folder


@pytest.fixture
def process():
    """Start processes that do not outlive the test."""
    started = []

    def call(*arguments, **options):
        started.append(start(*arguments, **options))
        return started[-1]

    yield call
    for one in started:
        if one.poll() is None:
            one.kill()
        one.communicate()
