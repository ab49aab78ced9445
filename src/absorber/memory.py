"""A memory: absorbed weights, where they come from, and the ledger of their rounds.

On disk it is a PEFT LoRA folder with one file more, `absorber.json`, so that PEFT, vLLM and SGLang load it as it is.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from absorber.adapter import Adapter, load_peft, save_peft
from absorber.backbone import base_name, fingerprint, inspect, untouched
from absorber.config import AbsorbConfig, StreamConfig
from absorber.errors import AbsorberError, ConfigError, MemoryFileError, MemoryMismatchError
from absorber.store import read_json, recover, whole_folder, write_json
from absorber.version import __version__

FORMAT = 1
PROVENANCE = "absorber.json"

# What the weights have been made with.
_FIXED = ("rank", "alpha", "target_modules", "adapted_layers", "adapter_dtype", "sink")

# The ledger keeps this many last rounds, so that a memory's size does not grow with its stream.
_LEDGER_ROUNDS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One line of the ledger."""

    number: int
    """From 1, over the whole stream."""
    context_tokens: int
    """Tokens absorbed."""
    sync_tokens: int
    """Tokens on which teacher and student were compared."""
    generated_tokens: int
    """How many of those the model wrote itself."""
    num_steps: int
    """Optimizer steps taken."""
    loss_before: float
    """Synchronization loss before the first step."""
    loss_after: float
    """The same after the last step; if the round was rolled back, what led to that."""
    outcome: str
    """See `absorption.RoundResult.outcome`."""
    seconds: float
    """Wall time."""

    @property
    def rolled_back(self) -> bool:
        """Whether the memory is as it was before this round."""
        return self.outcome.startswith("rolled_back")


