"""Tables of the tasks that ask about a long context, from records and from nothing else."""

from collections.abc import Sequence

from absorber.bench.asking import AskingTask
from absorber.bench.figures import Row
from absorber.bench.icl import InContext
from absorber.bench.reasoning import Reasoning
from absorber.bench.records import Record
from absorber.bench.summary import Summary

ASKING_TASKS: dict[str, type[AskingTask]] = {task.name: task for task in (InContext, Reasoning, Summary)}
"""By the name that their records have."""


def answer_rows(records: Sequence[Record], task: str) -> tuple[Row, list[Row]]:
    """One row per data set, length, method, seed and view, the same model with everything in view among the views.

    Args:
        records: Of any tasks.
        task: Whose.

    Returns:
        The heads, and the rows. The task's first figure comes with its 95 % interval.
    """
    units = ASKING_TASKS[task].units
    found: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in records:
        if record.task == task:
            place = (str(record.config["task"]["kind"]), str(record.context_length), record.method, str(record.seed))
            found.setdefault((*place, record.config["view"]), {})[record.metric] = record
    by_chance = any("chance" in record.config for own in found.values() for record in own.values())
    heads: Row = ("data", "tokens", "method", "seed", "view", *(metric.replace("_", " ") for metric in units))
    rows = []
    for run, own in found.items():
        cells = [_cell(own.get(metric), unit) for metric, unit in units.items()]
        main = next(iter(own.values()))
        if (first := own.get(next(iter(units)))) is not None:
            cells[0] += _interval(first)
        rows.append((*run, *cells, *([_percent(main.config["chance"])] if by_chance else [])))
    return (*heads, *(["by chance"] if by_chance else [])), rows


def _cell(record: Record | None, unit: str) -> str:
    if record is None:
        return ""
    return _percent(record.value) if unit == "ratio" else f"{record.value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(record: Record) -> str:
    low, high = record.ci95_low, record.ci95_high
    return f" [{100 * low:.0f}, {100 * high:.0f}]" if low is not None and high is not None else ""
