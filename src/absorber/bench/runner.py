"""Running a benchmark: every method once, resumable, one failed method never ending the run."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absorber.backbone import Backbone, base_name, inspect, sink_token
from absorber.bench.groups import Unfinished, joined
from absorber.bench.methods import METHODS, Method
from absorber.bench.records import Record, append_records, environment, read_records, without_place
from absorber.bench.task import Checkpoint, Task, Texts
from absorber.errors import AbsorberError, ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
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
    batch: int | None = None,
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
        batch: How many streams are read at once; all if left out. The figures are the same, so records do not name it.
        listener: Whom to tell.
        labels: By method, where its settings stand in the tables of an ablation; its records say so.

    Returns:
        The records of all methods asked for, old and new.

    Raises:
        BenchmarkError: If there is too little text, or the file is not one of records.
        ConfigError: If the batch has no stream.
    """
    if batch is not None and batch < 1:
        raise ConfigError(f"a batch has one stream or more; got {batch}")
    listener, backbone = listener or Listener(), inspect(model)
    facts = environment(backbone.device)
    facts |= {"model": without_place(base_name(model)), "dtype": str(model.dtype).removeprefix("torch.")}
    known: dict[str, list[Record]] = defaultdict(list)
    for record in read_records(output):
        known[_identity(record)].append(record)
    listener.say("reading the texts")
    texts = task.prepare(model, tokenizer, data_dir)
    if remark := task.remark(texts):
        listener.say(f"note: {remark}")
    run = _Run(
        task=task,
        methods=methods,
        labels=labels or {},
        backbone=backbone,
        sink_id=sink_token(model, tokenizer),
        facts=facts,
        texts=texts,
        batch=batch or task.num_streams,
        output=output,
        known=known,
        listener=listener,
    )
    return [record for name in methods for record in run.records(name)]


@dataclass(slots=True, kw_only=True)
class _Run:
    """What the methods of one run share."""

    task: Task
    methods: Mapping[str, Method]
    labels: Mapping[str, dict[str, str]]
    backbone: Backbone
    sink_id: int
    facts: dict[str, Any]
    texts: Texts
    batch: int
    output: Path
    known: Mapping[str, list[Record]]
    listener: Listener
    groups: dict[int, Texts] = field(default_factory=dict)
    """The texts by the number of their first stream, with the references found for them."""
    reference: list[Checkpoint] = field(default_factory=list)

    def records(self, name: str) -> list[Record]:
        """Those of a method, measured now unless the file has them; none if that failed."""
        method = self.methods[name]
        if known := self.known.get(self._key(name, method)):
            self.listener.say(f"{name}: already measured, in {self.output}")
            self.listener.on_known(name, known)
            return known
        self._refer()
        try:
            started = time.perf_counter()
            measured = self.reference if name == self.task.reference else self._measure(name, method)
            self.listener.say(f"{name}: {time.perf_counter() - started:.0f} s")
        except (AbsorberError, RuntimeError) as error:  # what torch raises, an exhausted device's memory among it
            self.listener.on_failure(name, error)
            return []
        records = self._record(name, method, measured)
        self.listener.on_method(name, records)
        return records

    def _refer(self) -> None:
        """Measure the method that all others are compared with, if there is one and that is not done."""
        name = self.task.reference
        if name is None or self.reference:
            return
        self.listener.say(f"reading with full attention and with {name}, for comparison")
        method = METHODS[name]
        self.reference = self._measure(name, method)
        if not self.labels and name not in self.methods and self._key(name, method) not in self.known:
            self._record(name, method, self.reference)
        self._unfinished(name, method).remove()

    def _measure(self, name: str, method: Method) -> list[Checkpoint]:
        """Let a method read one group of streams after another; what they measure is kept until it is recorded."""
        unfinished, total = self._unfinished(name, method), self.task.num_streams
        first, measured = unfinished.read()
        while first < total:
            end = min(first + self.batch, total)
            if end - first < total:
                self.listener.say(f"{name}: streams {first + 1} to {end} of {total}")
            if first not in self.groups:
                self.groups[first] = self.texts.of_streams(slice(first, end))
            group = self.task.measure(
                method,
                self.backbone,
                self.groups[first],
                sink_id=self.sink_id,
                on_round=lambda number: self.listener.on_round(name, number),
            )
            first, measured = end, joined(measured, list(group))
            unfinished.write(first, measured)
        return measured

    def _record(self, name: str, method: Method, measured: list[Checkpoint]) -> list[Record]:
        records = self.task.to_records(name, method.config(), measured, self.reference, self.facts)
        label = self.labels.get(name, {})
        records = [dataclasses.replace(record, config=record.config | label) for record in records]
        append_records(self.output, records)
        self._unfinished(name, method).remove()
        return records

    def _unfinished(self, name: str, method: Method) -> Unfinished:
        return Unfinished.beside(self.output, self._key(name, method))

    def _key(self, name: str, method: Method) -> str:
        label = self.labels.get(name, {})
        return _identity(
            self.task.record(name, method.config(), self.facts, Checkpoint(0, {}, 0.0), "", [0.0], "", **label)
        )


# What tells the records of one measurement apart, and names the place of a setting in an ablation.
_WITHIN = ("drift_kind", "gate", "age", "wording", "view", "chance", "fact_kind", "table", "variant")


def _identity(record: Record) -> str:
    """What was measured; the settings of an ablation are the same measurement whatever its tables call them."""
    config = {key: value for key, value in record.config.items() if key not in _WITHIN}
    method = "" if "table" in record.config else record.method
    return dataclasses.replace(record, config=config, method=method).key
