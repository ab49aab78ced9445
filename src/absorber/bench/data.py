"""Texts to measure on, as streams of tokens: books, dialogues, encyclopedia text and program code.

Options are chosen on one half of the documents and reported on the other; which half a document belongs to is decided
here, by its place in the sorted list, and by nothing else.
"""

import contextlib
import csv
import json
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from absorber.errors import BenchmarkError, ContextError
from absorber.text import cut, decode

Kind = Literal["books", "dialogues", "encyclopedia", "code"]
Split = Literal["choose", "report"]
Item = TypeVar("Item", bound=Any)

# Front matter says little of a book.
_SKIPPED_SHARE = 0.05


def documents(kind: Kind, data_dir: Path, split: Split) -> list[tuple[str, str]]:
    """Read the (name, text) pairs of one half; no text comes twice.

    Args:
        kind: Books are `novels/*.txt`, or the `*.txt` of the folder itself; dialogues `samsum/*.json`; encyclopedia
            text `wikitext2/*.txt`; code `code/*.py`, or without that folder the standard library of the running
            Python, which is another with each version.
        data_dir: Folder with the data.
        split: "choose" for searching options, "report" for the numbers.

    Raises:
        BenchmarkError: If there are too few, or a file cannot be read.
    """
    found = once(_READERS[kind](data_dir), lambda pair: pair[1])
    return half(found, split, what=kind, data_dir=data_dir)


def once(found: Iterable[Item], content: Callable[[Item], str]) -> list[Item]:
    """Drop what has come before but for blanks and capitals, so that halves do not share it."""
    kept: dict[str, Item] = {}
    for item in found:
        kept.setdefault(" ".join(content(item).lower().split()), item)
    return list(kept.values())


def half(found: Sequence[Item], split: Split, *, what: str, data_dir: Path) -> list[Item]:
    """Return one half of what was found: of the sorted list those at even places for "choose", the others for "report".

    Args:
        found: In any order; see `once`.
        split: Which half.
        what: What an error calls them.
        data_dir: Where they were looked for.

    Raises:
        BenchmarkError: If there are too few.
    """
    own = [item for index, item in enumerate(sorted(found)) if index % 2 == (split == "report")]
    if own:
        return own
    if found:
        raise BenchmarkError(
            f"of {what} there is 1 in {data_dir}, and the {split} half needs 2, where repeats count once; add another"
        )
    there_is = f"{data_dir} has no {what}" if data_dir.is_dir() else f"there is no folder {data_dir}"
    raise BenchmarkError(f"{there_is}; give the folder that holds them with --data-dir")


def read_text(path: Path) -> str:
    """Read a file of UTF-8, with or without a byte order mark; every end of line becomes \\n.

    Raises:
        BenchmarkError: If it cannot be read, or a byte is not UTF-8.
    """
    try:
        return "".join(decode([path.read_bytes()], "it"))
    except (OSError, ContextError) as error:
        raise BenchmarkError(f"cannot read {path}: {error}") from error


@contextlib.contextmanager
def form(folder: Path) -> Iterator[None]:
    """Say of whatever goes wrong inside that a file of this folder is not of the form that is read."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise BenchmarkError(
            f"a file of {folder} is not of the form that its authors publish: {error!r}. Fetch it anew, or mend it"
        ) from error


def string(entry: Any, key: str) -> str:
    """The text of an entry.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(value := entry[key], str):
        raise TypeError(f"{key} is {str(value)[:40]}, which is no text")
    return value


def _books(data_dir: Path) -> list[tuple[str, str]]:
    folder = data_dir / "novels" if (data_dir / "novels").is_dir() else data_dir
    return [(path.stem, read_text(path)) for path in sorted(folder.glob("*.txt")) if path.stem != "SOURCE"]


def _dialogues(data_dir: Path) -> list[tuple[str, str]]:
    found = []
    with form(data_dir / "samsum"):
        for path in sorted((data_dir / "samsum").glob("*.json")):
            entries = json.loads(read_text(path))
            found += [(str(entry["id"]), string(entry, "dialogue").replace("\r", "")) for entry in entries]
    return found


