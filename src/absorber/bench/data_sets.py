"""Labelled texts, questions and documents with summaries, to ask about; the streams of plain text are in `data`.

They are read from a folder, in the form in which their authors publish them; `hub` fetches the same files. Halves are
those of `data.half`: options are chosen on one and reported on the other.
"""

import csv
import html
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from absorber.bench.data import Split, form, half, once, read_text, string
from absorber.errors import BenchmarkError

LabelledSet = Literal["ag_news", "trec", "banking77"]
QuestionSet = Literal["musique"]
SummarySet = Literal["samsum", "squality"]

# Their own names are codes; a language model has to be able to expect them.
_AG_NEWS = {"1": "World", "2": "Sports", "3": "Business", "4": "Technology"}
_TREC = {
    "ABBR": "Abbreviation",
    "DESC": "Description",
    "ENTY": "Entity",
    "HUM": "Person",
    "LOC": "Location",
    "NUM": "Number",
}


@dataclass(frozen=True, slots=True, order=True)
class Example:
    """A text and what it is."""

    text: str
    """One line."""
    label: str
    """Name of its class."""


@dataclass(frozen=True, slots=True, order=True)
class Question:
    """A question that needs several paragraphs."""

    name: str
    """Of the question."""
    question: str
    """The question."""
    answers: tuple[str, ...]
    """Ways to give the answer, the main one first."""
    supporting: tuple[str, ...]
    """Paragraphs that answer it together, each under its title."""
    others: tuple[str, ...]
    """Paragraphs that look like it and do not."""


@dataclass(frozen=True, slots=True, order=True)
class Request:
    """Something to be written about a document."""

    prompt: str
    """What stands before it; no blank at the end."""
    references: tuple[str, ...]
    """What people wrote."""


@dataclass(frozen=True, slots=True, order=True)
class Document:
    """A text under a heading by which it can be asked for."""

    name: str
    """Of the document."""
    heading: str
    """What stands above it."""
    text: str
    """The text."""
    requests: tuple[Request, ...]
    """What to ask for."""


def examples(kind: LabelledSet, data_dir: Path, split: Split) -> list[Example]:
    """Read one half of a set of labelled texts; no text comes twice.

    Args:
        kind: `ag_news/test.csv` (the raw text), `trec/{train,test}.txt` (coarse classes) or
            `banking77/{train,test}.csv`; where a set has parts, they are taken together.
        data_dir: Folder with the data.
        split: "choose" for searching options, "report" for the numbers.

    Raises:
        BenchmarkError: If a file is missing or of another form.
    """
    with form(data_dir / kind):
        found = once(_EXAMPLES[kind](data_dir), lambda example: example.text)
    return half(found, split, what=f"examples of {kind}", data_dir=data_dir)


def questions(data_dir: Path, split: Split) -> list[Question]:
    """Read one half of the questions of `musique/*.jsonl`; arguments and errors as for `examples`.

    No question is in both halves, but paragraphs are, for MuSiQue's questions share them: docs/methods.md.
    """
    with form(data_dir / "musique"):
        entries = map(_question, _json_lines(data_dir, "musique", "*.jsonl"))
        found = once(entries, lambda question: question.question)
    return half(found, split, what="questions of musique", data_dir=data_dir)


def summarized(kind: SummarySet, data_dir: Path, split: Split) -> list[Document]:
    """Read one half of a set of documents with summaries; no text comes twice.

    Args:
        kind: `samsum/*.json` or `squality/dev.jsonl`.
        data_dir: Folder with the data.
        split: "choose" for searching options, "report" for the numbers.

    Raises:
        BenchmarkError: If a file is missing or of another form.
    """
    with form(data_dir / kind):
        found = once(_SUMMARIZED[kind](data_dir), lambda document: document.text)
    return half(found, split, what=f"documents of {kind}", data_dir=data_dir)


def _question(entry: Any) -> Question:
    name, answer, aliases = str(entry["id"]), entry["answer"], entry["answer_aliases"]
    parts = [(f"{part['title']}\n{part['paragraph_text']}", part["is_supporting"]) for part in entry["paragraphs"]]
    supporting = tuple(dict.fromkeys(text for text, supports in parts if supports))
    others = tuple(dict.fromkeys(text for text, supports in parts if not supports))
    if not supporting or not isinstance(answer, str) or not answer.strip():
        lacks = "answer" if supporting else "supporting paragraph"
        raise BenchmarkError(f"the question {name} of musique has no {lacks}; give it one, or take the question out")
    answers = (answer, *([aliases] if isinstance(aliases, str) else aliases))
    return Question(name, string(entry, "question"), answers, supporting, others)


