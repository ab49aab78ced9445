"""Measuring time and memory: a clock that waits for the device, and cells whose records are written as they come."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from absorber.bench.records import Record, append_records, environment, read_records
from absorber.errors import DeviceMemoryError


@dataclass(frozen=True, slots=True)
class Figure:
    """What one metric of a cell came to."""

    metric: str
    """Its name."""
    samples: tuple[float, ...]
    """One per repetition; the record's value is their median."""
    unit: str
    """Of the samples."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to measure, which has records of its own."""

    method: str
    """Name of the method."""
    length: int
    """Tokens read before."""
    config: dict[str, Any]
    """Everything that it depends on; nothing that is measured."""
    run: Callable[[], list[Figure]]
    """Measures it."""

    @property
    def label(self) -> str:
        """What a person calls it."""
        more = f", checkpointing {self.config['checkpointing']}" if "checkpointing" in self.config else ""
        return f"{self.method}, {self.config['batch']} x {self.length} tokens{more}"


def milliseconds(
    device: torch.device, work: Callable[[], Any], *, repeats: int, warm_ups: int = 1
) -> tuple[float, ...]:
    """Time some work, from an idle device to an idle device.

    Args:
        device: Where it runs.
        work: Done anew each time.
        repeats: How often it is timed.
        warm_ups: How often it is done before, for kernels to be chosen and graphs to be recorded.
    """
    for _ in range(warm_ups):
        work()
    taken = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        taken.append(1000 * (time.perf_counter() - started))
    return tuple(taken)


