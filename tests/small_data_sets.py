"""Small files of the forms in which the data sets of `absorber.bench.data_sets` are published; all made up."""

import csv
import json

SUBJECTS = ["harbor", "bridge", "orchard", "market", "castle", "river", "garden", "tower", "station", "island"]
NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ivy", "Jon", "Kim", "Leo"]


def write(folder):
    """Write all of them."""
    labelled(folder)
    questions(folder)
    summarized(folder)
    return folder


def labelled(folder):
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
        rows = [
            (f"About {kind}, case {number}, please", f"kind_of_{kind}?") for number in numbers for kind in range(20)
        ]
        _csv(folder / "banking77" / f"{part}.csv", [("text", "category"), *rows])


def questions(folder):
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


def summarized(folder):
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


def _csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)


def _text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
