"""Where a session stands, told to whoever wants to show it."""

from collections.abc import Callable
from dataclasses import dataclass

from absorber.memory import Round


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a session stands, for whoever shows it."""

    num_tokens: int
    """Tokens that have entered the window or are absorbed."""
    num_rounds: int
    """Rounds finished."""
    step: int
    """Step of the running round, from 0; `max_steps` when its last loss was taken."""
    max_steps: int
    """K."""
    loss: float
    """Synchronization loss before that step."""
    finished: Round | None
    """The round that has just ended, or None."""


OnProgress = Callable[[Progress], None]
