"""Where a command's text comes from: a file, or standard input."""

import itertools
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from absorber.errors import ContextError
from absorber.text import decode

_READ_BYTES = 2**16
_EMPTY = "{name} holds no text, so there is nothing to absorb; give some"


class Source:
    """A text that is read in parts, each time from the beginning if it is a file."""

    def __init__(self, name: str, *, path: Path | None = None, num_bytes: int | None = None) -> None:
        """Describe it; `open_source` makes one."""
        self.name = name
        """What messages call it."""
        self.path = path
        """The file; None for a pipe, which is read once."""
        self.num_bytes = num_bytes
        """Its size, if known."""
        self.bytes_read = 0
        """How far it was read."""
        self._first: Iterable[str] = ()

    @property
    def key(self) -> str | None:
        """What a session calls it, or None if it cannot be read again."""
        # A path need not be UTF-8, and a session's file is.
        return None if self.path is None else str(self.path).encode("utf-8", "backslashreplace").decode()

    def parts(self) -> Iterator[str]:
        """Yield the text.

        Raises:
            ContextError: If it is not UTF-8 or cannot be read.
        """
        self.bytes_read = 0
        if self.path is None:
            yield from self._first
            self._first = ()
            return
        try:
            with self.path.open("rb") as file:
                yield from decode(self._count(file), self.name)
        except OSError as error:
            raise ContextError(f"cannot read {self.name}: {error.strerror}; give a readable text file") from error

    def _count(self, file: BinaryIO) -> Iterator[bytes]:
        # read1 gives what a pipe has, without waiting for more.
        while part := getattr(file, "read1", file.read)(_READ_BYTES):
            self.bytes_read += len(part)
            yield part

    def check(self) -> None:
        """Read the whole text once, so that a bad one is refused before a model is loaded.

        Raises:
            ContextError: If it is blank, not UTF-8, or cannot be read.
        """
        blank = True
        for part in self.parts():
            blank = blank and not part.strip()
        if blank:
            raise ContextError(_EMPTY.format(name=self.name))

    def spool(self, file: BinaryIO) -> None:
        """Copy a pipe, which can be read only once, to a temporary file and check it.

        Raises:
            ContextError: If it is blank or not UTF-8.
        """
        scratch = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the source
        weakref.finalize(self, scratch.close)
        blank = True
        for part in decode(self._count(file), self.name):
            blank = blank and not part.strip()
            scratch.write(part.encode("utf-8"))
        if blank:
            raise ContextError(_EMPTY.format(name=self.name))
        self.num_bytes = scratch.tell()
        scratch.seek(0)
        self._first = decode(self._count(scratch), self.name)

    def follow(self, file: BinaryIO) -> None:
        """Read a pipe as it comes, which may never end; wait for its first words.

        Raises:
            ContextError: If it ends before there are any, or they are not UTF-8.
        """
        parts = decode(self._count(file), self.name)
        first: list[str] = []
        for part in parts:
            first.append(part)
            if part.strip():
                self._first = itertools.chain(first, parts)
                return
        raise ContextError(_EMPTY.format(name=self.name))


def open_source(argument: str, *, live: bool = False) -> Source:
    """Find and check the text that a command is to read.

    Args:
        argument: A path, or `-` for standard input.
        live: Read a pipe as it comes, instead of checking all of it first.

    Raises:
        ContextError: If it is missing, blank, or not UTF-8.
    """
    if argument == "-":
        return _of_pipe("standard input", standard_input(), live=live)
    path = Path(argument)
    try:
        if not path.exists():
            raise ContextError(f"there is no file {argument}; give a text file, or - for standard input")
        if path.is_dir():
            raise ContextError(f"{argument} is a folder; give a text file, or - for standard input")
        if not path.is_file():  # a named pipe, <(command) of a shell
            pipe = path.open("rb")
            source = _of_pipe(argument, pipe, live=live)
            weakref.finalize(source, pipe.close)
            return source
        source = Source(argument, path=path.resolve(), num_bytes=path.stat().st_size)
    except OSError as error:
        raise ContextError(f"cannot read {argument}: {error.strerror}; give a readable text file") from error
    source.check()
    return source


def _of_pipe(name: str, file: BinaryIO, *, live: bool) -> Source:
    source = Source(name)
    if live:
        source.follow(file)
    else:
        source.spool(file)
    return source


def standard_input() -> BinaryIO:
    """Return standard input as bytes.

    Raises:
        ContextError: If it is closed.
    """
    if sys.stdin is None:
        raise ContextError("standard input is closed; give a file instead of -")
    return sys.stdin.buffer


def read_question(argument: str) -> str:
    """Return the text of a question: the argument itself, or standard input if it is `-`.

    Raises:
        ContextError: If it is blank or not UTF-8.
    """
    text = "".join(decode([standard_input().read()], "the question")) if argument == "-" else argument
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ContextError("the question is not UTF-8 text; give it in UTF-8") from error
    if not text.strip():
        raise ContextError("the question is empty; give one")
    return text.strip()
