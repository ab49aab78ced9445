"""Figures and tables from records, and from nothing else."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absorber.bench.records import Record, mean_interval, model_label
from absorber.errors import BenchmarkError

Row = tuple[str, ...]


class Run(NamedTuple):
    """What the records of one curve share."""

    kind: str
    """Of the streams."""
    num_rounds: int
    """Of the whole run."""
    method: str
    """Name."""
    seed: int
    """Of streams and method."""


def retention_rows(records: Sequence[Record]) -> tuple[Row, list[Row]]:
    """One row per kind of stream, length, method and seed, after the last round.

    Returns:
        The heads, and the rows. The worst round is that with the largest windowed nll compared with no memory
        (`truncation` on the same streams), and how much larger, in nats; below zero the memory never did harm.
    """
    drift_kinds = sorted({record.config["drift_kind"] for record in records if "drift_kind" in record.config})
    heads: Row = ("stream", "rounds", "method", "seed", "windowed nll", "windowed gap closed", "contextless gap closed")
    heads += ("worst round, nats", *(f"drift, {kind}" for kind in drift_kinds))
    rows, runs = [], _runs(records)
    for run, own in runs.items():
        last = max(record.round for record in own)
        found = {(record.metric, record.config.get("drift_kind")): record for record in own if record.round == last}
        cells = [run.kind, str(last), run.method, str(run.seed), f"{found['windowed_nll', None].value:.4f}"]
        gaps = [found.get((f"{view}_gap_closed", None)) for view in ("windowed", "contextless")]
        cells += [gap(record) if record else "" for record in gaps]
        cells.append(_worst_round(own, runs.get(run._replace(method="truncation"), ())))
        drifts = [found.get(("drift_nll", other)) for other in drift_kinds]
        cells += [f"{record.value:+.4f}" if record else "" for record in drifts]
        rows.append(tuple(cells))
    return heads, rows


def _worst_round(own: Sequence[Record], without: Sequence[Record]) -> str:
    none = {record.round: record.value for record in without if record.metric == "windowed_nll"}
    harm = [
        (record.value - none[record.round], record.round)
        for record in own
        if record.metric == "windowed_nll" and record.round in none
    ]
    return f"{max(harm)[0]:+.4f} (round {max(harm)[1]})" if harm else "no truncation"


def draw_retention(records: Sequence[Record], path: Path, *, kind: str = "books") -> None:
    """Draw a run round by round, one line per method: what the memory saves, the gap that it closes, and its drift.

    Of runs of several lengths the longest are drawn; streams of several seeds are taken together. What is saved is the
    nll with no memory (`truncation` on the same streams) less the nll with it, both with the window: its gap closed
    is a ratio to what full attention saves there, which may be next to nothing.

    Raises:
        BenchmarkError: If there are no records of this kind.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    saved, closed, drift = figure.subplots(1, 3)
    lines = _lines(records, kind, "retention")
    none = {
        (record.round, record.seed): record.per_sample
        for record in lines.get("truncation", ())
        if record.metric == "windowed_nll"
    }
    for method, own in lines.items():
        if method == "truncation":  # is the line at 0
            continue
        gaps: dict[int, list[Record]] = defaultdict(list)
        savings: dict[int, list[float]] = defaultdict(list)
        drifts: dict[int, list[float]] = defaultdict(list)
        for record in own:
            if record.metric == "contextless_gap_closed":
                gaps[record.round].append(record)
            elif record.metric == "windowed_nll" and (record.round, record.seed) in none:
                pairs = zip(none[record.round, record.seed], record.per_sample, strict=True)
                savings[record.round] += [without - with_memory for without, with_memory in pairs]
            elif record.metric == "drift_nll" and record.config["drift_kind"] == kind:
                drifts[record.round] += record.per_sample
        _draw(closed, gaps, label=method)
        for panel, samples in ((saved, savings), (drift, drifts)):
            _draw_means(panel, samples, label=method)
    saved.set(title="saved with the window in view, nats", xlabel="rounds")
    closed.set(title="gap closed without the window, %", xlabel="rounds")
    drift.set(title=f"drift on other {kind}, nats", xlabel="rounds")
    for panel in (saved, closed, drift):
        panel.axhline(0, color="#999999", linewidth=0.8)
    closed.axhline(100, color="#999999", linewidth=0.8, linestyle="--")
    figure.legend(*closed.get_legend_handles_labels(), loc="outside right center", frameon=False)
    _title(figure, next(iter(lines.values()))[0], f"streams of {kind} a seed; bands are 95 % intervals")
    figure.savefig(path, dpi=130)


