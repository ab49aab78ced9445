"""Every task with every method, one after another: what `absorber bench all` runs.

What the output file has is not measured again. A method that fails, or a task that cannot be prepared, ends nothing;
the outcome names it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from absorber.backbone import Backbone, inspect
from absorber.bench.ablation import Ablation, cells, run_ablation
from absorber.bench.answer_tables import ASKING_TASKS
from absorber.bench.cost import Cost
from absorber.bench.geometry import blank_geometry, build_geometry
from absorber.bench.hub import fetched
from absorber.bench.latency import Latency
from absorber.bench.methods import Method
from absorber.bench.quick import SIZES, smaller_methods, smaller_speed
from absorber.bench.recall import Recall
from absorber.bench.retention import Retention
from absorber.bench.runner import Listener, run_task
from absorber.bench.speed import Cell, Sheet
from absorber.errors import AbsorberError, BenchmarkError, ConfigError

READING_TASKS: dict[str, Any] = {"retention": Retention, "recall": Recall, **ASKING_TASKS}
"""Those that `run_task` runs."""
TASKS = (*READING_TASKS, "ablation", "latency", "cost")
"""All, in the order in which they are run."""

_GEOMETRIES = {
    "latency": (("llama2-7b", "mamba-2.8b"), ("tiny", "mamba-tiny")),
    "cost": (("llama2-7b",), ("tiny",)),
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that was not measured."""

    task: str
    """Of which task."""
    what: str
    """A method, a variant, a cell, or nothing where the task could not begin."""
    kind: str
    """Class of the error."""
    message: str
    """Why."""


@dataclass(slots=True)
class Outcome:
    """What a run came to."""

    measured: dict[str, int] = field(default_factory=dict)
    """By task, how many methods, variants or cells were measured now."""
    known: dict[str, int] = field(default_factory=dict)
    """By task, how many the file had."""
    failures: list[Failure] = field(default_factory=list)
    """What is missing."""


