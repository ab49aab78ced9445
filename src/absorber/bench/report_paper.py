"""The paper's tables (arXiv 2604.20915) beside our records, and an explicit `not run` where there are none.

The paper's model is LLaMA2-7B on one RTX 4080 SUPER; ours is what the records say. So orders compare, numbers do not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from absorber.bench.ablation_report import Section as Ablated
from absorber.bench.ablation_report import ablation_sections
from absorber.bench.ablation_tables import TABLES
from absorber.bench.records import Record, model_label
from absorber.bench.report_best import mark_best
from absorber.bench.report_layout import NOT_RUN, Cell, Table, over_seeds, paper, place_of, plain, seeds_of, words
from absorber.bench.report_tables import label, labels

Range = tuple[int, int]
"""Lengths in thousands (1024) of tokens, from and to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Printed:
    """One of the paper's tables by length of the context."""

    number: int
    """Of the table."""
    says: str
    """What it is about, and in what unit."""
    ranges: tuple[Range, ...]
    """Of the columns."""
    values: Mapping[str, tuple[float | None, ...]]
    """By our name of the method; None is out of memory."""
    task: str
    """Our task of the same protocol."""
    metrics: tuple[str, ...]
    """Ours that come nearest."""
    dataset: str | None = None
    """What it is measured on."""


PRINTED = (
    Printed(
        number=1,
        says="latency, ms per token, 128 tokens after a prefix; reading the prefix is not in it",
        ranges=((1, 2), (2, 4), (4, 8), (8, 16)),
        values={
            "full": (19.23, 39.07, 76.32, None),
            "mamba": (4.14, 4.52, 3.88, 3.69),
            "ttt": (20.33, 20.39, 19.16, 19.31),
            "absorber": (29.73, 30.22, 30.38, 29.98),
        },
        task="latency",
        metrics=("ms_per_token", "ms_per_token_with_absorption"),
    ),
    Printed(
        number=2,
        says="AG News, many-shot accuracy in percent",
        ranges=((1, 2), (2, 4), (4, 8)),
        values={
            "full": (54.2, 49.8, 43.7),
            "mamba": (28.7, 28.5, 26.2),
            "ttt": (30.6, 30.2, 29.7),
            "absorber": (37.9, 38.2, 35.5),
        },
        task="icl",
        metrics=("accuracy",),
        dataset="ag_news",
    ),
    Printed(
        number=3,
        says="MuSiQue, accuracy in percent",
        ranges=((8, 12), (12, 16), (16, 20)),
        values={
            "full": (None, None, None),
            "truncation": (19.2, 18.5, 17.9),
            "mamba": (31.5, 30.4, 27.6),
            "ttt": (34.3, 30.9, 28.4),
            "absorber": (33.8, 31.6, 29.5),
        },
        task="reasoning",
        metrics=("exact_match", "f1"),
        dataset="musique",
    ),
    Printed(
        number=4,
        says="SAMSum, BLEURT",
        ranges=((2, 4), (4, 8), (8, 16)),
        values={
            "full": (0.433, 0.428, None),
            "mamba": (0.428, 0.413, 0.395),
            "ttt": (0.415, 0.406, 0.391),
            "absorber": (0.423, 0.417, 0.408),
        },
        task="summary",
        metrics=("rouge_l", "f1"),
        dataset="samsum",
    ),
)


def printed_tables(records: Sequence[Record]) -> list[Table]:
    """Tables 1 to 4 with our rows under the paper's."""
    return [_beside(table, [record for record in records if _belongs(table, record)]) for table in PRINTED]


def _belongs(table: Printed, record: Record) -> bool:
    return (
        record.task == table.task
        and record.metric in (*table.metrics, "out_of_memory")
        and place_of(record).get("batch", 1) == 1
        and place_of(record).get("view") != "contextless"  # the paper's methods have their window
        and (table.dataset is None or dataset_of(record) == table.dataset)
    )


def dataset_of(record: Record) -> str | None:
    """The name of the data set that a record says it is of: its kind of text, unless it says more."""
    task = record.config.get("task", {})
    found = place_of(record).get("dataset") or task.get("dataset") or task.get("kind")
    return str(found) if found else None