def _draw(panel: Any, found: Mapping[int, Sequence[Record]], **style: Any) -> None:
    """A line through the means of the records at each place, and a band over their intervals."""
    places = sorted(found)
    means = [100 * sum(record.value for record in found[at]) / len(found[at]) for at in places]
    drawn = panel.plot(places, means, "o-", markersize=3, **style)
    low = [100 * min(r.value if r.ci95_low is None else r.ci95_low for r in found[at]) for at in places]
    high = [100 * max(r.value if r.ci95_high is None else r.ci95_high for r in found[at]) for at in places]
    panel.fill_between(places, low, high, alpha=0.12, color=drawn[0].get_color(), linewidth=0)


def _draw_means(panel: Any, samples: Mapping[int, Sequence[float]], **style: Any) -> None:
    """A line through the means of the samples at each place, and a band over their intervals."""
    places = sorted(samples)
    means, low, high = zip(*(mean_interval(samples[at]) for at in places), strict=True) if places else ((), (), ())
    drawn = panel.plot(places, means, "o-", markersize=3, **style)
    panel.fill_between(places, low, high, alpha=0.12, color=drawn[0].get_color(), linewidth=0)


def recall_rows(records: Sequence[Record]) -> tuple[Row, list[Row]]:
    """One row per kind of stream, method and age, after the last round in which that age was asked for.

    Returns:
        The heads, and the rows. Exact answers in the wording of the text and in another, given the memory alone, as a
        share of what full attention answers with the context in view; then given the window as well.
    """
    heads: Row = ("stream", "rounds", "method", "seed", "age", "contextless", "of full")
    heads += ("other wording", "of full, other wording", "windowed", "full", "full, other wording")
    rows = []
    for run, own in _runs(records).items():
        for age in sorted({record.config["age"] for record in own}):
            last = max(record.round for record in own if record.config["age"] == age)
            found = {
                (record.metric, record.config["view"], record.config["wording"]): record
                for record in own
                if (record.round, record.config["age"], record.config["fact_kind"]) == (last, age, "all")
            }
            cells = [run.kind, str(last), run.method, str(run.seed), str(age)]
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
    lines = _lines(records, kind, "recall")
    for wording, panel in panels.items():
        for method, own in lines.items():
            _draw(panel, _ages(own, wording, "contextless"), label=method)
        _draw(panel, _ages(next(iter(lines.values())), wording, "full"), label="text in view", color="#999999")
        panel.set(title=f"{wordings[wording]}: exact answers, %", xlabel="rounds since it was absorbed", xscale="log")
    panels["text"].legend(frameon=False, fontsize=8)
    _title(figure, next(iter(lines.values()))[0], f"streams of {kind}, facts asked for without the window")
    figure.savefig(path, dpi=130)


def _ages(records: Sequence[Record], wording: str, view: str) -> dict[int, list[Record]]:
    """The exact answers by age, of each seed those after the last round in which that age was asked for."""
    found: dict[int, dict[int, Record]] = defaultdict(dict)
    for record in sorted(records, key=lambda record: record.round):
        config = record.config
        if (record.metric, config["fact_kind"], config["wording"], config["view"]) == (
            "recall_exact",
            "all",
            wording,
            view,
        ):
            found[config["age"]][record.seed] = record
    return {age: list(of_seed.values()) for age, of_seed in found.items()}


def _title(figure: Any, record: Record, what: str) -> None:
    figure.suptitle(f"{model_label(record.model)}, {record.num_samples} {what}", fontsize=10)


def _percent(record: Record) -> str:
    return f"{100 * record.value:.0f} %"


def _runs(records: Sequence[Record]) -> dict[Run, list[Record]]:
    groups: dict[Run, list[Record]] = defaultdict(list)
    for record in records:
        task = record.config["task"]
        groups[Run(task["kind"], task["num_rounds"], record.method, record.seed)].append(record)
    return dict(groups)


def _lines(records: Sequence[Record], kind: str, task: str) -> dict[str, list[Record]]:
    """The records of the longest runs over streams of a kind, all seeds together, by method."""
    runs = {run: own for run, own in _runs(records).items() if run.kind == kind}
    if not runs:
        raise BenchmarkError(f"there are no records of streams of {kind}; run absorber bench {task} first")
    longest = max(run.num_rounds for run in runs)
    lines: dict[str, list[Record]] = defaultdict(list)
    for run, own in runs.items():
        if run.num_rounds == longest:
            lines[run.method] += own
    return dict(lines)


def gap(record: Record) -> str:
    """Write a gap closed, with its interval, as people read it."""
    low, high = record.ci95_low, record.ci95_high
    interval = f" [{100 * low:.0f}, {100 * high:.0f}]" if low is not None and high is not None else ""
    return f"{100 * record.value:.0f} %{interval}" if record.value == record.value else "no gap"
