"""A run of the families: trained one after another, measured, and written as records; nothing is done twice."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from absorber.bench.families.corpus import Corpus, read_corpus
from absorber.bench.families.measuring import Measured, Scored, measure_family, measure_method, prepare
from absorber.bench.families.settings import Families
from absorber.bench.families.shapes import FAMILIES, count_parameters, shape_of
from absorber.bench.families.training import Progress, Stopped, Trained, quick_products, speed_of, train
from absorber.bench.methods import METHODS, Method
from absorber.bench.records import Record, append_records, environment, mean_interval, read_records
from absorber.bench.runner import Listener
from absorber.bench.speed import make_room
from absorber.errors import AbsorberError, BenchmarkError

TASK = "families"
"""What its records call it."""
READERS = ("truncation", "absorber")
"""Methods that read through a window with the trained transformer, if no name is given."""
DEFAULT = (*(name for name in FAMILIES if name != "ttt-mlp"), *READERS)
"""What is run if no name is given."""

_BASE = "transformer"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run reads and writes."""

    data_dir: Path
    """Folder with `novels_train` and `novels`."""
    output: Path
    """File of records."""
    checkpoints: Path
    """Folder of trained weights, tokens and tokenizer; not to be committed."""


def check_names(names: Sequence[str]) -> None:
    """Look whether all are families, or methods for the trained transformer.

    Raises:
        BenchmarkError: If one is not; it lists those that are.
    """
    known = [*FAMILIES, *METHODS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BenchmarkError(f"there is no family or method {', '.join(unknown)}; there are {', '.join(known)}")


def run_families(
    task: Families,
    names: Sequence[str],
    place: Place,
    *,
    device: torch.device,
    methods: Mapping[str, Method] = METHODS,
    seconds: float | None = None,
    listener: Listener | None = None,
) -> list[Record]:
    """Train and measure what the output file does not have yet.

    Args:
        task: The settings.
        names: Families, and methods that read with the trained transformer; `DEFAULT` if none.
        place: Files and folders.
        device: Where it runs.
        methods: The methods by name.
        seconds: Training ends at the first point of its curve after so many; the run can be gone on with.
        listener: Whom to tell.

    Returns:
        The records of all that was asked for, old and new.

    Raises:
        BenchmarkError: If a name is unknown, there is too little text, or scored text is among the training text.
    """
    check_names(names)
    run = _Run(task, place, device, methods, seconds, listener or Listener())
    found: list[Record] = []
    # A method reads with the transformer, which is trained first.
    for name in sorted(names or DEFAULT, key=lambda name: name not in FAMILIES):
        try:
            found += run.of(name)
        except Stopped:
            run.say(f"{name}: {seconds:g} seconds are over; run it again to go on")
            break
        except (AbsorberError, RuntimeError, ValueError) as error:  # one family does not end a run on a lent device
            shown = error if isinstance(error, AbsorberError) else BenchmarkError(str(error).split("\n")[0])
            run.listener.on_failure(name, shown)
        make_room(device)
    run.check_order(found)
    return found


class _Run:
    """The parts of a run that its families share."""

    def __init__(
        self,
        task: Families,
        place: Place,
        device: torch.device,
        methods: Mapping[str, Method],
        seconds: float | None,
        listener: Listener,
    ) -> None:
        self._task, self._place, self._device, self._methods = task, place, device, methods
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self.listener, self.say = listener, listener.say
        self.say("reading the texts")
        self._corpus: Corpus = read_corpus(
            place.data_dir, place.checkpoints, vocabulary=task.vocabulary, split=task.split, say=self.say
        )
        self._texts: Scored = prepare(task, self._corpus, place.data_dir)
        self._facts = environment(device)
        self._known: dict[str, list[Record]] = {}
        for record in read_records(place.output):
            self._known.setdefault(_identity(record), []).append(record)

    def of(self, name: str) -> list[Record]:
        """The records of a family or method."""
        own_config = self._methods[name].config() if name in self._methods else {}
        probe = self._record(name, own_config, "", 0.0, "", 1, 0)
        done = self._known.get(_identity(probe))
        if done:
            self.say(f"{name}: already measured, in {self._place.output}")
            return done
        family = name if name in FAMILIES else _BASE
        trained = self._trained(family, lambda step: self.listener.on_round(name, step))
        self.say(f"{name}: scoring")
        with quick_products():
            measured = self._measured(name, trained)
        config, records = own_config, []
        if name in FAMILIES:
            config = {"shape": shape_of(trained.model), "data": trained.progress.data}
            records = self._of_training(name, config, trained)
        records += self._of_measuring(name, config, measured)
        append_records(self._place.output, records)
        self.say(f"{name}: {self._summary(measured)}, {measured.seconds:.0f} s of scoring")
        self.listener.on_method(name, records)
        return records

    def _measured(self, name: str, trained: Trained) -> Measured:
        if name in FAMILIES:
            return measure_family(self._task, trained.model, self._texts)
        return measure_method(
            self._task,
            self._methods[name],
            trained.model,
            self._texts,
            self._corpus.tokenizer,
            on_round=lambda number: self.listener.on_round(name, number),
        )

    def _trained(self, family: str, on_point: Callable[[int], None]) -> Trained:
        key = self._task.training_key(self._corpus.digest)
        return train(
            self._task,
            family,
            self._corpus,
            device=self._device,
            path=self._place.checkpoints / f"{family}-{self._task.size}-seed{self._task.seed}-{key}.pt",
            say=self.say,
            on_point=on_point,
            deadline=self._deadline,
        )

    def _summary(self, measured: Measured) -> str:
        last = max(measured.nll)
        values = measured.nll[last]
        return f"nll {sum(values) / len(values):.3f} after {last} tokens"

    def check_order(self, records: Sequence[Record]) -> None:
        """Make sure that all families saw the same rows in the same order.

        Raises:
            BenchmarkError: If one did not.
        """
        orders = {record.method: record.config["method"]["data"] for record in records if record.method in FAMILIES}
        if len(set(orders.values())) > 1:
            raise BenchmarkError(
                f"families were trained on different rows: {json.dumps(orders)}. Delete their checkpoints and records"
            )

    # --- Records

    def _of_training(self, name: str, config: dict[str, Any], trained: Trained) -> list[Record]:
        task, progress = self._task, trained.progress
        rows, before = [], 0
        for step, loss in progress.losses:
            rows.append(self._record(name, config, "train_nll", loss, "nats", (step - before) * task.rows, step))
            before = step
        figures = {
            "parameters": (count_parameters(trained.model), ""),
            "tokens_per_second": (speed_of(progress), "tokens/s"),
            "train_seconds": (progress.seconds, "s"),
        }
        if progress.peak_memory_bytes:
            figures["peak_memory_bytes"] = (progress.peak_memory_bytes, "bytes")
        rows += [self._record(name, config, metric, value, unit, 1, 0) for metric, (value, unit) in figures.items()]
        return [_of_run(record, progress) for record in rows]

    def _of_measuring(self, name: str, config: dict[str, Any], measured: Measured) -> list[Record]:
        found = []
        for metric, unit, points in (("nll", "nats", measured.nll), ("recall_exact", "ratio", measured.recall)):
            for length, values in points.items():
                mean, low, high = mean_interval(values)
                more = {"ci95_low": low, "ci95_high": high, "per_sample": [round(value, 5) for value in values]}
                number, seconds = len(values), round(measured.seconds, 3)
                found.append(
                    self._record(name, config, metric, mean, unit, number, 0, length=length, seconds=seconds, **more)
                )
        return found

    def _record(
        self,
        method: str,
        config: dict[str, Any],
        metric: str,
        value: float,
        unit: str,
        num_samples: int,
        number: int,
        *,
        length: int | None = None,
        **more: Any,
    ) -> Record:
        task = self._task
        return Record(
            task=TASK,
            method=method,
            model=f"from-scratch-{task.size}",
            metric=metric,
            value=float(value),
            unit=unit,
            num_samples=num_samples,
            context_length=task.row_tokens if length is None else length,
            round=number,
            seed=task.seed,
            config={"task": task.config() | {"corpus": self._corpus.digest}, "method": config},
            dtype="float32",
            **more,
            **self._facts,
        )


def _of_run(record: Record, progress: Progress) -> Record:
    return dataclasses.replace(record, seconds=round(progress.seconds, 3), peak_memory_bytes=progress.peak_memory_bytes)


def _identity(record: Record) -> str:
    """What was measured; a family's shape and data follow from the rest."""
    method = {} if record.method in FAMILIES else record.config.get("method")
    parts = [record.task, record.method, record.model, record.seed, record.config.get("task"), method, record.device]
    return json.dumps(parts, sort_keys=True)
