"""Figures of a report: how a metric goes with rounds, with the length of the context, or with age."""

import dataclasses
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from absorber.bench.methods import METHODS
from absorber.bench.records import Record, mean_interval
from absorber.bench.report_layout import NONE, Gallery, Panel, place_of, plain
from absorber.bench.report_tables import ASIDE, BY_ROUND, PARTING, label, labels, spell_value, totals_only

# Words and axes are drawn in this color and then take that of the text around them, light or dark.
_INK = "#010203"
_COLORS = ("#e4572e", "#3f7fbf", "#4f9d69", "#a06cd5", "#c98a00", "#1f9e9e", "#d4568b", "#5d6fd6", "#8c6d46", "#6b8e23")
_MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))
# The colors of the methods that are in most reports, so that they are the same in all figures.
_FIRST = ("absorber", "truncation", "temp-lora", "absorber-paper", "dcd", "full", "sink", *METHODS)
_CHOSEN_COLORS = {name: index for index, name in enumerate(dict.fromkeys(_FIRST))}
_WHOLE, _CHANCE = "everything in view", "by chance"
_WITH, _COUNTED = "_with_absorption", ", with absorption"
"""What ends a metric that counts absorbing too, and the name of its line, which is drawn beside that of the metric
without: where it crosses full attention's, absorbing has paid."""
_AXES = {"ratio": "%", "bytes": "GB"}
_REFERENCES = {"drift": 0.0, "gap": 0.0, "saved": 0.0}


@dataclass(frozen=True, slots=True)
class Point:
    """A place of a line."""

    x: float
    """Rounds, tokens, age or cost."""
    y: float
    """Mean over the records there."""
    low: float
    """Lower end of their intervals."""
    high: float
    """Upper end of the same."""


Lines = dict[str, list[Point]]
"""Points by name of the method, from left to right."""


def style(name: str, names: Sequence[str]) -> tuple[str, str, str]:
    """Color, matplotlib's mark and the same mark as text, of a line."""
    if name in (_WHOLE, _CHANCE):
        return "#888888", "None", "━" if name == _WHOLE else "┄"
    if name.endswith(_COUNTED):
        color, mark, shown = style(name.removesuffix(_COUNTED), names)
        return color, mark, f"┄{shown}"
    if name in _CHOSEN_COLORS:
        index = _CHOSEN_COLORS[name]
        color = _COLORS[index % len(_COLORS)]
    else:  # what those with a color of their own leave over
        taken = {_COLORS[_CHOSEN_COLORS[other] % len(_COLORS)] for other in names if other in _CHOSEN_COLORS}
        free = [color for color in _COLORS if color not in taken] or list(_COLORS)
        place = [other for other in names if other not in _CHOSEN_COLORS].index(name)
        index, color = len(_CHOSEN_COLORS) + place, free[place % len(free)]
    mark, shown = _MARKS[index % len(_MARKS)]
    return color, mark, shown


def curves(records: Sequence[Record]) -> list[Gallery]:
    """Draw the records of one group over everything that takes several values."""
    shown, found = _worth_drawing(totals_only(records)), []
    by_round = records[0].task in BY_ROUND
    ages = [name for name in dict.fromkeys(name for record in shown for name in place_of(record)) if name == "age"]
    if records[0].task == "families":
        trained = [record for record in records if record.metric == "train_nll"]
        measured = [record for record in records if record.metric in ("nll", "recall_exact")]
        found.append(_gallery("Training", trained, "round", "optimizer steps"))
        found.append(_gallery("Beyond the training length", measured, "context_length", "tokens read, or in between"))
    elif ages:
        found.append(_gallery("By rounds since it was absorbed", _last(shown), "age", "rounds since absorbed"))
    elif by_round:
        saved = _saved(records)
        # The ratio swings where full attention saves next to nothing; what is saved does not.
        rest = [record for record in shown if not saved or record.metric != "windowed_gap_closed"]
        found.append(_gallery("Round by round", [*saved, *_gaps_first(rest)], "round", "rounds"))
    else:
        found.append(_gallery("By length of the context", shown, "context_length", "tokens"))
    return [gallery for gallery in found if gallery.panels]


