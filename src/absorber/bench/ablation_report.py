"""Tables of ablations from their records, with the paper's figures beside ours where there are any."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from absorber.bench.ablation_tables import TABLES, Published
from absorber.bench.figures import Row, gap
from absorber.bench.records import Record, model_label
from absorber.config import AbsorbConfig, StreamConfig

_MOST_PAIRS = 4
_VIEWS = ("windowed", "contextless")

Figures = dict[tuple[str, str | None], Record]
"""A variant's records by metric and kind of drift."""


@dataclass(frozen=True, slots=True)
class Section:
    """One table, measured in one setting."""

    table: str
    """Name of the table."""
    title: str
    """What it asks."""
    setting: str
    """On what it was measured."""
    heads: Row
    """Heads of the columns."""
    rows: list[Row]
    """One per variant, in the order of the table."""
    sources: list[str] = field(default_factory=list)
    """Where the paper's figures are from."""
    contradictions: list[str] = field(default_factory=list)
    """Where our order is not the paper's."""
    figures: dict[str, Figures] = field(default_factory=dict)
    """The records behind the rows, by variant."""


def ablation_sections(records: Sequence[Record]) -> list[Section]:
    """Lay out the records of ablations; of a variant that was measured twice, the later ones.

    Args:
        records: Of any task; those of others are passed over.
    """
    groups: dict[tuple[str, str], dict[str, Figures]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record.task == "ablation":
            table, variant = record.config["table"], record.config["variant"]
            figures = groups[table, _setting(record)][variant]
            figures[record.metric, record.config.get("drift_kind")] = record
    order = [*TABLES, *sorted({table for table, _ in groups} - set(TABLES))]
    return [
        _section(table, setting, variants)
        for (table, setting), variants in sorted(groups.items(), key=lambda group: order.index(group[0][0]))
    ]


def contradictions(published: Published, ours: Mapping[str, Record]) -> list[tuple[str, str]]:
    """Find the pairs of variants that the paper orders otherwise than we do.

    Args:
        published: The paper's figures.
        ours: Our record of one metric, for which higher is better, by variant.

    Returns:
        Pairs, first the one that is better in the paper (in all its metrics) and worse here.
    """
    known = [name for name in published.values if name in ours]
    return [
        (better, worse)
        for better in known
        for worse in known
        if all(a > b for a, b in zip(published.values[better], published.values[worse], strict=True))
        and ours[better].value < ours[worse].value
    ]


def _setting(record: Record) -> str:
    task = record.config["task"]
    return (
        f"{model_label(record.model)}, {record.num_samples} streams of {task['kind']} ({task['split']} half), "
        f"{task['num_tokens']} tokens absorbed, seed {record.seed}, {record.dtype}, {record.device}"
    )


def _section(table: str, setting: str, variants: Mapping[str, Figures]) -> Section:
    known = TABLES.get(table)
    published = known.published if known else ()
    order = [name for name in known.variants if name in variants] if known else []
    order += [name for name in variants if name not in order]
    drift_kinds = sorted({kind for figures in variants.values() for _, kind in figures if kind is not None})
    heads: Row = ("variant", "windowed gap closed", "contextless gap closed", "windowed nll", "contextless nll")
    heads += ("windowed KL", "contextless KL", *(f"drift, {kind}" for kind in drift_kinds))
    metrics = published[0].metrics if published else ()
    heads += tuple(f"paper's {metric}" for metric in metrics)
    rows = []
    for name in order:
        figures = variants[name]
        marked = name != "default" and _is_default(next(iter(figures.values())))
        cells = [f"{name} (default)" if marked else name]
        cells += [gap(figures[f"{view}_gap_closed", None]) for view in _VIEWS]
        cells += [f"{figures[f'{view}_{metric}', None].value:.4f}" for metric in ("nll", "kl") for view in _VIEWS]
        drifts = [figures.get(("drift_nll", kind)) for kind in drift_kinds]
        cells += [f"{drift.value:+.4f}" if drift else "" for drift in drifts]
        theirs = next((group.values[name] for group in published if name in group.values), None)
        cells += [f"{value:g}" for value in theirs] if theirs else [""] * len(metrics)
        rows.append(tuple(cells))
    section = Section(table, known.asks if known else table, setting, heads, rows, figures=dict(variants))
    if published:
        where = f"table {published[0].table}: LLaMA2-7B on {published[0].dataset}, {' and '.join(metrics)}"
        section.sources.append(
            f"The paper's figures are its {where}. Model, data and metric are not ours, so only the order compares."
        )
    for group in published:
        for view in _VIEWS:
            ours = {name: variants[name][f"{view}_gap_closed", None] for name in order}
            section.contradictions.extend(_spelled(group, f"{view} gap closed", ours))
    return section


def _spelled(published: Published, metric: str, ours: Mapping[str, Record]) -> list[str]:
    pairs = contradictions(published, ours)
    if not pairs:
        return []
    shown = [f"{better} > {worse}{_doubt(ours[better], ours[worse])}" for better, worse in pairs[:_MOST_PAIRS]]
    more = [f"and {len(pairs) - _MOST_PAIRS} more pairs"] if len(pairs) > _MOST_PAIRS else []
    return [f"Our {metric} contradicts the paper's table {published.table}, which has {'; '.join([*shown, *more])}."]


def _doubt(better: Record, worse: Record) -> str:
    overlap = (better.ci95_high or better.value) >= (worse.ci95_low or worse.value)
    return " (our intervals overlap)" if overlap else ""


def _is_default(record: Record) -> bool:
    task, stream = record.config["task"], StreamConfig()
    window = (task["context_tokens"], task["sync_tokens"])
    default_window = (stream.context_tokens, stream.sync_tokens)
    return bool(record.config["method"] == AbsorbConfig().to_dict() and window == default_window)
