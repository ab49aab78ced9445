"""Running a benchmark: every method once, resumable, one failed method never ending the run."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from absorber.backbone import base_name, inspect, sink_token
from absorber.bench.methods import METHODS, Method
from absorber.bench.records import Record, append_records, environment, read_records
from absorber.bench.task import Checkpoint, Task
from absorber.errors import AbsorberError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Whom a run tells how it goes; every field may be left as it is."""

    say: Callable[[str], None] = lambda line: None
    """A line of text."""
    on_round: Callable[[str, int], None] = lambda method, number: None
    """After each round of a method."""
    on_method: Callable[[str, list[Record]], None] = lambda method, records: None
    """After each method, with its records."""
    on_known: Callable[[str, list[Record]], None] = lambda method, records: None
    """In place of a method that the output file has already."""
    on_failure: Callable[[str, Exception], None] = lambda method, error: None
    """After a method that failed."""


def run_task(
    task: Task,
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
    texts = task.prepare(model, tokenizer, data_dir)

    def checkpoints(name: str, method: Method) -> list[Checkpoint]:
        return list(
            task.measure(
                method, backbone, texts, sink_id=sink_id, on_round=lambda number: listener.on_round(name, number)
            )
        )

    reference: list[Checkpoint] = []
    for name, method in methods.items():
        label, blank = labels.get(name, {}), Checkpoint(0, {}, 0.0)
        probe = task.record(name, method.config(), facts, blank, "", [0.0], "", **label)
        done = known.get(_identity(probe))
        if done:
            listener.say(f"{name}: already measured, in {output}")
            listener.on_known(name, done)
            found += done
            continue
        if task.reference is not None and not reference:
            listener.say(f"reading with full attention and with {task.reference}, for comparison")
            reference = checkpoints(task.reference, METHODS[task.reference])
            if not labels and task.reference not in methods:
                own = task.to_records(task.reference, METHODS[task.reference].config(), reference, reference, facts)
                if _identity(own[0]) not in known:
                    append_records(output, own)
        try:
            if backbone.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            measured = reference if name == task.reference else checkpoints(name, method)
            listener.say(f"{name}: {time.perf_counter() - started:.0f} s")
        except (AbsorberError, RuntimeError) as error:  # what torch raises, an exhausted device's memory among it
            listener.on_failure(name, error)
            continue
        records = task.to_records(name, method.config(), measured, reference, facts)
        records = [dataclasses.replace(record, config=record.config | label) for record in records]
        append_records(output, records)
        listener.on_method(name, records)
        found += records
    return found


# What tells the records of one measurement apart, and names the place of a setting in an ablation.
_WITHIN = ("drift_kind", "gate", "age", "wording", "view", "chance", "fact_kind", "table", "variant")


def _identity(record: Record) -> str:
    """What was measured; the settings of an ablation are the same measurement whatever its tables call them."""
    config = {key: value for key, value in record.config.items() if key not in _WITHIN}
    method = "" if "table" in record.config else record.method
    return dataclasses.replace(record, config=config, method=method).key
