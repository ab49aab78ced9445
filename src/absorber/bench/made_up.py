"""Small files of the forms that `data` and `data_sets` read, for tests and `absorber bench all --quick`; all made up.

They are the same at every call. No figure measured on them means anything.
"""

import csv
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

SUBJECTS = ["harbor", "bridge", "orchard", "market", "castle", "river", "garden", "tower", "station", "island"]
NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ivy", "Jon", "Kim", "Leo"]
_VERBS = ["painted", "crossed", "closed", "sold", "measured", "guarded", "left", "found", "described", "visited"]
_WHEN = ["in the morning", "before the rain", "for a week", "without a word", "at noon", "once more", "in March"]


def write(folder: Path) -> Path:
    """Write all of them into a folder, and return it."""
    labelled(folder)
    questions(folder)
    summarized(folder)
    told(folder)
    return folder


def told(folder: Path) -> None:
    """Books and encyclopedia text."""
    for number in range(6):
        lines = [" ".join(_sentences(f"book/{number}/{line}", 3)) for line in range(60)]
        _text(folder / "novels" / f"book{number}.txt", "\n".join(lines) + "\n")
    articles = []
    for subject in SUBJECTS:
        articles.append(f" = The {subject} = \n")
        articles += [f" {' '.join(_sentences(f'article/{subject}/{part}', 4))} \n" for part in range(5)]
    _text(folder / "wikitext2" / "test.txt", "".join(articles))


def _sentences(seed: str, count: int) -> list[str]:
    dice = random.Random(seed)
    return [
        f"{dice.choice(NAMES)} {dice.choice(_VERBS)} the {dice.choice(SUBJECTS)} {dice.choice(_WHEN)}."
        for _ in range(count)
    ]


def labelled(folder: Path) -> None:
    """AG News, TREC and Banking77."""
    rows = [
        (label, f"Title {label}{number}", f"The {SUBJECTS[number % 10]} of topic {label}\\number {number} #39;x")
        for number in range(30)
        for label in "1234"
    ]
    _csv(folder / "ag_news" / "test.csv", rows)
    coarse = ("ABBR:exp", "DESC:def", "ENTY:animal", "HUM:ind", "LOC:city", "NUM:date")
    for part, numbers in (("train", range(20)), ("test", range(18, 24))):  # two of each class are in both
        lines = [f"{label} What is {label[:3]} {number} ?" for number in numbers for label in coarse]
        _text(folder / "trec" / f"{part}.txt", "\n".join(lines) + "\n")
    for part, numbers in (("train", range(10)), ("test", range(10, 16))):
        asked = [
            (f"About {kind}, case {number}, please", f"kind_of_{kind}?") for number in numbers for kind in range(20)
        ]
        _csv(folder / "banking77" / f"{part}.csv", [("text", "category"), *asked])


def questions(folder: Path) -> None:
    """MuSiQue."""
    entries = [
        {
            "id": f"2hop__{number}",
            "question": f"Who built the {SUBJECTS[number % 10]} number {number}?",
            "answer": f"Builder {number}",
            "answer_aliases": [f"B. {number}"],
            "paragraphs": [
                {
                    "title": f"Part {part} of {number}",
                    "paragraph_text": f"Paragraph {part} about {number}.",
                    "is_supporting": part < 2,
                }
                for part in range(5)
            ],
        }
        for number in range(12)
    ]
    _text(folder / "musique" / "dev.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


def summarized(folder: Path) -> None:
    """SAMSum and SQuALITY."""
    pairs = [(one, other) for one in NAMES for other in NAMES if one < other][:40]
    dialogues = [
        {
            "id": str(1000 + number),
            "dialogue": f"{one}: Shall we see the {SUBJECTS[number % 10]}?\r\n{other}: Yes, at {number}.",
            "summary": f"{one} and {other} will see the {SUBJECTS[number % 10]}.",
        }
        for number, (one, other) in enumerate([*pairs, pairs[0], pairs[1]])  # two come twice
    ]
    _text(folder / "samsum" / "test.json", json.dumps(dialogues))
    stories = [
        {
            "metadata": {"passage_id": str(500 + number)},
            "document": f" Tale {number}\n \n \n" + f"It rained on {SUBJECTS[number]}. " * (4 + number),
            "questions": [
                {
                    "question_text": f"What is asked {place}?",
                    "responses": [{"response_text": f"Reply {place} of {who}."} for who in range(2)],
                }
                for place in range(3)
            ],
        }
        for number in range(8)
    ]
    _text(folder / "squality" / "dev.jsonl", "".join(json.dumps(story) + "\n" for story in stories))


def _csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
