"""What a task has to offer to be run by `runner.run_task`, and how its figures become records."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from absorber.backbone import Backbone
from absorber.bench.methods import Method
from absorber.bench.records import Record, mean_interval


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was measured after a round, stream by stream."""

    round: int
    """Rounds done."""
    metrics: dict[str, list[float]]
    """By name; a task may put more into the name, parted by slashes."""
    seconds: float
    """Wall time of reading and absorbing up to here."""


class Task(Protocol):
    """A protocol with its settings."""

    name: ClassVar[str]
    """What its records call it."""
    reference: ClassVar[str | None]
    """Method that all others are compared with, stream by stream; None if there is none."""

    @property
    def seed(self) -> int:
        """Of streams and methods."""

    @property
    def context_tokens(self) -> int:
        """n."""

    @property
    def sync_tokens(self) -> int:
        """m."""

    def config(self) -> dict[str, Any]:
        """What a record says of the settings."""

    def prepare(self, model: Any, tokenizer: Any, data_dir: Path) -> Any:
        """Read and tokenize what a run needs; the same for all methods."""

    def measure(
        self, method: Method, backbone: Backbone, texts: Any, *, sink_id: int, on_round: Callable[[int], None]
    ) -> Iterator[Checkpoint]:
        """Let a method read, and measure it."""

    def to_records(
        self,
        method: str,
        method_config: dict[str, Any],
        measured: Sequence[Checkpoint],
        reference: Sequence[Checkpoint],
        facts: dict[str, Any],
    ) -> list[Record]:
        """Write what a method measured as records."""


def to_record(
    task: Task,
    method: str,
    method_config: dict[str, Any],
    facts: dict[str, Any],
    checkpoint: Checkpoint,
    metric: str,
    values: Sequence[float],
    unit: str,
    extra: dict[str, Any],
) -> Record:
    """Make a record of the mean of some values.

    Args:
        task: The protocol's settings.
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
        peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        **facts,
    )
