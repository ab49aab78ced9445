"""What a method has to offer to be measured.

Shapes: B streams, T tokens.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from absorber.backbone import Backbone
from absorber.bench.reading import KeptReading
from absorber.config import StreamConfig
from absorber.errors import ConfigError
from absorber.notes import Guide

# What is scored after a text needs positions too.
_RESERVED_TOKENS = 1024

Questions = Sequence[Sequence[int]]
"""For each stream the token ids of a question that follows; a method that searches what it has read looks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all methods of one run share."""

    backbone: Backbone
    """The model."""
    stream: StreamConfig
    """n and m."""
    sink_id: int
    """First token of every input."""
    num_streams: int
    """B."""
    seed: int
    """Of the method's randomness."""
    guide: Guide | None = None
    """For study."""

    @property
    def most_tokens(self) -> int:
        """As many tokens of a stream as can be in view at once."""
        limit = self.backbone.max_positions
        return 10**9 if limit is None else limit - _RESERVED_TOKENS


class Reader:
    """B streams being read by one method."""

    def __init__(self, setting: Setting) -> None:
        """Begin with nothing read."""
        self.setting = setting
        self.recent_BT = torch.zeros(setting.num_streams, 0, dtype=torch.long)
        """The last tokens, as many as the method keeps."""

    @property
    def kept_tokens(self) -> int:
        """How many of the last tokens stay verbatim: m, unless the method says otherwise."""
        return self.setting.stream.sync_tokens

    def read(self, token_ids_BT: Tensor) -> None:
        """Read what comes next: the first m tokens at first, then n a round."""
        self.recent_BT = torch.cat([self.recent_BT, token_ids_BT], dim=1)[:, -self.kept_tokens :]

    def windowed(self, questions: Questions | None = None) -> Tensor:
        """What stands before a passage, or one question a stream, that follows the stream [B, T]."""
        return self.recent_BT

    def contextless(self, questions: Questions | None = None) -> Tensor:
        """What stands before a passage, or one question a stream, when the window is taken away [B, T]."""
        return self.recent_BT[:, :0]

    def reading(self) -> KeptReading | None:
        """What stands in the place of `windowed` for a method that keeps no tokens, but a cache of its own."""
        return None

    def close(self) -> None:
        """Give back what the reader holds; it is not used any more."""

    def speaking(self) -> contextlib.AbstractContextManager[None]:
        """The model as it is after this reading, memory attached."""
        return contextlib.nullcontext()


class Method(abc.ABC):
    """A way to read streams."""

    @abc.abstractmethod
    def begin(self, setting: Setting) -> Reader:
        """Make a reader for B fresh streams."""

    def config(self) -> dict[str, Any]:
        """What a record says of the method's settings."""
        return {}

    def replace(self, **changes: Any) -> Self:
        """Return the same method with some settings changed: those of a dataclass are its fields.

        Raises:
            ConfigError: If a setting is unknown or out of range.
        """
        known: list[str] = [field.name for field in dataclasses.fields(self)] if dataclasses.is_dataclass(self) else []
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise ConfigError(
                f"{type(self).__name__} has no setting {', '.join(unknown)}; there are {', '.join(known) or 'none'}"
            )
        try:
            return dataclasses.replace(self, **changes) if changes else self  # type: ignore[type-var]
        except TypeError as error:
            raise ConfigError(f"a setting of {type(self).__name__} is of a wrong type: {error}") from error