def _encyclopedia(data_dir: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted((data_dir / "wikitext2").glob("*.txt")):
        if path.stem == "SOURCE":
            continue
        articles: list[list[str]] = []
        for line in read_text(path).splitlines():
            if line.startswith(" = ") and not line.startswith(" = = "):
                articles.append([])
            if articles:
                articles[-1].append(line.strip())
        found += [(lines[0].strip("= "), "\n".join(lines)) for lines in articles]
    return found


def _code(data_dir: Path) -> list[tuple[str, str]]:
    folder = data_dir / "code" if (data_dir / "code").is_dir() else Path(sysconfig.get_paths()["stdlib"])
    return [(path.stem, read_text(path)) for path in sorted(folder.glob("*.py")) if path.stat().st_size > 4096]


_READERS: dict[str, Callable[[Path], list[tuple[str, str]]]] = {
    "books": _books,
    "dialogues": _dialogues,
    "encyclopedia": _encyclopedia,
    "code": _code,
}


def streams(
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    kind: Kind,
    num_streams: int,
    num_tokens: int,
    seed: int,
) -> Tensor:
    """Cut documents into streams of equal length.

    A book is long: streams begin at places spread over it. The other kinds are short: a stream is a sequence of
    whole documents in an order of its own, so that no text comes twice in one stream.

    Args:
        tokenizer: Of the model.
        pairs: From `documents`.
        kind: Their kind.
        num_streams: B.
        num_tokens: T.
        seed: Of the order of documents, and of the places.

    Returns:
        Token ids [B, T].

    Raises:
        BenchmarkError: If there is too little text.
    """
    dice = random.Random(seed)
    if kind == "books":
        rows = _from_books(tokenizer, pairs, num_streams, num_tokens, dice)
    else:
        rows = [_joined(tokenizer, pairs, num_tokens, dice) for _ in range(num_streams)]
    return torch.tensor(rows)


def _from_books(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], num_streams: int, num_tokens: int, dice: random.Random
) -> list[list[int]]:
    """Streams at places spread evenly over each book: as many of every book, or more of the long ones if need be."""
    order = list(pairs)
    dice.shuffle(order)
    rows: list[list[list[int]]] = [[] for _ in order]
    full = [False] * len(order)
    while sum(map(len, rows)) < num_streams and not all(full):
        # One more of each book in turn, until there are enough; a book that cannot hold one more has all it can hold.
        wanted = min(len(own) for own, is_full in zip(rows, full, strict=True) if not is_full) + 1
        for index, (_, text) in enumerate(order):
            if not full[index] and sum(map(len, rows)) < num_streams:
                found = _spread(tokenizer, text, wanted, num_tokens)
                full[index] = len(found) < wanted
                rows[index] = rows[index] if full[index] else found
    if sum(map(len, rows)) < num_streams:
        raise BenchmarkError(
            f"{len(order)} books hold only {sum(map(len, rows))} streams of {num_tokens} tokens; {num_streams} are "
            "wanted. Give more books, fewer streams or fewer rounds"
        )
    return [row for own in rows for row in own]


def _spread(tokenizer: Any, text: str, count: int, num_tokens: int) -> list[list[int]]:
    """As many streams of a book as fit, up to a number: one from each of so many equal parts."""
    rows = []
    ends = [int(len(text) * (_SKIPPED_SHARE + (1 - _SKIPPED_SHARE) * part / count)) for part in range(count + 1)]
    for begin, end in pairwise(ends):
        token_ids = _tokens(tokenizer, text[_beginning(text, begin, end) : end], num_tokens)
        if len(token_ids) == num_tokens:
            rows.append(token_ids)
    return rows


def _beginning(text: str, begin: int, end: int) -> int:
    """Where a line begins; of a text without lines a word, and without those the place itself."""
    places = (text.find(sign, begin, end) + 1 for sign in ("\n", " "))
    return next((place for place in places if place), begin)


def _joined(tokenizer: Any, pairs: Sequence[tuple[str, str]], num_tokens: int, dice: random.Random) -> list[int]:
    order = list(pairs)
    dice.shuffle(order)
    row: list[int] = []
    for _, text in order:
        row += _tokens(tokenizer, text + "\n\n", num_tokens - len(row))
        if len(row) == num_tokens:
            return row
    raise BenchmarkError(
        f"{len(order)} documents hold only {len(row)} tokens; a stream needs {num_tokens}. Use fewer rounds"
    )


def _tokens(tokenizer: Any, text: str, at_most: int) -> list[int]:
    row: list[int] = []
    for piece in cut([text]):
        row += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(row) >= at_most:
            break
    return row[:at_most]
