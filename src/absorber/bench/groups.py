"""Streams measured some at a time, for a device that has no room for all, and what is kept until all are done.

What the groups so far measured lies in a small file of its own beside the file of records, named by what is measured,
so that a run that was ended goes on with the next group, of whatever size. It is gone when the records are written.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from absorber.bench.task import Checkpoint


def joined(first: Sequence[Checkpoint], then: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Put what two groups measured together, as if all their streams had been one batch.

    Args:
        first: Of the streams that come first; may be empty.
        then: Of those that follow, after the same rounds.

    Returns:
        Checkpoints with the figures of all; times add up, and of the peaks the higher one counts.
    """
    if not first:
        return list(then)
    return [
        Checkpoint(
            one.round,
            {name: values + other.metrics[name] for name, values in one.metrics.items()},
            one.seconds + other.seconds,
            max(one.peak_memory_bytes, other.peak_memory_bytes),
        )
        for one, other in zip(first, then, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What is known of a measurement whose streams are not all done."""

    path: Path
    """Its file; there is none before the first group is done."""

    @classmethod
    def beside(cls, output: Path, key: str) -> Self:
        """Name the file.

        Args:
            output: File of records.
            key: Of the measurement, as of its records: other settings, other file.
        """
        return cls(output.with_name(f"{output.name}.{key[:16]}.part"))

    def read(self) -> tuple[int, list[Checkpoint]]:
        """Return how many streams are done, from the first on, and what was measured of them.

        A file that is damaged counts for nothing: what it held can be measured again.
        """
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            return values["num_streams"], [Checkpoint(**checkpoint) for checkpoint in values["checkpoints"]]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return 0, []

    def write(self, num_streams: int, checkpoints: Sequence[Checkpoint]) -> None:
        """Keep this in place of what was kept, whole or not at all."""
        values = {"num_streams": num_streams, "checkpoints": [dataclasses.asdict(one) for one in checkpoints]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".new")
        scratch.write_text(json.dumps(values), encoding="utf-8")
        os.replace(scratch, self.path)

    def remove(self) -> None:
        """Forget it, for its records are written."""
        self.path.unlink(missing_ok=True)
