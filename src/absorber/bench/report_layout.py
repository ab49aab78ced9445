"""What a report is made of, before it is a page: sections with tables and figures, every number with its records."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from absorber.bench.records import Record


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table."""

    text: str
    """What stands in it."""
    interval: str = ""
    """95 % interval; over seeds from the lowest lower end to the highest upper end."""
    sources: tuple[Record, ...] = ()
    """The records that it is made from; none for words and for the paper's numbers."""
    is_number: bool = False
    """Whether it is set to the right."""
    kind: str = ""
    """A mark for the eye: `missing`, `paper` or `best`."""


NONE = "–"
"""Where a place has no value."""

NOT_RUN = Cell("not run", is_number=True, kind="missing")


@dataclass(frozen=True, slots=True)
class Table:
    """A table."""

    title: str
    """May be empty."""
    heads: tuple[str, ...]
    """Of the columns."""
    rows: list[tuple[Cell, ...]]
    """As many cells as heads each."""
    notes: list[str] = field(default_factory=list)
    """Below it."""
    is_folded: bool = False
    """Whether it is opened only when asked for."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing."""

    title: str
    """What it shows."""
    svg: str
    """An <svg> element whose dark lines and words have the color of the text around it."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Drawings that share a legend."""

    title: str
    """What they show."""
    legend: list[tuple[str, str, str]]
    """Name, color and mark of each line."""
    panels: list[Panel]
    """The drawings."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report."""

    anchor: str
    """Its name in links."""
    title: str
    """Its heading."""
    text: list[str] = field(default_factory=list)
    """Paragraphs."""
    parts: list[Table | Gallery] = field(default_factory=list)
    """Tables and figures, in order."""


@dataclass(frozen=True, slots=True)
class Report:
    """All of it."""

    records: list[Record]
    """In the order of the files, each once."""
    facts: list[tuple[str, str]]
    """What the head of the page says: models, devices, commits, seeds."""
    sections: list[Section]
    """In order."""


def words(text: str) -> Cell:
    """A cell without a number."""
    return Cell(text)


def number(record: Record) -> Cell:
    """A cell with the value of a record and its interval."""
    ends = [record.ci95_low, record.ci95_high]
    finite = [end for end in ends if end is not None and math.isfinite(end)]
    interval = f"[{', '.join(spell(record, end, bare=True) for end in finite)}]" if len(finite) == 2 else ""
    if record.metric == "out_of_memory":
        return Cell("out of memory", sources=(record,), is_number=True)
    return Cell(spell(record, record.value), interval, (record,), is_number=True)


def span(records: Sequence[Record]) -> tuple[float, float, float]:
    """Mean of the same figure over seeds, the lowest lower and the highest upper end of its intervals.

    The seeds' streams may be the same, so that their samples are not pooled; this interval is the cautious one.
    What has no interval is its own; seeds without a value are left out.
    """
    finite = [record for record in records if math.isfinite(record.value)]
    if not finite:
        return math.nan, math.nan, math.nan
    ends = [record.value for record in finite]
    ends += [end for record in finite for end in (record.ci95_low, record.ci95_high) if end is not None]
    ends = [end for end in ends if math.isfinite(end)]
    return sum(record.value for record in finite) / len(finite), min(ends), max(ends)


def over_seeds(records: Sequence[Record]) -> Cell:
    """A cell with the mean of the same figure over seeds, and the span of their intervals."""
    if len(records) == 1 or records[0].metric == "out_of_memory":
        return dataclasses.replace(number(records[0]), sources=tuple(records))
    mean, low, high = span(records)
    ends = [spell(records[0], end, bare=True) for end in (low, high) if math.isfinite(end)]
    interval = f"[{', '.join(ends)}]" if ends else ""
    return Cell(spell(records[0], mean), interval, tuple(records), is_number=True)


def seeds_of(seeds: Iterable[int]) -> Cell:
    """A cell with how many seeds there are, and which."""
    own = sorted(set(seeds))
    return Cell(f"{len(own)} ({', '.join(map(str, own))})", is_number=True)


def paper(value: float | None) -> Cell:
    """A cell with a number of the paper; None where it ran out of memory."""
    return Cell("out of memory" if value is None else f"{value:g}", is_number=True, kind="paper")


def spell(record: Record, value: float, *, bare: bool = False) -> str:
    """Write a value in the unit of a record as people read it; bare leaves the unit out."""
    if not math.isfinite(value):
        return "no gap" if "gap" in record.metric else "none"
    sign = "+" if "drift" in record.metric else ""
    match record.unit:
        case "ratio":
            return f"{100 * value:{sign}.1f}" + ("" if bare else " %")
        case "nats":
            return f"{value:{sign}.4f}"
        case "bytes":
            return f"{value / 1e9:.2f}" + ("" if bare else " GB")
    return f"{value:{sign}.4g}"


def origin(record: Record) -> str:
    """Say which record a number is from."""
    place = "".join(f", {key} {value}" for key, value in place_of(record).items())
    return (
        f"{record.task}, {record.method}, {record.metric}{place}: {record.value:.6g} {record.unit}; "
        f"{record.num_samples} samples, {record.context_length} tokens, round {record.round}, seed {record.seed}, "
        f"{record.device}, {record.dtype}, commit {record.git}"
    )


def place_of(record: Record) -> dict[str, Any]:
    """What tells records of one metric and one measurement apart, such as age, wording or kind of drift."""
    if "task" in record.config:
        return {key: value for key, value in record.config.items() if key not in ("task", "method")}
    if "batch" not in record.config:
        return {}
    # Tasks of speed have one flat table of settings.
    return {"batch": record.config["batch"], "checkpointing": record.config.get("checkpointing", NONE)}


def settings_of(record: Record) -> dict[str, Any]:
    """The settings of a record's task, without what is said elsewhere."""
    if "task" in record.config:
        return dict(record.config["task"])
    return {key: value for key, value in record.config.items() if key not in ("batch", "checkpointing", "length")}


def plain(name: str) -> str:
    """A name of a field or metric as words."""
    return " ".join("KL" if word == "kl" else word for word in name.removeprefix("num_").split("_"))
