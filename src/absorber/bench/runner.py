"""Running a benchmark: every method once, resumable, one failed method never ending the run."""

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from absorber.backbone import base_name, inspect, sink_token
from absorber.bench.methods import METHODS, Method
from absorber.bench.records import Record, append_records, environment, gap_interval, mean_interval, read_records
from absorber.bench.retention import Checkpoint, Retention, measure, prepare
from absorber.errors import AbsorberError

# Without these no gap can be computed.
_REFERENCE = "truncation"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Whom a run tells how it goes; every field may be left as it is."""

    say: Callable[[str], None] = lambda line: None
    """A line of text."""
    on_round: Callable[[str, int], None] = lambda method, number: None
    """After each round of a method."""
    on_method: Callable[[str, list[Record]], None] = lambda method, records: None
    """After each method, with its records."""
    on_failure: Callable[[str, AbsorberError], None] = lambda method, error: None
    """After a method that failed."""


def run_retention(
    task: Retention,
    methods: Mapping[str, Method],
    model: Any,
    tokenizer: Any,
    *,
    data_dir: Path,
    output: Path,
    listener: Listener | None = None,
    labels: Mapping[str, dict[str, str]] | None = None,
) -> list[Record]:
    """Measure methods that the output file does not have yet.

    Args:
        task: The protocol's settings.
        methods: By name.
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        data_dir: Folder with the data; see `data.documents`.
        output: File of records; those of a method are added when it is done.
        listener: Whom to tell.
        labels: By method, where its settings stand in the tables of an ablation; its records say so.

    Returns:
        The records of all methods asked for, old and new.

    Raises:
        BenchmarkError: If there is too little text, or the file is not one of records.
    """
    listener, labels = listener or Listener(), labels or {}
    backbone, sink_id = inspect(model), sink_token(model, tokenizer)
    facts = environment(backbone.device) | {"model": base_name(model), "dtype": str(model.dtype).removeprefix("torch.")}
    known: dict[str, list[Record]] = defaultdict(list)
    for record in read_records(output):
        known[_identity(record)].append(record)
    found: list[Record] = []
    listener.say("reading the texts")
    texts = prepare(task, tokenizer, data_dir)

    def checkpoints(name: str, method: Method) -> list[Checkpoint]:
        return list(
            measure(
                task, method, backbone, texts, sink_id=sink_id, on_round=lambda number: listener.on_round(name, number)
            )
        )

    reference: list[Checkpoint] | None = None
    for name, method in methods.items():
        label, blank = labels.get(name, {}), Checkpoint(0, {}, 0.0)
        probe = _record(task, name, method.config(), facts, blank, "windowed_nll", [0.0], "nats", label)
        done = known.get(_identity(probe))
        if done:
            listener.say(f"{name}: already measured, in {output}")
            found += done
            continue
        if reference is None:
            listener.say("reading with full attention and with the window alone, for comparison")
            reference = checkpoints(_REFERENCE, METHODS[_REFERENCE])
        try:
            if backbone.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            measured = reference if name == _REFERENCE else checkpoints(name, method)
            listener.say(f"{name}: {time.perf_counter() - started:.0f} s")
        except AbsorberError as error:
            listener.on_failure(name, error)
            continue
        records = to_records(task, name, method.config(), measured, reference, facts)
        records = [dataclasses.replace(record, config=record.config | label) for record in records]
        append_records(output, records)
        listener.on_method(name, records)
        found += records
    return found


def _identity(record: Record) -> str:
    """What was measured; the settings of an ablation are the same measurement whatever its tables call them."""
    config = {key: value for key, value in record.config.items() if key not in ("drift_kind", "table", "variant")}
    method = "" if "table" in record.config else record.method
    return dataclasses.replace(record, config=config, method=method).key


def to_records(
    task: Retention,
    method: str,
    method_config: dict[str, Any],
    measured: Sequence[Checkpoint],
    reference: Sequence[Checkpoint],
    facts: dict[str, Any],
) -> list[Record]:
    """Write what a method measured as records.

    Args:
        task: The protocol's settings.
        method: Its name.
        method_config: Its settings.
        measured: Its checkpoints.
        reference: Those of `truncation` on the same streams: without memory.
        facts: Model, device, dtype, versions, git.
    """
    records = []
    without = {checkpoint.round: checkpoint.metrics for checkpoint in reference}

    def add(checkpoint: Checkpoint, metric: str, values: Sequence[float], unit: str, **extra: Any) -> None:
        records.append(_record(task, method, method_config, facts, checkpoint, metric, values, unit, extra))

    for checkpoint in measured:
        for name, values in checkpoint.metrics.items():
            metric, _, kind = name.partition("/")
            if metric != "full_nll":
                add(checkpoint, metric, values, "nats", **({"drift_kind": kind} if kind else {}))
        for view in ("windowed", "contextless"):
            none = without[checkpoint.round][f"{view}_nll"]
            own, full = checkpoint.metrics[f"{view}_nll"], checkpoint.metrics["full_nll"]
            value, low, high = gap_interval(none, own, full)
            ends = {"ci95_low": low, "ci95_high": high} if math.isfinite(low) else {"ci95_low": None, "ci95_high": None}
            add(checkpoint, f"{view}_gap_closed", own, "ratio")
            records[-1] = dataclasses.replace(records[-1], value=value, per_sample=[], **ends)
    return records


def _record(
    task: Retention,
    method: str,
    method_config: dict[str, Any],
    facts: dict[str, Any],
    checkpoint: Checkpoint,
    metric: str,
    values: Sequence[float],
    unit: str,
    extra: dict[str, Any],
) -> Record:
    value, low, high = mean_interval(values)
    cuda = torch.cuda.is_available()
    return Record(
        task=task.name,
        method=method,
        metric=metric,
        value=value,
        unit=unit,
        num_samples=len(values),
        ci95_low=low,
        ci95_high=high,
        context_length=task.sync_tokens + task.context_tokens * checkpoint.round,
        round=checkpoint.round,
        seed=task.seed,
        config={"task": task.config(), "method": method_config} | extra,
        per_sample=[round(value, 5) for value in values],
        seconds=round(checkpoint.seconds, 3),
        peak_memory_bytes=torch.cuda.max_memory_allocated() if cuda else 0,
        **facts,
    )