def _worth_drawing(records: Sequence[Record]) -> list[Record]:
    """Without losses, where there are figures made from them that say more."""
    drawn = [record for record in records if record.metric not in ("out_of_memory", *ASIDE)]
    return [record for record in drawn if not _is_loss(record.metric)] or drawn


def _is_loss(metric: str) -> bool:
    return (metric.endswith(("_nll", "_kl", "_share")) and "drift" not in metric) or metric.startswith("gate")


def _gaps_first(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: "gap" not in record.metric)


def _last(records: Iterable[Record]) -> list[Record]:
    """Of each figure that after the last round."""
    found = {(record.key, record.metric): record for record in sorted(records, key=lambda record: record.round)}
    return list(found.values())


def _saved(records: Sequence[Record]) -> list[Record]:
    """What is saved with the window in view: nll without memory (truncation, the same streams) less that with it.

    The gap closed is a ratio to what full attention saves there, which may be next to nothing.
    """
    none = {
        (record.round, record.seed): record.per_sample
        for record in records
        if (record.metric, record.method) == ("windowed_nll", "truncation")
    }
    found = []
    for record in records:
        without = none.get((record.round, record.seed), [])
        if record.metric == "windowed_nll" and without and len(without) == len(record.per_sample):
            saved = [before - after for before, after in zip(without, record.per_sample, strict=True)]
            value, low, high = mean_interval(saved)
            changes: dict[str, Any] = {"value": value, "ci95_low": low, "ci95_high": high, "per_sample": saved}
            found.append(dataclasses.replace(record, metric="saved with the window in view", **changes))
    return found


def _gallery(title: str, records: Sequence[Record], along: str, axis: str) -> Gallery:
    names = labels(records)
    panels: dict[tuple[Any, ...], dict[str, dict[float, list[Record]]]] = {}
    for record in records:
        x = place_of(record)[along] if along == "age" else getattr(record, along)
        is_whole = place_of(record).get("view") == "full"
        for panel in _panels(record, along, records):
            name = _WHOLE if is_whole else label(record, names)
            name += _COUNTED if record.metric.endswith(_WITH) else ""
            panels.setdefault(panel, {}).setdefault(name, defaultdict(list))[float(x)].append(record)
            chance = place_of(record).get("chance")
            if record.metric == "accuracy" and isinstance(chance, int | float):
                guess = dataclasses.replace(record, value=chance, ci95_low=None, ci95_high=None)
                panels[panel].setdefault(_CHANCE, defaultdict(list))[float(x)].append(guess)
    drawn, used = [], dict[str, None]()
    everyone = list(
        dict.fromkeys([*names.values(), *(f"{name}{_COUNTED}" for name in names.values()), _WHOLE, _CHANCE])
    )
    for (metric, *where), lines in panels.items():
        found = {name: _points(at) for name, at in lines.items()}
        if max(map(len, found.values())) < 2:
            continue
        unit = next(iter(next(iter(lines.values())).values()))[0].unit
        heading = ", ".join([plain(metric), *where])
        drawn.append(Panel(heading, draw(found, everyone, heading, axis, unit=_AXES.get(unit, unit))))
        used |= dict.fromkeys(found)
    return Gallery(title, legend(used, everyone), drawn)


def _panels(record: Record, along: str, records: Sequence[Record]) -> list[tuple[str, ...]]:
    """In which drawings a record is: what is known with everything in view is in those of all other views."""
    places = {name: value for name, value in place_of(record).items() if name not in (along, "chance", *PARTING)}
    views = {place_of(other).get("view") for other in records if other.metric == record.metric} - {"full"}
    if places.get("view") != "full" or not views:
        views = {places.get("view")}
    found = []
    for view in sorted(views, key=str):
        here = places | ({"view": view} if "view" in places else {})
        said = {name: value for name, value in here.items() if value not in ("all", NONE)}
        found.append((record.metric.removesuffix(_WITH), *(_said(name, value) for name, value in said.items())))
    return found


