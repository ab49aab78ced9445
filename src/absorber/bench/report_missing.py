"""What was not run: the tables of methods and tasks, less what the records have."""

from collections.abc import Sequence

from absorber.bench.ablation_tables import TABLES
from absorber.bench.methods import METHODS, OUTSIDE
from absorber.bench.records import Record
from absorber.bench.report_layout import NOT_RUN, Cell, Table, words
from absorber.bench.report_paper import dataset_of
from absorber.bench.retention import DRIFT_KINDS

TASKS = {
    "retention": "how well the text that follows a stream is predicted, round by round, and what that costs elsewhere",
    "recall": "whether facts that left the window are still known, by age and wording",
    "icl": "labels learned from examples that left the window (many-shot classification)",
    "reasoning": "questions over paragraphs that left the window",
    "summary": "summaries of dialogues that left the window",
    "latency": "milliseconds per token after a context, with and without the cost of absorbing, and peak memory",
    "cost": "tokens absorbed per second, against what the device could do",
    "ablation": "one choice of the method changed at a time",
}
"""What each task asks, by its name, in the order of the report."""

DATA: dict[str, tuple[str, ...]] = {
    "retention": DRIFT_KINDS,
    "recall": DRIFT_KINDS,
    "icl": ("ag_news", "trec", "banking77"),
    "reasoning": ("musique",),
    "summary": ("samsum", "squality"),
}
"""What each task can be run on, by its name."""

_PROTOCOL = ("mamba", "rwkv", "snapkv", "kvzip")
UNBUILT = tuple(name for name in _PROTOCOL if name not in METHODS and name not in OUTSIDE)
"""Methods that the protocol names and that are not built here."""

_FEWEST_SEEDS = 3


def matrix(records: Sequence[Record]) -> Table:
    """Methods against tasks: how many records, or that there are none. Ablations have variants, not methods."""
    own = [record for record in records if record.task != "ablation"]
    tasks = dict.fromkeys([*(task for task in TASKS if task != "ablation"), *(record.task for record in own)])
    methods = dict.fromkeys([*METHODS, *OUTSIDE, *(record.method for record in own), *UNBUILT])
    rows = []
    for method in methods:
        is_built = method not in UNBUILT or any(record.method == method for record in own)
        cells = [words(method if is_built else f"{method} (not built)")]
        for task in tasks:
            count = sum((record.task, record.method) == (task, method) for record in own)
            cells.append(Cell(f"{count} records", is_number=True) if count else NOT_RUN)
        rows.append(tuple(cells))
    return Table("Methods and tasks", ("method", *tasks), rows)


def gaps(records: Sequence[Record]) -> list[str]:
    """Sentences on what else is missing."""
    found = [f"Task {task} ({asks}): not run." for task, asks in TASKS.items() if not _of(records, task)]
    for task, kinds in DATA.items():
        own = _of(records, task)
        there = {dataset_of(record) for record in own}
        absent = [kind for kind in kinds if kind not in there]
        if own and absent:
            found.append(f"Task {task} on {', '.join(absent)}: not run.")
    for task in DATA:
        seeds = {
            method: {record.seed for record in records if (record.task, record.method) == (task, method)}
            for method in dict.fromkeys(record.method for record in _of(records, task))
        }
        few = [f"{method} ({len(own)})" for method, own in seeds.items() if len(own) < _FEWEST_SEEDS]
        if few:
            found.append(f"Task {task} with {_FEWEST_SEEDS} seeds or more: not run; seeds there are: {', '.join(few)}.")
    ablated = {(record.config["table"], record.config["variant"]) for record in _of(records, "ablation")}
    for name, table in TABLES.items():
        missing = [variant for variant in table.variants if (name, variant) not in ablated]
        if ablated and missing:
            some = "" if len(missing) == len(table.variants) else f", {', '.join(missing)}"
            found.append(f"Ablation {name}{some}: not run.")
    return found


def _of(records: Sequence[Record], task: str) -> list[Record]:
    return [record for record in records if record.task == task]
