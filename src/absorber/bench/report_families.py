"""Tables of the families trained from scratch: what each is and costs, nll by position, recall by distance."""

from collections import defaultdict
from collections.abc import Sequence

from absorber.bench.records import Record
from absorber.bench.report_layout import NONE, Cell, Table, number, over_seeds, plain, words

_FACTS = ("parameters", "train_nll", "tokens_per_second", "train_seconds", "peak_memory_bytes")
_MOST_POSITIONS = 7
_NOTE = (
    "Trained from scratch on the same tokens in the same order, with equal parameters, tokenizer and optimizer, in "
    "rows of {rows} tokens. Truncation and the methods with a memory read with the trained transformer."
)


def family_tables(records: Sequence[Record]) -> list[Table]:
    """Lay out records of one or more runs; nothing without records."""
    if not records:
        return []
    rows = ", ".join(sorted({str(record.config["task"]["row_tokens"]) for record in records}))
    made = [_facts([record for record in records if record.metric in _FACTS])]
    for metric, title in (("nll", "nll after so many tokens"), ("recall_exact", "pairs recalled after so many tokens")):
        own = [record for record in records if record.metric == metric]
        made += [_along(title, own)] if own else []
    made[-1].notes.append(_NOTE.format(rows=rows))
    return made


def _facts(records: Sequence[Record]) -> Table:
    found = {(record.method, record.seed): dict[str, Record]() for record in records}
    for record in sorted(records, key=lambda record: record.round):
        found[record.method, record.seed][record.metric] = record
    there = [metric for metric in _FACTS if any(metric in own for own in found.values())]
    heads = ("family", "seed", "training tokens", *(_head(metric) for metric in there))
    rows = []
    for (method, seed), own in found.items():
        tokens = next(iter(own.values())).config["task"]["tokens"]
        cells = [_cell(own.get(metric)) for metric in there]
        rows.append((words(method), _plain_number(seed), _plain_number(tokens), *cells))
    return Table("families", heads, rows)


def _head(metric: str) -> str:
    return {"train_nll": "training nll at the end", "tokens_per_second": "tokens/s in training"}.get(
        metric, plain(metric.removesuffix("_bytes"))
    )


def _cell(record: Record | None) -> Cell:
    if record is None:
        return words(NONE)
    if record.metric in ("parameters", "tokens_per_second"):
        return Cell(f"{record.value:,.0f}", sources=(record,), is_number=True)
    return number(record)


def _plain_number(value: int) -> Cell:
    return Cell(f"{value:,}", is_number=True)


def _along(title: str, records: Sequence[Record]) -> Table:
    """A row per family and seed, a column per position or distance."""
    chosen = _spread(sorted({record.context_length for record in records}))
    found: dict[str, dict[int, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        found[record.method][record.seed][record.context_length] = record
    rows = []
    for method, seeds in found.items():
        for seed, own in sorted(seeds.items()):
            cells = [number(own[length]) if length in own else words(NONE) for length in chosen]
            rows.append((words(method), _plain_number(seed), *cells))
        if len(seeds) > 1:
            shared = [[own[length] for own in seeds.values() if length in own] for length in chosen]
            means = [over_seeds(some) if some else words(NONE) for some in shared]
            rows.append((words(method), Cell(f"mean of {len(seeds)}", is_number=True, kind="mean"), *means))
    return Table(title, ("family", "seed", *(f"{length:,}" for length in chosen)), rows)


def _spread(lengths: Sequence[int]) -> list[int]:
    """A few of the lengths: the first, the last, and some that about double."""
    if len(lengths) <= _MOST_POSITIONS:
        return list(lengths)
    chosen, last = [lengths[0], lengths[1]], lengths[-1]
    while chosen[-1] * 2 < last:
        aim = 2 * chosen[-1]
        chosen.append(min((abs(length - aim), length) for length in lengths)[1])
    return [*chosen, last]