def make_room(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """Floating-point operations a second of a large product of square matrices, the best of some."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(milliseconds(device, lambda: left @ right, repeats=repeats, warm_ups=2))
    return 2 * size**3 / best * 1000


def copy_rate(device: torch.device, *, repeats: int = 5) -> float:
    """Bytes a second that are read and written in a large copy, the best of some."""
    given = torch.zeros(2**28 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device)
    taken = torch.empty_like(given)
    return 2 * given.numel() / min(milliseconds(device, lambda: taken.copy_(given), repeats=repeats)) * 1000


@dataclass(slots=True, kw_only=True)
class Sheet:
    """A file of records that is filled cell by cell; what stands in it is not measured again."""

    task: str
    """Name of the benchmark."""
    model: str
    """Name of the geometry or model."""
    device: torch.device
    """Where it runs."""
    dtype: torch.dtype
    """Type of its weights."""
    seed: int
    """Of inputs."""
    output: Path
    """The file."""
    say: Callable[[str], None] = lambda line: None
    """Told what happens."""
    on_records: Callable[[list[Record]], None] = lambda records: None
    """Given a cell's records as they are written."""
    on_cell: Callable[[str, bool], None] = lambda label, is_new: None
    """Told of a cell that has records, and whether it was measured now."""
    on_failure: Callable[[str, Exception], None] = lambda label, error: None
    """Told of a cell that failed."""
    records: list[Record] = field(default_factory=list)
    """Those of all cells asked for, old and new."""
    failures: list[str] = field(default_factory=list)
    """Cells that ended with an error; they have no records."""

    def fill(self, cells: Iterable[Cell], *, seconds: float | None = None) -> None:
        """Measure cells in their order. What does not fit the device's memory is recorded as such.

        Args:
            cells: The most important first.
            seconds: No cell is begun after so many.

        Raises:
            BenchmarkError: If the file is not one of records.
        """
        facts = environment(self.device) | {"model": self.model, "dtype": str(self.dtype).removeprefix("torch.")}
        known: dict[str, list[Record]] = {}
        for record in read_records(self.output):
            known.setdefault(record.key, []).append(record)
        started, skipped = time.perf_counter(), 0
        for cell in cells:
            probe = self._record(cell, Figure("", (0.0,), ""), facts, 0.0)
            if probe.key in known:
                self.say(f"{cell.label}: already measured, in {self.output}")
                self.records += known[probe.key]
                self.on_cell(cell.label, False)
            elif seconds is not None and time.perf_counter() - started > seconds:
                skipped += 1
            else:
                self._measure(cell, facts)
        if skipped:
            self.say(f"{skipped} cells were left out, because {seconds:g} seconds are over; run it again to go on")

    def _measure(self, cell: Cell, facts: dict[str, Any]) -> None:
        started = time.perf_counter()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            figures = cell.run()
        except (torch.OutOfMemoryError, DeviceMemoryError):
            figures = [Figure("out_of_memory", (1.0,), "")]
        except (
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # one thing that cannot be measured does not end a run on a device that is lent
            self.say(f"{cell.label} failed: {error}")
            self.failures.append(cell.label)
            self.on_failure(cell.label, error)
            return
        seconds = time.perf_counter() - started
        if on_gpu and figures[0].metric != "out_of_memory":
            peak = torch.cuda.max_memory_allocated(self.device)
            figures.append(Figure("peak_memory_bytes", (float(peak),), "bytes"))
        records = [self._record(cell, figure, facts, seconds) for figure in figures]
        append_records(self.output, records)
        self.records += records
        self.on_records(records)
        self.on_cell(cell.label, True)
        self.say(f"{cell.label} ({seconds:.1f} s): " + ", ".join(spell(record) for record in records))
        make_room(self.device)

    def _record(self, cell: Cell, figure: Figure, facts: dict[str, Any], seconds: float) -> Record:
        return Record(
            task=self.task,
            method=cell.method,
            metric=figure.metric,
            value=statistics.median(figure.samples),
            unit=figure.unit,
            num_samples=len(figure.samples),
            context_length=cell.length,
            round=0,
            seed=self.seed,
            # The length is part of what tells two cells apart.
            config=cell.config | {"length": cell.length},
            per_sample=[round(sample, 5) for sample in figure.samples],
            seconds=round(seconds, 3),
            peak_memory_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
            **facts,
        )


def spell(record: Record) -> str:
    """Write one figure as people read it."""
    if record.metric == "out_of_memory":
        return "out of memory"
    if record.unit == "bytes":
        return f"{record.metric.removesuffix('_bytes')} {record.value / 1e9:.2f} GB"
    return f"{record.metric} {record.value:.4g} {record.unit}".rstrip()


def speed_rows(records: Sequence[Record]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One row per cell, with a column for each metric.

    Returns:
        The heads, and the rows.
    """
    metrics = list(dict.fromkeys(record.metric for record in records if record.metric != "out_of_memory"))
    units = {record.metric: record.unit for record in records}
    cells: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in records:
        key: tuple[str, ...] = (record.model, record.method, str(record.config["batch"]), str(record.context_length))
        key = (*key, str(record.config.get("checkpointing", "")))
        cells.setdefault(key, {})[record.metric] = record
    rows: list[tuple[str, ...]] = []
    for names, found in cells.items():
        if "out_of_memory" in found:
            rows.append((*names, *("out of memory" for _ in metrics)))
        else:
            rows.append((*names, *(_number(found[metric]) if metric in found else "" for metric in metrics)))
    heads = [
        f"{metric.removesuffix('_bytes')}, {'GB' if units[metric] == 'bytes' else units[metric]}" for metric in metrics
    ]
    return ("model", "method", "streams", "tokens", "checkpointing", *heads), rows


def _number(record: Record) -> str:
    return f"{record.value / 1e9:.2f}" if record.unit == "bytes" else f"{record.value:.4g}"


def break_even(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """From how many tokens on a token is quicker, absorption included, than with full attention at its best.

    Between two measured lengths both are taken as straight lines; where full attention has no room, it has lost.

    Returns:
        Rows of model, method, streams, and tokens: a number, or what can be said instead.
    """
    times: dict[tuple[str, str, Any], dict[int, float]] = {}
    for record in records:
        metric = "ms_per_token" if record.method == "full" else "ms_per_token_with_absorption"
        if record.metric in (metric, "out_of_memory"):
            cell = times.setdefault((record.model, record.method, record.config.get("batch")), {})
            cell[record.context_length] = math.inf if record.metric == "out_of_memory" else record.value
    rows: list[tuple[str, ...]] = []
    for (model, method, batch), own in times.items():
        full = times.get((model, "full", batch), {})
        lengths = sorted(at for at in set(own) & set(full) if math.isfinite(min(own[at], full[at])))
        if method != "full" and lengths:
            rows.append((model, method, str(batch), _crossing([(at, full[at] - own[at]) for at in lengths])))
    return rows


def _crossing(points: Sequence[tuple[int, float]]) -> str:
    """Where what full attention takes more, by length, gets above nothing for good."""
    if points[-1][1] <= 0:
        return f"not up to {points[-1][0]}"
    last = max((index for index, (_, more) in enumerate(points) if more <= 0), default=-1)
    if last < 0:
        return f"{points[0][0]} or fewer"
    (left, less), (right, more) = points[last], points[last + 1]
    if math.isinf(more):
        return f"{right}, where full attention has no room"
    return f"about {left + (right - left) * -less / (more - less):.0f}"
