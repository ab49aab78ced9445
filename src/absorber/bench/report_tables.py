"""Tables by method, for any task: what differs between records decides what is a table, a row and a column."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from absorber.bench.records import Record, model_label
from absorber.bench.report_best import mark_best
from absorber.bench.report_layout import (
    NONE,
    Cell,
    Table,
    over_seeds,
    place_of,
    plain,
    seeds_of,
    settings_of,
    words,
)

BY_ROUND = ("retention", "recall", "ablation")
"""Tasks that measure again and again as a stream goes by; of the others, each length is a measurement of its own."""

_MOST_COLUMNS = 8
_FULL = "out_of_memory"
ASIDE = ("recorded", "checkpointing")
"""Metrics that say how a method was run; they are in the list of all records alone."""
# Units that the names of metrics, or the numbers themselves, say already.
_SAID_UNITS = ("", "ratio", "nats", "bytes", "ms", "s", "tokens/s")
# They say of a setting what the number of samples, or the number of tokens, says of a record.
_SAID_ELSEWHERE = ("num_streams",)
_SAID_BY_LENGTH = ("num_rounds",)

Key = tuple[tuple[str, str], ...]
"""Names and values."""


@dataclass(frozen=True, slots=True)
class Group:
    """Records of a task that were measured on the same texts, so that they compare."""

    title: str
    """What is particular to it among the task's groups; empty if there is but one."""
    caption: str
    """The rest of its setting."""
    records: list[Record]
    """All of them."""


def groups(records: Sequence[Record]) -> list[Group]:
    """Part the records of one task by setting, model and device.

    A setting that some records do not know, as they are older, and that is the same in all others, parts none.
    """
    keys = [_setting(record) for record in records]
    values: dict[str, set[str]] = defaultdict(set)
    for name, value in {pair for key in keys for pair in key}:
        values[name].add(value)
    known = {name for name in values if all(name in dict(key) for key in set(keys))}
    parting = {name for name, own in values.items() if name in known or len(own) > 1}
    found: dict[Key, list[Record]] = defaultdict(list)
    for key, record in zip(keys, records, strict=True):
        found[tuple((name, value) for name, value in key if name in parting)].append(record)
    everywhere = set.intersection(*(set(key) for key in found)) if found else set()
    made = []
    for key, own in found.items():
        parts: dict[bool, list[str]] = {True: [], False: []}
        for name, value in key:
            parts[(name, value) in everywhere].append(value if name in _SPEAKING else f"{plain(name)} {value}")
        commits = ", ".join(sorted({record.git for record in own}))
        made.append(Group(" · ".join(parts[False]), " · ".join([*parts[True], f"commit {commits}"]), own))
    return sorted(made, key=lambda group: group.title)


# Places that say how a method was run.
_ROWS = ("checkpointing",)
PARTING = ("dataset",)
"""Places that part measurements as settings do."""

# What is in the settings of a method and follows from the seed, or says how it was computed.
_NO_DIFFERENCE = ("data", "cuda_graphs", "checkpointing")

# Values that need no name beside them.
_SPEAKING = ("model", "device", "dtype", "kind", "dataset")


def _setting(record: Record) -> Key:
    values = settings_of(record)
    left_out = _SAID_ELSEWHERE + (() if record.task in BY_ROUND else _SAID_BY_LENGTH)
    values = {name: value for name, value in values.items() if name not in left_out}
    place = {"model": model_label(record.model), "device": record.device, "dtype": record.dtype}
    place |= {name: value for name, value in place_of(record).items() if name in PARTING}
    return tuple((name, spell_value(value)) for name, value in (place | values).items())


def spell_value(value: Any) -> str:
    """A value of a setting as text."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def labels(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """Names of methods for people, by name and settings: with what differs where one name has several settings.

    What some do not know, as they are older, and is the same in all others, is no difference.
    """
    known: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        known[record.method][_settings(record)] = _telling(record.config.get("method"))
    found = {}
    for method, configs in known.items():
        names = sorted({name for config in configs.values() for name in config})
        differ = [
            name for name in names if len({repr(config[name]) for config in configs.values() if name in config}) > 1
        ]
        for settings, config in configs.items():
            extra = ", ".join(f"{plain(name)} {spell_value(config.get(name, 'unset'))}" for name in differ)
            found[method, settings] = f"{method} ({extra})" if extra else method
    return found


def _telling(config: Any) -> dict[str, Any]:
    """The settings of a method that may make a difference to what it finds."""
    values: dict[str, Any] = config if isinstance(config, dict) else {}
    without_study = values.get("study", "off") == "off"
    return {
        name: value
        for name, value in values.items()
        if name not in _NO_DIFFERENCE and not (without_study and name.startswith("study_"))
    }


def label(record: Record, known: dict[tuple[str, str], str]) -> str:
    """The name of a record's method, from `labels`."""
    return known[record.method, _settings(record)]


def _settings(record: Record) -> str:
    return json.dumps(record.config.get("method"), sort_keys=True, default=str)


