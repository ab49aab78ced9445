"""Which of several values is the best, and which are no worse: their intervals overlap."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from absorber.bench.records import Record
from absorber.bench.report_layout import Cell, place_of, span

REFERENCE = "full"
"""The method that the others are measured by; it competes with none."""

_HIGHER: tuple[str, ...] = ("gap_closed", "exact", "accuracy", "agreement", "f1", "exact_match", "rouge_l")
_HIGHER += ("similarity", "likelihood", "per_second", "mfu", "share")
_LOWER = ("nll", "kl", "ms_per_token", "absorption", "seconds", "peak_memory_bytes", "round_ms")


def direction(metric: str) -> int:
    """Say whether more of a metric is better (1), less is (-1), or neither is known (0)."""
    return 1 if metric.endswith(_HIGHER) else -1 if metric.endswith(_LOWER) else 0


def leaders(rivals: Mapping[str, Sequence[Record]]) -> list[str]:
    """Find the best of some methods, and after it those whose interval overlaps its.

    Args:
        rivals: Records of one figure, one for each seed, by method.

    Returns:
        Names, the best first; none if it is not known what is better.
    """
    spans = {name: span(records) for name, records in rivals.items()}
    spans = {name: own for name, own in spans.items() if own[0] == own[0]}
    way = direction(next(iter(rivals.values()))[0].metric) if rivals else 0
    if not way or not spans:
        return []
    best = max(spans, key=lambda name: way * spans[name][0])
    _, low, high = spans[best]
    near = [name for name, own in spans.items() if name != best and own[1] <= high and own[2] >= low]
    return [best, *near]


def competes(record: Record) -> bool:
    """Whether a figure is of a method, and not of full attention, whatever its kernel."""
    return record.method.split("-")[0] != REFERENCE and place_of(record).get("view") != "full"


def mark_best(rows: Sequence[tuple[Cell, ...]], places: Sequence[Hashable]) -> list[tuple[Cell, ...]]:
    """Mark the best cells of each column, and those no worse; none where all are.

    Args:
        rows: Of a table, the method's name first.
        places: For each row what those that compare share, such as length or age.
    """
    made = [list(row) for row in rows]
    for column in range(1, len(made[0]) if made else 0):
        rivals: dict[Any, dict[str, Sequence[Record]]] = {}
        for number, row in enumerate(made):
            sources = row[column].sources
            if sources and competes(sources[0]) and direction(sources[0].metric):
                rivals.setdefault(places[number], {})[str(number)] = sources
        for own in rivals.values():
            best = leaders(own)
            for name in best if len(best) < len(own) else ():
                made[int(name)][column] = dataclasses.replace(made[int(name)][column], kind="best")
    return [tuple(row) for row in made]