def _said(name: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{plain(name)} {spell_value(value)}"


def legend(used: Iterable[str], everyone: Sequence[str]) -> list[tuple[str, str, str]]:
    """Name, color and mark of each line."""
    found = []
    for name in used:
        color, _, shown = style(name, everyone)
        found.append((name, color, shown))
    return found


def _points(at: Mapping[float, Sequence[Record]]) -> list[Point]:
    """Means over seeds, and their intervals taken together."""
    found = []
    for x, records in sorted(at.items()):
        scale = {"ratio": 100, "bytes": 1e-9}.get(records[0].unit, 1)
        finite = [record for record in records if record.value == record.value]
        if finite:
            mean = sum(record.value for record in finite) / len(finite)
            low = min(record.value if record.ci95_low is None else record.ci95_low for record in finite)
            high = max(record.value if record.ci95_high is None else record.ci95_high for record in finite)
            found.append(Point(x, scale * mean, scale * low, scale * high))
    return found


def draw(lines: Lines, everyone: Sequence[str], heading: str, axis: str, *, unit: str) -> str:
    """Draw lines with their bands; returns an <svg> element."""
    figure, panel = blank()
    for name, points in lines.items():
        color, mark, _ = style(name, everyone)
        x, line = [point.x for point in points], ":" if name == _CHANCE else "--" if name.endswith(_COUNTED) else "-"
        panel.plot(
            x, [point.y for point in points], marker=mark, markersize=4, linewidth=1.6, color=color, linestyle=line
        )
        panel.fill_between(
            x, [point.low for point in points], [point.high for point in points], alpha=0.1, color=color, linewidth=0
        )
    places = sorted({point.x for points in lines.values() for point in points})
    if len(places) > 1 and places[0] > 0 and places[-1] / places[0] >= 8:
        panel.set_xscale("log")
        ticks = [digit * 10**power for power in range(7) for digit in (1, 3)]
        inside = [tick for tick in ticks if places[0] <= tick <= places[-1]]
        panel.set_xticks(places if len(places) <= 6 else inside, minor=False)
        panel.set_xticks([], minor=True)
        panel.xaxis.set_major_formatter("{x:g}")
    if any(word in heading for word in _REFERENCES):
        panel.axhline(0, color="#888888", linewidth=0.8)
    ends = [end for points in lines.values() for point in points for end in (point.low, point.high)]
    if unit == "%" and "gap" not in heading and min(ends) >= 0 and max(ends) <= 100:
        panel.set_ylim(-3, 103)
    if unit not in ("%", "nats") and min(ends) >= 0:
        panel.set_ylim(0, 1.08 * max(ends) or 1)
    panel.set(xlabel=axis, ylabel=unit)
    return as_svg(figure, heading)


def blank(size: tuple[float, float] = (4.6, 3.0)) -> tuple[Any, Any]:
    """An empty figure, and its panel."""
    from matplotlib.figure import Figure

    with _looks():
        figure = Figure(figsize=size, layout="constrained")
        panel = figure.subplots()
        panel.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        return figure, panel


def as_svg(figure: Any, heading: str) -> str:
    """Write a figure as an <svg> element that needs nothing else."""
    file = io.StringIO()
    nothing: dict[Literal["Date", "Creator", "Format", "Type"], None] = dict.fromkeys(
        ("Date", "Creator", "Format", "Type")
    )
    with _looks(heading):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return text.replace("<svg ", '<svg role="img" ', 1)


def _looks(heading: str = "") -> "AbstractContextManager[None]":
    import matplotlib

    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    options = {"svg.fonttype": "none", "svg.hashsalt": heading, "text.parse_math": False, "font.size": 9}
    return matplotlib.rc_context(colors | options)