def last_only(records: Iterable[Record]) -> list[Record]:
    """Of figures measured round by round the last; of others all. What was measured twice counts once, the later."""
    found: dict[tuple[Any, ...], Record] = {}
    for record in sorted(records, key=lambda record: record.round):
        length = None if record.task in BY_ROUND else record.context_length
        found[record.key, record.metric, length] = record
    return list(found.values())


def totals_only(records: Sequence[Record]) -> list[Record]:
    """Leave out the parts of figures that are also there for `all`."""
    with_total = {
        (record.metric, name) for record in records for name, value in place_of(record).items() if value == "all"
    }
    return [
        record
        for record in records
        if all(value == "all" or (record.metric, name) not in with_total for name, value in place_of(record).items())
    ]


def tables(records: Sequence[Record]) -> list[Table]:
    """Lay out the records of one group: a row per method, length and age over all seeds, a column per metric and place.

    Metrics that have the same places share tables, as long as these do not grow too wide.
    """
    shown, names = totals_only(last_only(records)), labels(records)
    shown = [record for record in shown if record.metric not in ASIDE]
    by_places: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in shown:
        by_places[tuple(_places(record))].append(record)
    made = []
    for own in by_places.values():
        columns = {_column(record, [*_numeric(own), *_ROWS]) for record in own}
        if len(columns) <= _MOST_COLUMNS or not any(place for _, place in columns):
            metrics = {record.metric for record in own}
            alone = len(metrics) == 1 and len(by_places) > 1
            made.append(_table(plain(own[0].metric) if alone else "", own, names))
            continue
        for metric in dict.fromkeys(record.metric for record in own):
            of_metric = [record for record in own if record.metric == metric]
            made.append(_table(plain(metric), of_metric, names))
    return made


def _places(record: Record) -> dict[str, Any]:
    return {name: value for name, value in place_of(record).items() if name not in PARTING}


def _numeric(records: Sequence[Record]) -> list[str]:
    """The places that are numbers, such as age or chance."""
    names = dict.fromkeys(name for record in records for name in _places(record))
    return [name for name in names if all(isinstance(_places(record).get(name), int | float) for record in records)]


def _row_names(records: Sequence[Record]) -> list[str]:
    """Places that tell rows apart and not columns: numbers, and others as long as there are too many columns."""
    spoken = [name for name in _ROWS if any(_places(record).get(name, NONE) != NONE for record in records)]
    found = [*_numeric(records), *spoken]
    for name in reversed(_places(records[0])):
        if len({_column(record, found) for record in records}) > _MOST_COLUMNS and name not in found:
            found.append(name)
    return found


def _column(record: Record, row_names: Sequence[str]) -> tuple[str, Key]:
    places = [(name, spell_value(value)) for name, value in _places(record).items() if name not in row_names]
    return record.metric, tuple((name, value) for name, value in places if value != NONE)


def _table(title: str, records: Sequence[Record], names: dict[tuple[str, str], str]) -> Table:
    row_names = _row_names(records)
    by_length = records[0].task not in BY_ROUND
    units = {_column(record, row_names): record.unit for record in records if record.metric != _FULL}
    columns = list(units)
    if len(columns) > _MOST_COLUMNS:  # those that most rows have come first
        counts = Counter(_column(record, row_names) for record in records)
        columns.sort(key=lambda column: -counts[column])
    rows: dict[tuple[Any, ...], dict[int, dict[Any, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        where = tuple(place_of(record)[name] for name in row_names)
        key = (label(record, names), *([record.context_length] if by_length else []), *where)
        rows[key][record.seed][_column(record, row_names)] = record
    heads = ("method", *(["tokens"] if by_length else []), *map(plain, row_names), "seeds", "samples a seed")
    heads += tuple(_head(column, units[column], titled=bool(title)) for column in columns)
    lines, methods = [], list(dict.fromkeys(key[0] for key in rows))
    keys = sorted(rows, key=lambda key: (methods.index(key[0]), *map(_order, key[1:])))
    for key in keys:
        place = [
            words(str(key[0])),
            *(Cell(spell_value(part), is_number=not isinstance(part, str)) for part in key[1:]),
        ]
        lines.append((*place, *_row(rows[key], columns)))
    return Table(title, heads, mark_best(lines, [key[1:] for key in keys]))


def _order(value: Any) -> tuple[float, str]:
    return (float(value), "") if isinstance(value, int | float) else (0.0, str(value))


def _head(column: tuple[str, Key], unit: str, *, titled: bool) -> str:
    metric, place = column
    said = [value for _, value in place if value != "all"]
    more = [] if unit in _SAID_UNITS else [unit]
    return ", ".join(said) if titled and said else ", ".join([plain(metric), *said, *more])


def _row(seeds: dict[int, dict[Any, Record]], columns: Sequence[Any]) -> list[Cell]:
    """The cells of a method, over its seeds."""
    found = [record for own in seeds.values() for record in own.values()]
    samples = sorted({record.num_samples for record in found})
    cells = [seeds_of(seeds), Cell(", ".join(map(str, samples)), is_number=True)]
    full = [record for record in found if record.metric == _FULL]
    for place, column in enumerate(columns):
        own = [records[column] for records in seeds.values() if column in records]
        own = own or (full if place == 0 else [])
        cells.append(over_seeds(own) if own else words(""))
    return cells
