"""Absorber: endless memory at constant cost for any open-weights language model.

Text that leaves the model's window is absorbed into a small LoRA adapter, by making the model without the text
behave as the model with it (arXiv 2604.20915).

    model, tokenizer = absorber.load()
    memory = absorber.absorb(model, tokenizer, text)
    with memory.applied_to(model):
        model.generate(...)
"""

import importlib
from typing import TYPE_CHECKING, Any

from absorber.config import PRESETS, AbsorbConfig, Preset, StreamConfig, preset
from absorber.errors import (
    AbsorberError,
    AbsorptionError,
    BenchmarkError,
    ConfigError,
    ContextError,
    DeviceMemoryError,
    DivergedError,
    MemoryFileError,
    MemoryMismatchError,
    MissingExtraError,
    ModelError,
    SessionBusyError,
    SessionError,
    SessionNotFoundError,
)
from absorber.version import __version__

if TYPE_CHECKING:
    from absorber.absorbing import absorb
    from absorber.memory import Memory, Round
    from absorber.models import load
    from absorber.progress import Progress
    from absorber.session import Session
    from absorber.session_batch import SessionBatch

# These import torch, so they are imported when first used (PEP 562).
_LAZY = {
    "Memory": "absorber.memory",
    "Round": "absorber.memory",
    "Progress": "absorber.progress",
    "Session": "absorber.session",
    "SessionBatch": "absorber.session_batch",
    "absorb": "absorber.absorbing",
    "load": "absorber.models",
}

__all__ = [
    "PRESETS",
    "AbsorbConfig",
    "AbsorberError",
    "AbsorptionError",
    "BenchmarkError",
    "ConfigError",
    "ContextError",
    "DeviceMemoryError",
    "DivergedError",
    "Memory",
    "MemoryFileError",
    "MemoryMismatchError",
    "MissingExtraError",
    "ModelError",
    "Preset",
    "Progress",
    "Round",
    "Session",
    "SessionBatch",
    "SessionBusyError",
    "SessionError",
    "SessionNotFoundError",
    "StreamConfig",
    "__version__",
    "absorb",
    "load",
    "preset",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'absorber' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
