"""What the YAML files of this folder ask for: labelled texts, encyclopedia pages, and questions over paragraphs.

The harness calls `labelled`, `pages` and `paragraphs` with everything in --metadata and --model_args, and with the
`dataset_kwargs` of the task.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from absorber.bench.data import Split, documents
from absorber.bench.data_sets import Example, LabelledSet, examples, questions
from absorber.bench.overlap import exact_match, token_f1
from absorber.errors import BenchmarkError

Doc = Mapping[str, Any]
"""One row of a task."""

_OTHER: dict[Split, Split] = {"report": "choose", "choose": "report"}


def folder_of(data_dir: Any) -> Path:
    """Return the folder with the data.

    Args:
        data_dir: What `absorber eval --data-dir` was given.

    Raises:
        BenchmarkError: If it was not given.
    """
    if data_dir is None:
        raise BenchmarkError("this task reads files of yours; give the folder that holds them with --data-dir")
    return Path(str(data_dir))


def labelled(*, kind: LabelledSet, data_dir: Any = None, split: Split = "report", **_: Any) -> dict[str, Dataset]:
    """Make a task of labelled texts: which class does a text have?

    Args:
        kind: ag_news, trec or banking77.
        data_dir: Folder with the data.
        split: Half that is asked about; examples for --num_fewshot are of the other.

    Returns:
        `test` and `train`, with columns text, choices and gold, the place of the right choice.

    Raises:
        BenchmarkError: If the folder has no such data.
    """
    halves = {
        name: examples(kind, folder_of(data_dir), own) for name, own in (("test", split), ("train", _OTHER[split]))
    }
    choices = sorted({example.label for own in halves.values() for example in own})
    return {name: Dataset.from_list(_rows(own, choices)) for name, own in halves.items()}


def _rows(own: Sequence[Example], choices: list[str]) -> list[dict[str, Any]]:
    rows = [{"text": each.text, "choices": choices, "gold": choices.index(each.label)} for each in own]
    random.Random(0).shuffle(rows)  # so that the first of them, which --limit takes, are of all classes
    return rows


def pages(*, data_dir: Any = None, split: Split = "report", **_: Any) -> dict[str, Dataset]:
    """Make a task of the articles of wikitext2/*.txt, in a column page; otherwise as `labelled`."""
    found = documents("encyclopedia", folder_of(data_dir), split)
    # A line ends with a blank there, as the harness's own reader of such text expects.
    return {"test": Dataset.from_list([{"page": text.replace("\n", " \n ")} for _, text in found])}


def paragraphs(*, data_dir: Any = None, split: Split = "report", **_: Any) -> dict[str, Dataset]:
    """Make a task of the questions of musique/*.jsonl, each with all its paragraphs; otherwise as `labelled`."""
    rows = []
    for question in questions(folder_of(data_dir), split):
        parts = [*question.supporting, *question.others]
        random.Random(question.name).shuffle(parts)
        rows.append({"context": "\n\n".join(parts), "question": question.question, "answers": list(question.answers)})
    return {"test": Dataset.from_list(rows)}


def answered(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Compare an answer with those that are right, the best of which counts.

    Args:
        doc: A row of `paragraphs`.
        results: What was written.

    Returns:
        f1 of the words, and exact_match.
    """
    return {"f1": token_f1(results[0], doc["answers"]), "exact_match": exact_match(results[0], doc["answers"])}
