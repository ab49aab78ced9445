"""A task: what is streamed, how it is read, and what every task has to say to be run by `runner.run_task`.

Shapes: B streams, T tokens, V vocabulary.
"""

import abc
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, get_args

import torch
from torch import Tensor

from absorber.backbone import Backbone
from absorber.bench.data import Kind, Split
from absorber.bench.methods import Method, Reader, Setting
from absorber.bench.records import Record, gap_interval, mean_interval
from absorber.config import StreamConfig
from absorber.errors import BenchmarkError
from absorber.notes import Guide


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was measured after a round, stream by stream."""

    round: int
    """Rounds done."""
    metrics: dict[str, list[float]]
    """By name; a task may put more into the name, parted by slashes."""
    seconds: float
    """Wall time of reading and absorbing up to here."""
    peak_memory_bytes: int = 0
    """Largest allocation on an accelerator up to here; 0 on a CPU."""


class Texts(Protocol):
    """What a task prepares; the same for all methods."""

    token_ids_BT: Tensor
    """What is read: m + n * rounds tokens, and what the task keeps behind them."""
    guide: Guide
    """For study."""

    def of_streams(self, rows: slice) -> Self:
        """Those of some streams, without what references were found for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(abc.ABC):
    """The settings that all tasks have, and how a method reads the streams."""

    name: ClassVar[str]
    """What its records call it."""
    reference: ClassVar[str | None] = None
    """Method that all others are compared with, stream by stream; None if there is none."""
    kinds: ClassVar[tuple[str, ...]] = get_args(Kind)
    """What can be streamed."""
    kind: str = "books"
    """What is streamed."""
    split: Split = "report"
    """Which half of the documents."""
    num_rounds: int
    """Rounds; m + n * rounds tokens of each stream are read."""
    num_streams: int = 24
    """B."""
    context_tokens: int = 512
    """n."""
    sync_tokens: int = 1024
    """m."""
    seed: int = 0
    """Of streams and methods."""

    @property
    def stream(self) -> StreamConfig:
        """n and m."""
        return StreamConfig(context_tokens=self.context_tokens, sync_tokens=self.sync_tokens)

    @property
    @abc.abstractmethod
    def checkpoints(self) -> list[int]:
        """After which rounds is measured."""

    def config(self) -> dict[str, Any]:
        """What a record says of the settings."""
        values = dataclasses.asdict(self)
        del values["seed"]
        return values

    def check(self, data_dir: Path) -> None:
        """See what can be seen of the data without a model, which takes its time to load.

        Raises:
            BenchmarkError: If there is nothing to read.
        """
        if not data_dir.is_dir():
            raise BenchmarkError(f"there is no folder {data_dir}; give the one that holds the data with --data-dir")

    def remark(self, texts: Any) -> str:
        """Say what a user has to know of what was prepared; mostly nothing."""
        return ""

    @abc.abstractmethod
    def prepare(self, model: Any, tokenizer: Any, data_dir: Path) -> Texts:
        """Read and tokenize what a run needs.

        Raises:
            BenchmarkError: If there is too little text.
        """

    @abc.abstractmethod
    def examine(self, setting: Setting, reader: Reader, texts: Any, number: int) -> dict[str, list[float]]:
        """Measure what a reader knows after a round; references are kept in the texts when first needed."""

    @abc.abstractmethod
    def to_records(
        self,
        method: str,
        method_config: dict[str, Any],
        measured: Sequence[Checkpoint],
        reference: Sequence[Checkpoint],
        facts: dict[str, Any],
    ) -> list[Record]:
        """Write what a method measured as records.

        Args:
            method: Its name.
            method_config: Its settings.
            measured: Its checkpoints.
            reference: Those of the method `reference` on the same streams.
            facts: Model, device, dtype, versions, git.
        """

    def measure(
        self,
        method: Method,
        backbone: Backbone,
        texts: Texts,
        *,
        sink_id: int,
        on_round: Callable[[int], None] = lambda number: None,
    ) -> Iterator[Checkpoint]:
        """Let a method read the streams, and examine it after each checkpoint.

        Args:
            method: The method.
            backbone: The model.
            texts: From `prepare`, of all streams or of some.
            sink_id: First token of every input.
            on_round: Called after each round.

        Yields:
            One checkpoint after another.
        """
        setting = Setting(
            backbone=backbone,
            stream=self.stream,
            sink_id=sink_id,
            num_streams=len(texts.token_ids_BT),
            seed=self.seed,
            guide=texts.guide,
        )
        on_cuda = backbone.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        reader, seconds, begin = method.begin(setting), 0.0, 0
        try:
            for number in range(self.num_rounds + 1):
                end = self.sync_tokens + self.context_tokens * number
                started = time.perf_counter()
                reader.read(texts.token_ids_BT[:, begin:end])
                begin = end
                if number in self.checkpoints:
                    reader.reading()  # which takes its time when it is first asked for
                if on_cuda:
                    torch.cuda.synchronize()
                seconds += time.perf_counter() - started
                if number in self.checkpoints:
                    metrics = self.examine(setting, reader, texts, number)
                    peak = torch.cuda.max_memory_allocated() if on_cuda else 0
                    yield Checkpoint(number, metrics, seconds, peak)
                if number:
                    on_round(number)
        finally:
            reader.close()

    def record(
        self,
        method: str,
        method_config: dict[str, Any],
        facts: dict[str, Any],
        checkpoint: Checkpoint,
        metric: str,
        values: Sequence[float],
        unit: str,
        **extra: Any,
    ) -> Record:
        """Make a record of the mean of some values.

        Args:
            method: Name of the method.
            method_config: Its settings.
            facts: Model, device, dtype, versions, git.
            checkpoint: When.
            metric: Name of the figure.
            values: One per sample.
            unit: Of the values.
            extra: More for the record's `config`.
        """
        value, low, high = mean_interval(values)
        return Record(
            task=self.name,
            method=method,
            metric=metric,
            value=value,
            unit=unit,
            num_samples=len(values),
            ci95_low=low,
            ci95_high=high,
            context_length=self.sync_tokens + self.context_tokens * checkpoint.round,
            round=checkpoint.round,
            seed=self.seed,
            config={"task": self.config(), "method": method_config} | extra,
            per_sample=[round(value, 5) for value in values],
            seconds=round(checkpoint.seconds, 3),
            peak_memory_bytes=checkpoint.peak_memory_bytes,
            **facts,
        )


def as_gap(record: Record, without: Sequence[float], with_memory: Sequence[float], full: Sequence[float]) -> Record:
    """Put the gap closed of the means, with its paired interval, in the place of a record's value.

    Args:
        record: Of the same samples.
        without: Without memory.
        with_memory: With it.
        full: With full attention.
    """
    value, low, high = gap_interval(without, with_memory, full)
    ends = (low, high) if math.isfinite(value) and math.isfinite(low) else (None, None)
    return dataclasses.replace(record, value=value, per_sample=[], ci95_low=ends[0], ci95_high=ends[1])
