"""What was not run: the tables of methods and tasks, less what the records have."""

from collections.abc import Sequence

from absorber.bench.ablation_tables import TABLES
from absorber.bench.methods import METHODS, OUTSIDE
from absorber.bench.records import Record
from absorber.bench.report_layout import NONE, NOT_RUN, Cell, Table, words
from absorber.bench.report_paper import PRINTED, dataset_of
from absorber.bench.retention import DRIFT_KINDS

TASKS = {
    "retention": "how well the text that follows a stream is predicted, round by round, and what that costs elsewhere",
    "recall": "whether facts that left the window are still known, by age and wording",
    "icl": "labels learned from examples that left the window (many-shot classification)",
    "reasoning": "questions over paragraphs that left the window",
    "summary": "summaries of dialogues that left the window",
    "eval": "tasks of lm-evaluation-harness, with a memory and without: what it knows, and what it costs elsewhere",
    "latency": "milliseconds per token after a context, with and without the cost of absorbing, and peak memory",
    "cost": "tokens absorbed per second, against what the device could do",
    "families": "a transformer, a Mamba, an RNN and a TTT model of equal size, trained from scratch on the same text",
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

FROM_SCRATCH = {"mamba": "mamba", "rwkv": "rnn"}
"""Methods that the protocol names and for which no pretrained weights of the backbone's size are had, and the families
that stand in for them, trained from scratch."""

_FEWEST_SEEDS = 3
_NOTHING = Cell(NONE, is_number=True)


def matrix(records: Sequence[Record]) -> Table:
    """Methods against tasks: how many records, or that there are none. Ablations have variants, not methods.

    A method that reads streams could be run on every task of `DATA`, and those of the paper's tables on theirs; other
    names are the task's own.
    """
    own = [record for record in records if record.task != "ablation"]
    tasks = dict.fromkeys([*(task for task in TASKS if task != "ablation"), *(record.task for record in own)])
    methods = dict.fromkeys([*METHODS, *OUTSIDE, *(record.method for record in own), *FROM_SCRATCH])
    readers = {*METHODS, *OUTSIDE, *FROM_SCRATCH, *(record.method for record in own if record.task in DATA)}
    rows = []
    for method in methods:
        cells = [words(method)]
        for task in tasks:
            count = sum((record.task, record.method) == (task, method) for record in own)
            is_printed = any(method in table.values for table in PRINTED if table.task == task)
            could = is_printed or (task in DATA and method in readers)
            cells.append(Cell(f"{count} records", is_number=True) if count else NOT_RUN if could else _NOTHING)
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
    found.append(_stand_ins(records))
    ablated = {(record.config["table"], record.config["variant"]) for record in _of(records, "ablation")}
    for name, table in TABLES.items():
        missing = [variant for variant in table.variants if (name, variant) not in ablated]
        if ablated and missing:
            some = "" if len(missing) == len(table.variants) else f", {', '.join(missing)}"
            found.append(f"Ablation {name}{some}: not run.")
    return found


def _stand_ins(records: Sequence[Record]) -> str:
    """Say what compares models of other families with a transformer."""
    trained = {record.method for record in _of(records, "families")}
    there = [f"{family} for {method}" for method, family in FROM_SCRATCH.items() if family in trained]
    missing = [f"{method} (by {family})" for method, family in FROM_SCRATCH.items() if family not in trained]
    parts = [f"families trained from scratch stand in, {', '.join(there)}"] if there else []
    parts += [f"not run from scratch either: {', '.join(missing)}"] if missing else []
    return (
        f"{', '.join(FROM_SCRATCH)} on the tasks with the pretrained backbone: not run, for no weights of comparable "
        f"size were had; {'; '.join(parts)}."
    )


def _of(records: Sequence[Record], task: str) -> list[Record]:
    return [record for record in records if record.task == task]