@dataclass(slots=True)
class Meter:
    """Counts what is done, and works out how long the rest will take."""

    total: int
    """Things to be done."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds."""
    done: int = 0
    """Things that are."""
    _measured: int = 0
    _started: float = 0.0

    def begin(self) -> None:
        """Start the clock."""
        self._started = self.clock()

    def count(self, *, is_new: bool) -> None:
        """One more; what the file had takes no time, so that it says nothing of the rest."""
        self.done += 1
        self._measured += is_new

    @property
    def seconds_left(self) -> float | None:
        """About; None before anything was measured."""
        if not self._measured:
            return None
        return (self.clock() - self._started) / self._measured * max(0, self.total - self.done)


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    """A run over tasks."""

    model: Any
    """A Hugging Face causal language model."""
    tokenizer: Any
    """Its tokenizer."""
    methods: Mapping[str, Method]
    """By name."""
    output: Path
    """File of records."""
    data_dir: Path | None = None
    """Folder with the data; without one, data sets come from the hub and plain texts are missing."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By task, what is not as by default."""
    quick: bool = False
    """Whether all sizes are tiny."""
    batch: int | None = None
    """How many streams are read at once; all if left out."""
    seed: int = 0
    """Of everything."""
    device: str = "auto"
    """For `latency` and `cost`, whose models have random weights."""
    say: Callable[[str], None] = lambda line: None
    """Told what happens."""
    on_progress: Callable[[str, str, Meter], None] = lambda task, what, meter: None
    """Told of each thing that is done."""

    def run(self, tasks: Sequence[str] = ()) -> Outcome:
        """Run some tasks, all if none is named.

        Raises:
            ConfigError: If there is no such task or setting.
        """
        unknown = sorted(set(tasks) - set(TASKS))
        if unknown:
            raise ConfigError(f"there is no task {', '.join(unknown)}; there are {', '.join(TASKS)}")
        chosen = [task for task in TASKS if not tasks or task in tasks]
        for task in set(chosen) - set(_GEOMETRIES):
            self._task(task)  # a wrong setting must not wait for the tasks before
        sizes = {task: self._size(task) for task in chosen}
        outcome, meter = Outcome(), Meter(sum(sizes.values()))
        meter.begin()
        for task in chosen:
            outcome.measured[task] = outcome.known[task] = 0
            before = meter.done
            self.say(f"task {task}")
            try:
                self._run(task, _Counter(task, outcome, meter, self))
            except (AbsorberError, RuntimeError) as error:
                outcome.failures.append(Failure(task, "", type(error).__name__, str(error)))
                self.say(f"{task} failed: {error}")
            meter.done = before + sizes[task]  # also where it ended early
        return outcome

    def _size(self, task: str) -> int:
        """How many things a task has."""
        if task == "ablation":
            found = cells(self._task(task), num_layers=len(inspect(self.model).blocks), quick=self.quick)
            return len({(cell.task, cell.config) for cell in found})
        if task in READING_TASKS:
            return len(self.methods)
        blank = [inspect(blank_geometry(geometry)) for geometry in _GEOMETRIES[task][self.quick]]
        return sum(len(list(self._cells(task, backbone))) for backbone in blank)

    def _cells(self, task: str, backbone: Backbone) -> Iterator[Cell]:
        shape = smaller_speed(self.seed) if self.quick else Latency(seed=self.seed)
        return shape.cells(backbone) if task == "latency" else Cost(shape).cells(backbone)

    def _task(self, name: str) -> Any:
        kind = Ablation if name == "ablation" else READING_TASKS[name]
        given = self.settings.get(name, {})
        unknown = sorted(set(given) - {entry.name for entry in fields(kind)})
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)} in [{name}]")
        own = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        return kind(**{"seed": self.seed, **(SIZES[name] if self.quick else {}), **own})

    def _run(self, task: str, counter: "_Counter") -> None:
        if task in _GEOMETRIES:
            for geometry in _GEOMETRIES[task][self.quick]:
                self._measure_speed(task, geometry, counter)
            return
        ready = self._task(task)
        where: dict[str, Any] = {
            "data_dir": self._folder(ready),
            "output": self.output,
            "batch": self.batch,
            "listener": counter.listener(),
        }
        if task == "ablation":
            run_ablation(ready, self.model, self.tokenizer, quick=self.quick, **where)
        else:
            methods = smaller_methods(self.methods) if self.quick else self.methods
            run_task(ready, methods, self.model, self.tokenizer, **where)

    def _folder(self, task: Any) -> Path:
        if self.data_dir is not None:
            return self.data_dir
        if task.name in ASKING_TASKS:
            return fetched(task.kind)
        raise BenchmarkError(f"{task.name} needs a folder of texts; give one with --data-dir")

    def _measure_speed(self, task: str, geometry: str, counter: "_Counter") -> None:
        self.say(f"building {geometry} with random weights")
        model = build_geometry(geometry, device=self.device)
        sheet = Sheet(
            task=task,
            model=geometry,
            device=model.device,
            dtype=model.dtype,
            seed=self.seed,
            output=self.output,
            say=self.say,
            on_cell=lambda label, is_new: counter.note(f"{geometry}, {label}", is_new=is_new),
            on_failure=lambda label, error: counter.fail(f"{geometry}, {label}", error),
        )
        sheet.fill(self._cells(task, inspect(model)))


@dataclass(slots=True)
class _Counter:
    """Counts what one task tells of."""

    task: str
    outcome: Outcome
    meter: Meter
    everything: Everything

    def listener(self) -> Listener:
        return Listener(
            say=self.everything.say,
            on_method=lambda name, records: self.note(name, is_new=True),
            on_known=lambda name, records: self.note(name, is_new=False),
            on_failure=self.fail,
        )

    def note(self, what: str, *, is_new: bool) -> None:
        counts = self.outcome.measured if is_new else self.outcome.known
        counts[self.task] += 1
        self.meter.count(is_new=is_new)
        self.everything.on_progress(self.task, what, self.meter)

    def fail(self, what: str, error: Exception) -> None:
        self.outcome.failures.append(Failure(self.task, what, type(error).__name__, str(error)))
        self.everything.say(f"{self.task}: {what} failed: {error}")
        self.meter.count(is_new=True)
        self.everything.on_progress(self.task, what, self.meter)
