"""Tables of the tasks that ask about a long context, from records and from nothing else."""

import math
from collections.abc import Sequence

from absorber.bench.answer_gaps import LIKELIHOODS, with_gaps
from absorber.bench.asking import AskingTask
from absorber.bench.figures import Row
from absorber.bench.icl import InContext
from absorber.bench.reasoning import Reasoning
from absorber.bench.records import Record
from absorber.bench.summary import Summary

ASKING_TASKS: dict[str, type[AskingTask]] = {task.name: task for task in (InContext, Reasoning, Summary)}
"""By the name that their records have."""


def answer_rows(records: Sequence[Record], task: str) -> tuple[Row, list[Row]]:
    """One row per data set, length, method, seed and view.

    Args:
        records: Of any tasks.
        task: Whose.

    Returns:
        The heads, and the rows. The task's first figure comes with its 95 % interval, and beside it what the same model
        answers with everything in view, and what guessing would give where that can be said; beside the likelihood of
        the right answer the gap closed, where there are records of `truncation` too.
    """
    units = dict(ASKING_TASKS[task].units)
    main = next(iter(units))
    units |= {f"{metric.removesuffix('nll')}gap_closed": "ratio" for metric in units if metric in LIKELIHOODS}
    runs: dict[tuple[str, str, str, str], dict[tuple[str, str], Record]] = {}
    for record in with_gaps([record for record in records if record.task == task]):
        run = (record.config["task"]["kind"], str(record.context_length), record.method, str(record.seed))
        runs.setdefault(run, {})[record.config["view"], record.metric] = record
    there = {metric for found in runs.values() for _, metric in found}
    shown = {metric: unit for metric, unit in units.items() if metric in there}
    heads: Row = ("data", "tokens", "method", "seed", "view", _words(main), f"{_words(main)} of full", "by chance")
    heads += tuple(_words(metric) for metric in shown if metric != main)
    rows = []
    for run, found in runs.items():
        full = found["full", main]
        chance = full.config.get("chance")
        for view in ("windowed", "contextless"):
            own = found[view, main]
            cells = [f"{_percent(own.value)}{_interval(own)}", _percent(full.value)]
            cells.append("" if chance is None else _percent(chance))
            for metric, unit in shown.items():
                if metric != main:
                    cells.append(_figure(found.get((view, metric)), unit))
            rows.append((*run, view, *cells))
    return heads, rows


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _figure(record: Record | None, unit: str) -> str:
    if record is None:
        return ""
    if not math.isfinite(record.value):
        return "no gap"
    return _percent(record.value) if unit == "ratio" else f"{record.value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(record: Record) -> str:
    low, high = record.ci95_low, record.ci95_high
    return f" [{100 * low:.0f}, {100 * high:.0f}]" if low is not None and high is not None else ""