@dataclass(slots=True, kw_only=True)
class Memory:
    """What one stream's adapter has absorbed."""

    adapter: Adapter
    """The weights, one stream."""
    base: str
    """Name under which `load` finds the base model."""
    fingerprint: str
    """Identity of the base model's weights."""
    sink_id: int
    """First token of teacher and student when it was absorbed."""
    config: AbsorbConfig
    """How a round was absorbed."""
    stream: StreamConfig
    """How the stream was cut."""
    num_rounds: int = 0
    """Rounds so far, those rolled back included."""
    num_rolled_back: int = 0
    """Rounds that were undone."""
    num_tokens: int = 0
    """Tokens that left the window so far, those of undone rounds included."""
    ledger: list[Round] = field(default_factory=list)
    """The last rounds, oldest first; at most 1000."""

    @classmethod
    def fresh(cls, model: Any, *, sink_id: int, config: AbsorbConfig, stream: StreamConfig) -> "Memory":
        """Begin with a memory that changes nothing.

        Raises:
            ModelError: If the model cannot be used.
            ConfigError: If the configuration names modules or layers that it does not have.
        """
        return cls(
            adapter=Adapter.fresh(inspect(model), config),
            base=base_name(model),
            fingerprint=fingerprint(model),
            sink_id=sink_id,
            config=config,
            stream=stream,
        )

    def note(self, line: Round) -> None:
        """Write a round into the ledger."""
        self.num_rounds += 1
        self.num_rolled_back += line.rolled_back
        self.num_tokens += line.context_tokens
        self.ledger.append(line)
        del self.ledger[:-_LEDGER_ROUNDS]

    @contextlib.contextmanager
    def applied_to(self, model: Any) -> Iterator[Any]:
        """Give the model this memory inside the `with` block; afterwards it is bit for bit what it was.

        Raises:
            MemoryMismatchError: If the memory was absorbed with another model.
            ModelError: If a memory is already applied.
        """
        self.check(model)
        with untouched(model), self.adapter.attached(inspect(model)):
            yield model

    def check(self, model: Any) -> None:
        """Refuse a model other than the one this memory was absorbed with.

        Raises:
            MemoryMismatchError: If it is another.
        """
        _check_base(model, self.fingerprint, base=self.base, what="this memory")

    def go_on_with(self, config: AbsorbConfig, stream: StreamConfig) -> None:
        """Take other settings for the rounds to come.

        Raises:
            ConfigError: If the weights cannot go on with them.
        """
        for name in _FIXED:
            begun, got = getattr(self.config, name), getattr(config, name)
            if begun != got:
                raise ConfigError(
                    f"the memory has {name} {begun!r}; got {got!r}. This cannot change once it is begun; leave it "
                    "out or begin a new memory"
                )
        self.config, self.stream = config, stream

    # --- On disk

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        """Write a PEFT folder, whole or not at all; an older memory at that place is replaced.

        Args:
            folder: The place.
            dtype: Type of the stored weights; float32 keeps them exactly.

        Raises:
            MemoryFileError: If something that is not a memory stands there, or it cannot be written.
        """
        with whole_folder(Path(folder), marker=PROVENANCE) as scratch:
            self.write(scratch, dtype=dtype)

    def write(self, folder: Path, *, dtype: str = "float32") -> None:
        """Write the files into an existing folder; `save` does it safely."""
        save_peft(self.adapter, folder, base=self.base, dtype=getattr(torch, dtype))
        write_json(
            folder / PROVENANCE,
            {
                "format": FORMAT,
                "absorber": __version__,
                "base": self.base,
                "fingerprint": self.fingerprint,
                "sink_id": self.sink_id,
                "config": self.config.to_dict(),
                "stream": self.stream.to_dict(),
                "num_rounds": self.num_rounds,
                "num_rolled_back": self.num_rolled_back,
                "num_tokens": self.num_tokens,
                "ledger": [_plain(line) for line in self.ledger],
            },
        )

    @staticmethod
    def provenance(folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Read what a saved memory says of itself, without a model.

        Raises:
            MemoryFileError: If the folder is missing, is not a memory of ours, or is of a later format.
        """
        place = Path(folder)
        recover(place)
        if not place.is_dir():
            raise MemoryFileError(f"there is no folder {place}; give one that `absorber absorb --output` wrote")
        if not (place / PROVENANCE).is_file():
            raise MemoryFileError(
                f"{place} is not a memory of Absorber: it has no {PROVENANCE}. Give a folder that "
                "`absorber absorb --output` wrote"
            )
        content = read_json(place / PROVENANCE)
        if not isinstance(content.get("format"), int) or content["format"] > FORMAT:
            raise MemoryFileError(
                f"{place} has format {content.get('format')!r}; this version reads up to {FORMAT}. "
                "Install a newer absorber"
            )
        return content

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Any) -> "Memory":
        """Read a memory that `save` wrote, for its base model.

        Raises:
            MemoryFileError: If the folder is missing, damaged or not a memory.
            MemoryMismatchError: If it is a memory of another model.
        """
        content = cls.provenance(folder)
        try:
            fields = {key: content[key] for key in ("base", "fingerprint", "sink_id")}
            fields |= {key: content[key] for key in ("num_rounds", "num_rolled_back", "num_tokens")}
            fields["config"] = AbsorbConfig.from_dict(content["config"])
            fields["stream"] = StreamConfig.from_dict(content["stream"])
            fields["ledger"] = [_round(line) for line in content["ledger"]]
        except (KeyError, TypeError, AttributeError, AbsorberError) as error:
            raise MemoryFileError(f"{Path(folder) / PROVENANCE} is damaged: {error}") from error
        _check_base(model, fields["fingerprint"], base=fields["base"], what=f"the memory in {folder}")
        kind = getattr(torch, fields["config"].adapter_dtype)
        return cls(adapter=load_peft(inspect(model), Path(folder), dtype=kind), **fields)


def _check_base(model: Any, expected: str, *, base: str, what: str) -> None:
    if fingerprint(model) != expected:
        raise MemoryMismatchError(
            f"{what} was absorbed with {base}, and {base_name(model)} is another model (its weights' fingerprint "
            "differs); load the model it was absorbed with"
        )


def _plain(line: Round) -> dict[str, Any]:
    """A line of the ledger for JSON, which has no word for what is not finite."""
    values = dataclasses.asdict(line)
    return {key: None if value != value or value in (math.inf, -math.inf) else value for key, value in values.items()}


def _round(values: dict[str, Any]) -> Round:
    filled: dict[str, Any] = {key: math.nan if value is None else value for key, value in values.items()}
    return Round(**filled)
