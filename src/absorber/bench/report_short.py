"""The first table of a report: who is the best at what, and how that stands to full attention."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from absorber.bench.records import Record, model_label
from absorber.bench.report_best import REFERENCE, competes, leaders
from absorber.bench.report_layout import NONE, Cell, Table, over_seeds, place_of, plain, words
from absorber.bench.report_missing import TASKS
from absorber.bench.report_tables import PARTING, Group, groups, label, labels, last_only, totals_only

_MOST_METRICS = 2
# What says most, first; of each group of records the first two that are there.
_TELLING = (
    "contextless_gap_closed",
    "windowed_gap_closed",
    "recall_exact",
    "label_gap_closed",
    "answer_gap_closed",
    "summary_gap_closed",
    "accuracy",
    "f1",
    "rouge_l",
    "ms_per_token_with_absorption",
    "ms_per_token",
    "absorbed_tokens_per_second",
    "nll",
)
_NOTE = (
    "At the longest stream, age or context and the smallest batch of each setting. Methods whose 95 % interval "
    "overlaps the best one's are not told apart from it, which is cautious, as all read the same streams. A gap closed "
    "is 0 % without the text (windowed: with the window alone) and 100 % for full attention. Where one method alone "
    "was measured, see the sections below."
)


def in_short(records: Sequence[Record]) -> Table:
    """Lay out the best of each setting and metric in which several methods were measured."""
    heads = ("task and metric", "best", "its value", "not told apart from it", "worse", "full attention", "setting")
    rows = []
    there = {record.task for record in records}
    for task in [task for task in dict.fromkeys([*TASKS, *(record.task for record in records)]) if task in there]:
        for group in groups([record for record in records if record.task == task]):
            rows += list(_rows(task, group))
    labelled = [model_label(model) for model in sorted({record.model for record in records})]
    origin = [f"{name}." for name in labelled if "(" in name]
    return Table("", heads, rows, [_NOTE, *origin] if rows else [])


def _rows(task: str, group: Group) -> Iterator[tuple[Cell, ...]]:
    names = labels(group.records)
    found: dict[str, dict[tuple[str, ...], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in totals_only(last_only(group.records)):
        found[record.metric][_said(record)].append(record)
    for metric in [metric for metric in _TELLING if metric in found][:_MOST_METRICS]:
        for said, own in found[metric].items():
            longest = _outermost([record for record in own if competes(record)])
            rivals: dict[str, list[Record]] = defaultdict(list)
            for record in longest:
                rivals[label(record, names)].append(record)
            if len(rivals) < 2:
                continue
            best, *near = leaders(rivals) or ["", *rivals]
            if not best:
                continue
            whole = [record for record in group.records if _is_whole(record, longest[0], said)]
            setting = f"{longest[0].model.rsplit('/', 1)[-1]}; {group.title or longest[0].device}"
            yield (
                words(f"{task}: {', '.join([plain(metric), *said])}"),
                Cell(best, kind="best"),
                over_seeds(rivals[best]),
                words(", ".join(near) or NONE),
                words(", ".join(name for name in rivals if name not in (best, *near)) or NONE),
                over_seeds(whole) if whole else words(NONE),
                words(f"{setting}; {longest[0].context_length:,} tokens"),
            )


def _said(record: Record) -> tuple[str, ...]:
    """The places of a record that are words, such as a wording or a view."""
    found = place_of(record)
    return tuple(
        value
        for name, value in found.items()
        if isinstance(value, str) and value not in ("all", NONE) and name not in PARTING
    )


def _outermost(records: Sequence[Record]) -> list[Record]:
    """Those of the longest context that several methods have, the largest age and the smallest batch."""
    left = list(records)
    lengths = sorted({record.context_length for record in left}, reverse=True)
    for length in lengths:
        here = [record for record in left if record.context_length == length]
        if len({record.method for record in here}) > 1:
            left = here
            break
    for name, choose in (("age", max), ("batch", min)):
        values = [place_of(record)[name] for record in left if name in place_of(record)]
        left = [record for record in left if not values or place_of(record).get(name) == choose(values)]
    return left


def _is_whole(record: Record, like: Record, said: tuple[str, ...]) -> bool:
    """Whether a record is full attention's at the same place."""
    if (record.metric, record.context_length) != (like.metric, like.context_length):
        return False
    place, other = place_of(record), place_of(like)
    same: dict[str, Any] = {name: value for name, value in other.items() if name in ("age", "batch", "wording")}
    if any(place.get(name) != value for name, value in same.items()):
        return False
    if record.method == REFERENCE:  # not what it is with an older kernel
        return _said(record) == said
    return place.get("view") == "full" and record.method == like.method and place.get("fact_kind", "all") == "all"