def _method(record: Record) -> str:
    """Whose the number is: what a task asks with everything in view is full attention's, whoever is measured."""
    return "full" if place_of(record).get("view") == "full" else record.method


def _beside(table: Printed, own: Sequence[Record]) -> Table:
    names = labels(own)
    rows: list[tuple[Cell, ...]] = []
    measured: dict[tuple[str, ...], list[Record]] = {}
    longest = 1024 * table.ranges[-1][1]
    own = [record for record in own if 1024 * table.ranges[0][0] <= record.context_length <= longest]
    for record in own:
        method = _method(record)
        name = label(record, names) if method == record.method else method
        metric = table.metrics[0] if record.metric == "out_of_memory" else record.metric
        measured.setdefault((method, name, metric, model_label(record.model), record.device), []).append(record)
    for method, values in table.values.items():
        rows.append((words(method), words("paper"), *(paper(value) for value in values)))
        ours = [key for key in measured if key[0] == method]
        rows += [_ours(key, measured[key], table) for key in ours]
        if own and not ours:
            rows.append((words(method), words("ours"), *[NOT_RUN] * len(table.ranges)))
    rows += [_ours(key, found, table) for key, found in measured.items() if key[0] not in table.values]
    if not own:
        rows.append((words("all"), words("ours"), *[NOT_RUN] * len(table.ranges)))
    notes = [f"Ours are of the task {table.task}: {' and '.join(map(plain, table.metrics))}."]
    heads = ("method", "whose", *(f"{low}–{high}k tokens" for low, high in table.ranges))
    return Table(f"Table {table.number}: {table.says}", heads, rows, notes)


def _ours(key: tuple[str, ...], found: Sequence[Record], table: Printed) -> tuple[Cell, ...]:
    _, name, metric, model, device = key
    cells = []
    for low, high in table.ranges:
        # A length of exactly 1k is in the first range, any other end in the range below it.
        inside = [record for record in found if 1024 * low - (low == 1) < record.context_length <= 1024 * high]
        longest = max((record.context_length for record in inside), default=0)
        own = {record.seed: record for record in inside if record.context_length == longest}
        cells.append(over_seeds(list(own.values())) if own else NOT_RUN)
    seeds = seeds_of(record.seed for record in found).text
    return (words(name), words(f"ours, {plain(metric)}; {model}, {device}, seeds {seeds}"), *cells)


def ablated_tables(records: Sequence[Record]) -> Iterator[Table]:
    """Our ablations with the paper's figures beside them, then those of the paper's tables that were not run."""
    for section in ablation_sections(records):
        rows = [_traced(row, section) for row in section.rows]
        title, notes = f"{section.table}: {section.title}", [section.setting, *section.sources, *section.contradictions]
        # The paper's figures stand where they are seen: after the gaps closed.
        theirs = [at for at, head in enumerate(section.heads) if head.startswith("paper's")]
        order = [0, 1, 2, *theirs, *(at for at in range(3, len(section.heads)) if at not in theirs)]
        heads = tuple(section.heads[at] for at in order)
        rows = [tuple(row[at] for at in order) for row in mark_best(rows, [None] * len(rows))]
        yield Table(title, heads, rows, notes)
    done = {record.config["table"] for record in records if record.task == "ablation"}
    for name, table in TABLES.items():
        for published in () if name in done else table.published[:1]:
            heads = ("variant", "ours", *(f"paper's {metric}" for metric in published.metrics))
            rows = [(words(variant), NOT_RUN, *map(paper, values)) for variant, values in published.values.items()]
            note = f"The paper's data: {published.dataset}. To run ours: absorber bench ablation {name}"
            yield Table(f"Table {published.table}, {name}: {table.asks}", heads, rows, [note])


def _traced(row: Sequence[str], section: Ablated) -> tuple[Cell, ...]:
    figures = section.figures[row[0].removesuffix(" (default)")]
    cells = [words(row[0])]
    for head, text in zip(section.heads[1:], row[1:], strict=True):
        metric, _, kind = head.partition(", ")
        name = "drift_nll" if kind else metric.lower().replace(" ", "_")
        record = figures.get((name, kind or None))
        is_paper = head.startswith("paper's")
        sources = () if record is None or is_paper else (record,)
        cells.append(Cell(text, sources=sources, is_number=True, kind="paper" if is_paper else ""))
    return tuple(cells)
