"""Figures and tables from records, and from nothing else."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absorber.bench.records import Record
from absorber.errors import BenchmarkError
from absorber.models import DEFAULT_MODEL

Row = tuple[str, ...]


def retention_rows(records: Sequence[Record]) -> tuple[Row, list[Row]]:
    """One row per method and kind of stream, after the last round that all of a kind have.

    Returns:
        The heads, and the rows.
    """
    drift_kinds = sorted({record.config["drift_kind"] for record in records if "drift_kind" in record.config})
    heads: Row = ("stream", "method", "rounds", "windowed nll", "windowed gap closed", "contextless gap closed")
    heads += tuple(f"drift, {kind}" for kind in drift_kinds)
    rows = []
    for (kind, method), own in _by_method(records).items():
        last = max(record.round for record in own)
        found = {(record.metric, record.config.get("drift_kind")): record for record in own if record.round == last}
        cells = [kind, method, str(last), f"{found['windowed_nll', None].value:.4f}"]
        cells += [gap(found[f"{view}_gap_closed", None]) for view in ("windowed", "contextless")]
        cells += [f"{found['drift_nll', other].value:+.4f}" for other in drift_kinds]
        rows.append(tuple(cells))
    return heads, rows


def draw_retention(records: Sequence[Record], path: Path, *, kind: str = "books") -> None:
    """Draw the gap closed round by round, windowed and contextless, with its interval, one line per method.

    Raises:
        BenchmarkError: If there are no records of this kind.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    views = ("windowed", "contextless")
    panels = dict(zip(views, figure.subplots(1, 2), strict=True))
    lines = {method: own for (of, method), own in _by_method(records).items() if of == kind}
    if not lines:
        raise BenchmarkError(f"there are no records of streams of {kind}; run absorber bench retention first")
    for method, own in lines.items():
        for view, panel in panels.items():
            found = sorted((r for r in own if r.metric == f"{view}_gap_closed"), key=lambda record: record.round)
            rounds = [record.round for record in found]
            drawn = panel.plot(rounds, [100 * record.value for record in found], "o-", markersize=3, label=method)
            low, high = ([100 * (getattr(r, end) or r.value) for r in found] for end in ("ci95_low", "ci95_high"))
            panel.fill_between(rounds, low, high, alpha=0.12, color=drawn[0].get_color(), linewidth=0)
    for view, panel in panels.items():
        panel.axhline(0, color="#999999", linewidth=0.8)
        panel.axhline(100, color="#999999", linewidth=0.8, linestyle="--")
        panel.set(title=f"{view}: gap closed, %", xlabel="rounds")
    panels["windowed"].legend(frameon=False, fontsize=8)
    _title(figure, next(iter(lines.values()))[0], f"streams of {kind}; 100 % is full attention")
    figure.savefig(path, dpi=130)


def recall_rows(records: Sequence[Record]) -> tuple[Row, list[Row]]:
    """One row per kind of stream, method and age, after the last round in which that age was asked for.

    Returns:
        The heads, and the rows. Exact answers in the wording of the text and in another, given the memory alone, as a
        share of what full attention answers with the context in view; then given the window as well.
    """
    heads: Row = ("stream", "method", "rounds", "age", "contextless", "of full", "other wording", "of full")
    heads = (*heads, "windowed", "full", "full, other wording")
    rows = []
    for (kind, method), own in _by_method(records).items():
        for age in sorted({record.config["age"] for record in own}):
            last = max(record.round for record in own if record.config["age"] == age)
            found = {
                (record.metric, record.config["view"], record.config["wording"]): record
                for record in own
                if (record.round, record.config["age"], record.config["fact_kind"]) == (last, age, "all")
            }
            cells = [kind, method, str(last), str(age)]
            for wording in ("text", "other"):
                cells.append(_percent(found["recall_exact", "contextless", wording]))
                cells.append(gap(found["recall_share", "contextless", wording]))
            cells.append(_percent(found["recall_exact", "windowed", "text"]))
            cells += [_percent(found["recall_exact", "full", wording]) for wording in ("text", "other")]
            rows.append(tuple(cells))
    return heads, rows


def draw_recall(records: Sequence[Record], path: Path, *, kind: str = "books") -> None:
    """Draw contextless exact answers by age, with their interval, one line per method; one panel per wording.

    Raises:
        BenchmarkError: If there are no records of this kind.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    wordings = {"text": "in the wording of the text", "other": "in other words"}
    panels = dict(zip(wordings, figure.subplots(1, 2, sharey=True), strict=True))
    lines = {method: own for (of, method), own in _by_method(records).items() if of == kind}
    if not lines:
        raise BenchmarkError(f"there are no records of streams of {kind}; run absorber bench recall first")
    for wording, panel in panels.items():
        for method, own in lines.items():
            _draw_ages(panel, _ages(own, wording, "contextless"), label=method)
        _draw_ages(panel, _ages(next(iter(lines.values())), wording, "full"), label="text in view", color="#999999")
        panel.set(title=f"{wordings[wording]}: exact answers, %", xlabel="rounds since it was absorbed", xscale="log")
    panels["text"].legend(frameon=False, fontsize=8)
    _title(figure, next(iter(lines.values()))[0], f"streams of {kind}, facts asked for without the window")
    figure.savefig(path, dpi=130)


def _ages(records: Sequence[Record], wording: str, view: str) -> list[Record]:
    """The exact answers by age, each after the last round in which that age was asked for."""
    found = {
        record.config["age"]: record
        for record in sorted(records, key=lambda record: record.round)
        if (record.metric, record.config["fact_kind"]) == ("recall_exact", "all")
        and (record.config["wording"], record.config["view"]) == (wording, view)
    }
    return [found[age] for age in sorted(found)]


def _draw_ages(panel: Any, found: Sequence[Record], **style: Any) -> None:
    ages = [record.config["age"] for record in found]
    drawn = panel.plot(ages, [100 * record.value for record in found], "o-", markersize=3, **style)
    low, high = ([100 * (getattr(r, end) or 0.0) for r in found] for end in ("ci95_low", "ci95_high"))
    panel.fill_between(ages, low, high, alpha=0.12, color=drawn[0].get_color(), linewidth=0)


def _title(figure: Any, record: Record, what: str) -> None:
    origin = " (weights 4-bit in origin)" if record.model == DEFAULT_MODEL else ""
    figure.suptitle(f"{record.model}{origin}, {record.num_samples} {what}", fontsize=10)


def _percent(record: Record) -> str:
    return f"{100 * record.value:.0f} %"


def _by_method(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.config["task"]["kind"], record.method].append(record)
    return dict(groups)


def gap(record: Record) -> str:
    """Write a gap closed, with its interval, as people read it."""
    low, high = record.ci95_low, record.ci95_high
    interval = f" [{100 * low:.0f}, {100 * high:.0f}]" if low is not None and high is not None else ""
    return f"{100 * record.value:.0f} %{interval}" if record.value == record.value else "no gap"
