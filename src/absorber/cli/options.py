"""The flags that commands share, and what they stand for."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from absorber.config import AbsorbConfig, Preset, StreamConfig, preset, read_toml
from absorber.errors import AbsorberError, ConfigError, MemoryFileError

SourceArgument = Annotated[str, Parameter(allow_leading_hyphen=True)]
ModelFlag = Annotated[str | None, Parameter(name="--model")]
BatchFlag = Annotated[int | None, Parameter(name="--batch", validator=Number(gte=1))]
JsonFlag = Annotated[bool, Parameter(name="--json", negative="")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Settings:
    """How text is absorbed: a preset, then a TOML file, then flags, each overriding the one before."""

    preset: str | None = None
    """Settings to begin with: default or paper."""
    config: Path | None = None
    """TOML file with tables [absorb] and [stream], for everything that is no flag."""
    rank: int | None = None
    """Rank of the adapter."""
    seed: int | None = None
    """Seed of the adapter's first weights and of sampling."""
    steps: int | None = None
    """Optimizer steps per round at most (K)."""
    learning_rate: float | None = None
    """Peak learning rate."""
    context_tokens: int | None = None
    """Tokens absorbed per round (n)."""
    sync_tokens: int | None = None
    """Tokens on which teacher and student are compared (m)."""

    def resolve(self, saved: Preset | None = None) -> Preset:
        """Return the settings that the flags stand for.

        Args:
            saved: Those of a memory or session to go on from; they take the place of the default preset.

        Raises:
            ConfigError: If a name is unknown or a value is out of range.
        """
        base = saved if saved is not None and self.preset is None else preset(self.preset or "default")
        if self.config is not None:
            base = read_toml(self.config, base)
        rounds = {
            "rank": self.rank,
            "seed": self.seed,
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
        }
        window = {"context_tokens": self.context_tokens, "sync_tokens": self.sync_tokens}
        return Preset(absorb=base.absorb.replace(**_given(rounds)), stream=base.stream.replace(**_given(window)))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def saved_settings(folder: Path) -> Preset:
    """Read the settings of a saved memory.

    Raises:
        MemoryFileError: If it is missing, foreign or damaged.
    """
    from absorber.memory import Memory

    content = Memory.provenance(folder)
    try:
        return Preset(
            absorb=AbsorbConfig.from_dict(content["config"]), stream=StreamConfig.from_dict(content["stream"])
        )
    except (KeyError, TypeError, AttributeError, AbsorberError) as error:
        raise MemoryFileError(f"{folder} is damaged: {error}. Restore a copy, or begin anew") from error


def refuse_change(wanted: Preset, saved: Preset) -> None:
    """Refuse settings other than those that a session was begun with.

    Raises:
        ConfigError: If one differs; it names all that do.
    """
    old = {**saved.absorb.to_dict(), **saved.stream.to_dict()}
    new = {**wanted.absorb.to_dict(), **wanted.stream.to_dict()}
    changed = [f"{key} {old[key]!r} (got {new[key]!r})" for key in old if old[key] != new[key]]
    if changed:
        raise ConfigError(
            f"the session was begun with {', '.join(changed)}, and a session's settings do not change; leave them out, "
            "or begin another session"
        )


def check_output(folder: Path, *, marker: str) -> None:
    """Refuse a folder that could not be written at the end, before anything that takes long.

    Raises:
        MemoryFileError: If something of others stands there, or there is no writing.
    """
    from absorber.store import check_replaceable, recover

    place = folder.absolute()
    try:
        recover(place)
        check_replaceable(place, marker=marker)
        parent = next(above for above in place.parents if above.exists())
    except OSError as error:
        raise MemoryFileError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise MemoryFileError(f"cannot write to {folder}: {parent} is not a writable folder; choose another")
