"""Records: what was measured, one JSON object a line. Reports and figures are made from records only."""

import dataclasses
import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from absorber.bench.data import read_text
from absorber.errors import BenchmarkError
from absorber.models import DEFAULT_MODEL

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measured number."""

    task: str
    """Name of the benchmark."""
    method: str
    """Name of the method."""
    model: str
    """Base model."""
    metric: str
    """What was measured, for instance `windowed_nll`."""
    value: float
    """The number: a mean over samples, or a ratio of such means."""
    unit: str
    """nats, ratio, tokens/s, ..."""
    num_samples: int
    """Streams or questions behind it."""
    ci95_low: float | None = None
    """95 % bootstrap interval over samples; paired with the references for a gap."""
    ci95_high: float | None = None
    """Upper end of the same."""
    context_length: int
    """Tokens read before."""
    round: int
    """Rounds done before."""
    seed: int
    """Of the method and of the choice of streams."""
    config: dict[str, Any]
    """Settings of method and task."""
    per_sample: list[float] = field(default_factory=list)
    """The samples' own numbers, in the order of the streams, which all methods share."""
    device: str
    """Where it was measured."""
    dtype: str
    """Type of the base model's weights."""
    seconds: float = 0.0
    """Wall time of the method up to here."""
    peak_memory_bytes: int = 0
    """Largest allocation on an accelerator; 0 on a CPU."""
    versions: dict[str, str]
    """Packages."""
    git: str
    """Commit, with `+` if the tree had changes."""

    @property
    def key(self) -> str:
        """What makes two records the same measurement."""
        parts = [self.task, self.method, self.model, self.seed, self.config, self.device, self.dtype]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def model_label(name: str) -> str:
    """Name a model as a table or figure has to: the default weights are 4-bit in origin."""
    return f"{name} (weights 4-bit in origin)" if name == DEFAULT_MODEL else name


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to a file in one write, so that an interruption leaves all of them or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(_plain(dataclasses.asdict(record)), ensure_ascii=False) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)


def read_records(path: Path) -> list[Record]:
    """Read a file of records; a missing file has none.

    Raises:
        BenchmarkError: If a line is not a record, or the file is not UTF-8.
    """
    if not path.exists():
        return []
    records = []
    # A line may hold what splitlines takes for the end of one.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if values.get("value") is None:
                values["value"] = math.nan
            records.append(Record(**values))
        except (ValueError, TypeError, AttributeError) as error:
            raise BenchmarkError(
                f"line {number} of {path} is not a record: {error}. Move the file away, or delete the line"
            ) from error
    return records


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over samples."""
    array = np.asarray(values, dtype=np.float64)
    means = array[_resamples(len(array))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(array.mean()), float(low), float(high)


def gap_interval(
    without: Sequence[float], with_memory: Sequence[float], full: Sequence[float]
) -> tuple[float, float, float]:
    """Gap closed of the means, and its paired 95 % bootstrap interval: the same streams are drawn for all three."""
    arrays = np.asarray([without, with_memory, full], dtype=np.float64)
    drawn = arrays[:, _resamples(arrays.shape[1])].mean(axis=2)
    base, own, best = arrays.mean(axis=1)

    def ratio(none: Any, memory: Any, reference: Any) -> Any:
        gap = none - reference
        return np.where(gap > 0, (none - memory) / np.where(gap > 0, gap, 1.0), np.nan)

    ratios = ratio(*drawn)
    ratios = ratios[np.isfinite(ratios)]
    low, high = np.quantile(ratios, [0.025, 0.975]) if len(ratios) else (np.nan, np.nan)
    return float(ratio(base, own, best)), float(low), float(high)


def _resamples(count: int) -> Any:
    return np.random.default_rng(0).integers(0, count, size=(_RESAMPLES, count))


def without_place(name: str) -> str:
    """A name for records: of what lies in a folder that of the folder, wherever it is."""
    return Path(name).name if Path(name).is_dir() else name


def environment(device: torch.device) -> dict[str, Any]:
    """The fields of a record that say where it was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"device": name, "versions": packages, "git": _commit()}


def _commit() -> str:
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return f"{commit}{'+' if git('status', '--porcelain', '--untracked-files=no') else ''}" if commit else "unknown"
    except OSError:
        return "unknown"
