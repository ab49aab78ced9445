"""What a method costs against what it keeps: seconds of reading and absorbing a token, and the gap closed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from absorber.bench.records import Record
from absorber.bench.report_best import REFERENCE
from absorber.bench.report_curves import as_svg, blank, legend, style
from absorber.bench.report_layout import Cell, Gallery, Panel, Table, over_seeds, seeds_of, words
from absorber.bench.report_tables import Group, label, labels, last_only

_VIEWS = ("windowed", "contextless")


@dataclass(frozen=True, slots=True)
class Bargain:
    """A method, its price and what it is worth."""

    name: str
    """Of the method."""
    sources: tuple[tuple[Record, ...], ...]
    """The gap closed in each view, once for each seed."""

    @property
    def cost(self) -> float:
        """Milliseconds for a token of a stream, in the mean over seeds; streams of one batch share its time."""
        own = self.sources[0]
        return sum(1000 * record.seconds / (record.context_length * record.num_samples) for record in own) / len(own)

    def worth(self, view: int) -> float:
        """The gap closed in a view, in the mean over seeds."""
        return sum(record.value for record in self.sources[view]) / len(self.sources[view])

    def is_beaten(self, others: Sequence["Bargain"], view: int) -> bool:
        """Whether another one is worth as much at a lower price, or more at no higher price."""
        own = (-self.cost, self.worth(view))
        prices = [(-other.cost, other.worth(view)) for other in others]
        return any(price != own and price[0] >= own[0] and price[1] >= own[1] for price in prices)


def bargains(group: Group) -> list[Bargain]:
    """Find the methods of a group of `retention` that have a price and a gap closed in both views.

    Full attention has none: it reads while it is scored, which is not in the price.
    """
    names, found = labels(group.records), dict[str, dict[str, list[Record]]]()
    for record in sorted(last_only(group.records), key=lambda record: record.seed):
        for view in _VIEWS:
            is_there = record.metric == f"{view}_gap_closed" and record.seconds and math.isfinite(record.value)
            if is_there and record.method != REFERENCE:
                found.setdefault(label(record, names), {}).setdefault(view, []).append(record)
    return [
        Bargain(name, tuple(tuple(worth[view]) for view in _VIEWS))
        for name, worth in found.items()
        if len(worth) == len(_VIEWS)
    ]


def cost_table(group: Group) -> Table | None:
    """Costs beside gaps closed, and who is on the frontier; none if there is nothing to compare."""
    found = bargains(group)
    if len(found) < 2:
        return None
    rows = []
    for one in sorted(found, key=lambda one: one.cost):
        on = [view for place, view in enumerate(_VIEWS) if not one.is_beaten(found, place)]
        price = Cell(f"{one.cost:.3f}" if one.cost >= 0.001 else "< 0.001", sources=one.sources[0], is_number=True)
        gaps = [over_seeds(own) for own in one.sources]
        seeds = seeds_of(record.seed for record in one.sources[0])
        rows.append((words(one.name), seeds, price, *gaps, words(", ".join(on))))
    heads = ("method", "seeds", "ms per token", "windowed gap closed", "contextless gap closed", "on the frontier")
    notes = [
        "Reading and absorbing, divided by all tokens of the batch; scoring is not in it. On the frontier (dashed): no "
        "other method here keeps as much for less. Full attention, at 100 %, is left out: it reads while it is scored. "
        "Compare within this table only."
    ]
    return Table(group.title, heads, rows, notes)


def cost_figure(group: Group) -> Gallery | None:
    """The same, drawn; the frontier is dashed."""
    found = bargains(group)
    if len(found) < 2:
        return None
    names = [one.name for one in found]
    panels = []
    for place, view in enumerate(_VIEWS):
        figure, panel = blank()
        for one in found:
            color, mark, _ = style(one.name, names)
            panel.plot([one.cost], [100 * one.worth(place)], marker=mark, markersize=8, color=color)
        best = sorted((one.cost, 100 * one.worth(place)) for one in found if not one.is_beaten(found, place))
        panel.plot(
            *zip(*best, strict=True), linestyle="--", drawstyle="steps-post", linewidth=1, color="#888888", zorder=0
        )
        panel.axhline(0, color="#888888", linewidth=0.8)
        panel.set(xlabel="ms per token", ylabel="gap closed, %")
        heading = f"{view} gap closed against cost"
        panels.append(Panel(heading, as_svg(figure, heading)))
    return Gallery(group.title, legend(names, names), panels)
