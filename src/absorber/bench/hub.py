"""Data sets from the Hugging Face hub, written as the files that `data_sets` reads."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from absorber.errors import BenchmarkError, MissingExtraError
from absorber.models import home

Row = dict[str, Any]

# By data set: its name on the hub, the split, the file, and how the file's lines are made from the rows.
_SOURCES: dict[str, list[tuple[str, str, str, Callable[[Iterable[Row]], Iterable[Any]]]]] = {
    # Title and text are one column there.
    "ag_news": [
        ("fancyzhx/ag_news", "test", "test.csv", lambda rows: ((row["label"] + 1, "", row["text"]) for row in rows))
    ],
    "trec": [
        ("SetFit/TREC-QC", part, f"{part}.txt", lambda rows: (f"{row['label_original']} {row['text']}" for row in rows))
        for part in ("train", "test")
    ],
    "banking77": [
        ("mteb/banking77", part, f"{part}.csv", lambda rows: ((row["text"], row["label_text"]) for row in rows))
        for part in ("train", "test")
    ],
    "musique": [("dgslibisey/MuSiQue", "validation", "dev.jsonl", lambda rows: map(json.dumps, rows))],
    "samsum": [("knkarthick/samsum", "test", "test.json", lambda rows: [json.dumps(list(rows))])],
    "squality": [("pszemraj/SQuALITY-v1.3", "validation", "dev.jsonl", lambda rows: map(json.dumps, rows))],
}


def fetched(kind: str) -> Path:
    """Return the folder that holds a data set's folder; it is fetched from the hub the first time.

    Args:
        kind: Name of the data set.

    Raises:
        MissingExtraError: If the package `datasets` is not installed.
        BenchmarkError: If the hub does not give it.
    """
    folder = home() / "data"
    missing = [source for source in _SOURCES[kind] if not (folder / kind / source[2]).exists()]
    for name, split, file, lines in missing:
        rows = _rows(name, split)
        try:
            _write(folder / kind / file, lines(dict(row) for row in rows))
        except (KeyError, TypeError) as error:
            raise BenchmarkError(
                f"the data set {name} of the hub has other columns than it had: {error!r}. Give --data-dir"
            ) from error
    return folder


def _rows(name: str, split: str) -> Iterable[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(
            "fetching a data set needs the package datasets: pip install 'absorber[bench]', or give a folder with "
            "--data-dir"
        ) from error
    try:
        rows: Iterable[Row] = load_dataset(name, split=split)
        return rows
    except Exception as error:  # the hub's client raises whatever the network and the repository make it raise
        raise BenchmarkError(
            f"cannot fetch the data set {name} from the hub: {error}. Give a folder with --data-dir"
        ) from error


def _write(path: Path, lines: Iterable[Any]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows(lines)
        else:
            file.writelines(f"{line}\n" for line in lines)
    unfinished.replace(path)
