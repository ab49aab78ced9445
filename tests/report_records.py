"""Records as runs would write them, to make reports of."""

import dataclasses
import math

from absorber.bench.ablation import Ablation
from absorber.bench.records import Record
from absorber.config import AbsorbConfig
from absorber.models import DEFAULT_MODEL

EVIL = "<script>alert('$x_1$')</script>"


def made(task, method, metric, value, *, unit="ratio", tokens=1024, at=0, seed=0, settings=None, own=None, **places):
    """A record as a run would write it."""
    return Record(
        task=task,
        method=method,
        model=DEFAULT_MODEL,
        metric=metric,
        value=value,
        unit=unit,
        num_samples=4,
        ci95_low=value - 0.0123,
        ci95_high=value + 0.0123,
        context_length=tokens,
        round=at,
        seed=seed,
        config={"task": settings or {"kind": "books", "num_rounds": 3}, "method": own or {}, **places},
        per_sample=[value] * 4,
        device="Device Q",
        dtype="float32",
        seconds=1.0,
        versions={},
        git="abc1234",
    )


def retention(method, gaps, *, seed=0, seconds=1.0):
    """A run of three rounds; `gaps` are its contextless ones."""
    found = []
    for number, gap in enumerate(gaps, start=1):
        place = {"at": number, "tokens": 1024 + 512 * number, "seed": seed}
        found.append(made("retention", method, "windowed_nll", 3.5 - gap / 10, unit="nats", **place))
        found.append(made("retention", method, "contextless_gap_closed", gap, **place))
        found.append(made("retention", method, "windowed_gap_closed", gap * 2, **place))
        for kind in ("books", "code"):
            found.append(made("retention", method, "drift_nll", gap / 50, unit="nats", drift_kind=kind, **place))
    object.__setattr__(found[0], "seconds", seconds)
    return [_timed(record, seconds) for record in found]


def _timed(record, seconds):
    object.__setattr__(record, "seconds", seconds)
    return record


def timed(method, metric, value, unit, tokens, batch, **more):
    """A record of a task of speed, whose settings are one flat table."""
    record = made("latency", method, metric, value, unit=unit, tokens=tokens)
    config = {"batch": batch, "weights": "random", "context_tokens": 512, "length": tokens, **more}
    return dataclasses.replace(record, config=config, ci95_low=None, ci95_high=None)


def everything():
    """Records of every kind of task, of two that nobody has heard of too."""
    found = retention("truncation", [0, 0, 0], seconds=0.001)
    found += retention("absorber", [0.2173, 0.4219, 0.6317]) + retention("absorber", [0.1, 0.2, 0.3391], seed=1)
    for method in ("truncation", "absorber"):
        for age in (1, 3):
            for wording in ("text", "other"):
                for view in ("contextless", "windowed", "full"):
                    place = {"age": age, "wording": wording, "view": view, "tokens": 2560, "at": 3}
                    found.append(made("recall", method, "recall_exact", 0.1257 * age, fact_kind="all", **place))
                    found.append(made("recall", method, "recall_exact", 0.3031, fact_kind="name", **place))
                    found.append(made("recall", method, "recall_nll", 9.87, unit="nats", fact_kind="all", **place))
    for tokens in (2048, 4096):
        settings = {"kind": "ag_news", "num_rounds": tokens // 512}
        for method in ("truncation", EVIL):
            place = {"tokens": tokens, "at": tokens // 512, "settings": settings, "chance": 0.25}
            found.append(made("icl", method, "accuracy", 0.5457 + tokens / 1e6, view="full", **place))
            for view in ("windowed", "contextless"):
                found.append(made("icl", method, "accuracy", 0.4457 + tokens / 1e6, view=view, **place))
                found.append(made("icl", method, "agreement", 0.7111, view=view, **place))
        for batch in (1, 8):
            found.append(timed("full", "ms_per_token", 12.3451 * batch, "ms", tokens, batch))
            found.append(timed("full", "peak_memory_bytes", 2.5e9, "bytes", tokens, batch))
        for way in ("never", "always"):
            more = {"checkpointing": way}
            found.append(timed("absorber-round", "round_ms", 512.25, "ms", tokens, 1, **more))
            found.append(timed("absorber-round", "checkpointing", float(way == "always"), "", tokens, 1, **more))
    found.append(timed("full", "out_of_memory", 1.0, "", 16384, 1))
    found.append(made("divination", "tea-leaves", "omens", math.nan, unit="omens"))
    settings = Ablation().config()
    for variant, value in {"hidden": 0.111, "KL": 0.222}.items():
        place = {"settings": settings, "own": AbsorbConfig().to_dict(), "table": "objective", "variant": variant}
        for metric in ("gap_closed", "nll", "kl"):
            for view in ("windowed", "contextless"):
                found.append(made("ablation", f"objective/{variant}", f"{view}_{metric}", value, at=10, **place))
    return found


def cells_of(table, **wanted):
    """The texts of the rows that have these cells."""
    places = {name: table.heads.index(name) for name in wanted}
    rows = [row for row in table.rows if all(row[places[name]].text == text for name, text in wanted.items())]
    return [dict(zip(table.heads, (cell.text for cell in row), strict=True)) for row in rows]