def _ag_news(data_dir: Path) -> Iterator[Example]:
    for label, title, text in _csv_rows(data_dir, "ag_news", "test.csv"):
        # A backslash stands where a line ended, and " #39;" for an apostrophe.
        article = ". ".join(part for part in (title, text) if part).replace("\\", " ")
        article = html.unescape(re.sub(r" #(\d+;)", r"&#\1", article))
        yield Example(_one_line(article), _known(label, _AG_NEWS, "ag_news"))


def _trec(data_dir: Path) -> Iterator[Example]:
    for part in ("train.txt", "test.txt"):
        for line in _read(data_dir, "trec", part).split("\n"):
            label, _, text = line.partition(" ")
            if line.strip():
                yield Example(_one_line(text), _known(label.split(":")[0], _TREC, "trec"))


def _banking77(data_dir: Path) -> Iterator[Example]:
    for part in ("train.csv", "test.csv"):
        for text, label in _csv_rows(data_dir, "banking77", part):
            if (text.strip().lower(), label.strip().lower()) != ("text", "category"):
                yield Example(_one_line(text), label.replace("_", " ").strip("? ").lower())


def _samsum(data_dir: Path) -> Iterator[Document]:
    for path in _paths(data_dir, "samsum", "*.json"):
        for entry in json.loads(read_text(path)):
            text = string(entry, "dialogue").replace("\r", "").strip()
            speakers = dict.fromkeys(line.split(":")[0].strip() for line in text.splitlines() if ":" in line)
            if text and entry["summary"] and string(entry, "summary"):
                names = " and ".join(speakers)
                request = Request(
                    f"Question: What is the dialogue between {names} about?\nAnswer:", (entry["summary"],)
                )
                yield Document(str(entry["id"]), f"Dialogue between {names}:", text, (request,))


def _squality(data_dir: Path) -> Iterator[Document]:
    for number, entry in enumerate(_json_lines(data_dir, "squality", "dev.jsonl"), start=1):
        text = re.sub(r"\s*\n\s*\n\s*", "\n\n", entry["document"].strip())
        requests = tuple(
            Request(
                f"Question about story {number}: {asked['question_text'].strip()}\nAnswer:",
                tuple(_one_line(response["response_text"]) for response in asked["responses"]),
            )
            for asked in entry["questions"]
        )
        name = str(entry["metadata"]["passage_id"])
        if not all(request.references for request in requests):
            raise BenchmarkError(f"a question about the story {name} of squality has no responses; take it out")
        yield Document(name, f"Story {number}:", text, requests)


_EXAMPLES = {"ag_news": _ag_news, "trec": _trec, "banking77": _banking77}
_SUMMARIZED = {"samsum": _samsum, "squality": _squality}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _known(label: str, names: dict[str, str], kind: str) -> str:
    if label not in names:
        raise BenchmarkError(f"{label[:40]!r} is no class of {kind}; they are {', '.join(names)}. Fetch the files anew")
    return names[label]


def _paths(data_dir: Path, kind: str, pattern: str) -> list[Path]:
    found = sorted((data_dir / kind).glob(pattern))
    if not found:
        raise BenchmarkError(
            f"there is no {kind}/{pattern} in {data_dir}; give the folder that holds {kind} with --data-dir, or leave "
            "it out for the Hugging Face hub"
        )
    return found


def _read(data_dir: Path, kind: str, name: str) -> str:
    (path,) = _paths(data_dir, kind, name)
    return read_text(path)


def _csv_rows(data_dir: Path, kind: str, name: str) -> list[list[str]]:
    rows = csv.reader(io.StringIO(_read(data_dir, kind, name)), strict=True)  # else an open quote takes what follows
    return [row for row in rows if any(map(str.strip, row))]


def _json_lines(data_dir: Path, kind: str, pattern: str) -> list[Any]:
    return [
        json.loads(line)
        for path in _paths(data_dir, kind, pattern)
        for line in read_text(path).split("\n")
        if line.strip()
    ]
