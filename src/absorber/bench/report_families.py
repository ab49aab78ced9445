"""Tables of the families trained from scratch: what each is and costs, nll by position, recall by distance."""

from collections import defaultdict
from collections.abc import Sequence

from absorber.bench.records import Record
from absorber.bench.report_best import mark_best
from absorber.bench.report_layout import NONE, Cell, Table, over_seeds, plain, seeds_of, span, words

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
    found: dict[tuple[str, int], dict[int, dict[str, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in sorted(records, key=lambda record: record.round):
        found[record.method, record.config["task"]["tokens"]][record.seed][record.metric] = record
    there = [metric for metric in _FACTS if any(metric in own for seeds in found.values() for own in seeds.values())]
    heads = ("family", "seeds", "training tokens", *(_head(metric) for metric in there))
    rows = []
    for (method, tokens), seeds in found.items():
        cells = [_cell([own[metric] for own in seeds.values() if metric in own]) for metric in there]
        rows.append((words(method), seeds_of(seeds), Cell(f"{tokens:,}", is_number=True), *cells))
    return Table("families", heads, mark_best(rows, [tokens for _, tokens in found]))


def _head(metric: str) -> str:
    return {"train_nll": "training nll at the end", "tokens_per_second": "tokens/s in training"}.get(
        metric, plain(metric.removesuffix("_bytes"))
    )


def _cell(records: Sequence[Record]) -> Cell:
    if not records:
        return words(NONE)
    if records[0].metric in ("parameters", "tokens_per_second"):
        return Cell(f"{span(records)[0]:,.0f}", sources=tuple(records), is_number=True)
    return over_seeds(records)


def _along(title: str, records: Sequence[Record]) -> Table:
    """A row per family over its seeds, a column per position or distance."""
    chosen = _spread(sorted({record.context_length for record in records}))
    found: dict[str, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        found[record.method][record.context_length].append(record)
    rows = []
    for method, own in found.items():
        seeds = seeds_of(record.seed for here in own.values() for record in here)
        rows.append((words(method), seeds, *(_cell(own.get(length, [])) for length in chosen)))
    heads = ("family", "seeds", *(f"{length:,}" for length in chosen))
    return Table(title, heads, mark_best(rows, [None] * len(rows)))


def _spread(lengths: Sequence[int]) -> list[int]:
    """A few of the lengths: the first, the last, and some that about double."""
    if len(lengths) <= _MOST_POSITIONS:
        return list(lengths)
    chosen, last = [lengths[0], lengths[1]], lengths[-1]
    while chosen[-1] * 2 < last:
        aim = 2 * chosen[-1]
        chosen.append(min((abs(length - aim), length) for length in lengths)[1])
    return [*chosen, last]
