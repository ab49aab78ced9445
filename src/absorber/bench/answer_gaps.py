"""Gap closed of what is asked, from records and from nothing else.

Where a small model answers hardly better than by chance even with everything in view, how likely the right answer is
still tells methods apart. What nothing in place of the text gives is in the records of `truncation`, and what
everything in view gives in those of the method itself, both stream by stream; so no run has to measure it again.
"""

import dataclasses
from collections.abc import Sequence

from absorber.bench.records import Record
from absorber.bench.task import as_gap

WITHOUT = "truncation"
"""The method that has nothing in place of the text that left the window."""

LIKELIHOODS = ("label_nll", "answer_nll", "summary_nll")
"""Metrics of the asking tasks that say how likely the right answer is."""


def with_gaps(records: Sequence[Record]) -> list[Record]:
    """Add the gap closed of each likelihood to records.

    Args:
        records: Of any tasks.

    Returns:
        The records, and after them those of the gaps, such as `label_gap_closed`: windowed and contextless, of every
        method for which `truncation` was measured on the same texts, with a 95 % interval over streams, which are drawn
        alike for all three. Not a number where full attention is no better than no text.
    """
    asked = [record for record in records if record.metric in LIKELIHOODS and "view" in record.config]
    of_method = {(_texts(record), record.method, _settings(record), record.config["view"]): record for record in asked}
    without = {(_texts(record), record.config["view"]): record for record in asked if record.method == WITHOUT}
    gaps = []
    for (texts, method, settings, view), record in of_method.items():
        none, full = without.get((texts, view)), of_method.get((texts, method, settings, "full"))
        if view == "full" or none is None or full is None:
            continue
        if not len(none.per_sample) == len(record.per_sample) == len(full.per_sample) > 0:
            continue
        named = dataclasses.replace(record, metric=f"{record.metric.removesuffix('nll')}gap_closed", unit="ratio")
        gaps.append(as_gap(named, none.per_sample, record.per_sample, full.per_sample))
    return [*records, *gaps]


def _texts(record: Record) -> tuple[object, ...]:
    """What records share whose streams and questions are the same, asked of the same model."""
    task = repr(sorted(record.config["task"].items()))
    place = (record.context_length, record.seed, record.model, record.device, record.dtype)
    return (record.task, task, record.metric, *place)


def _settings(record: Record) -> str:
    return repr(record.config.get("method"))
