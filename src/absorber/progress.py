"""Where a session stands, told to whoever wants to show it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from absorber.memory import Round
from absorber.stream import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a session stands, for whoever shows it."""

    num_tokens: int
    """Tokens that have entered the window or are absorbed."""
    num_rounds: int
    """Rounds finished."""
    work: Work | Literal["synchronizing"] = "synchronizing"
    """What is being done. Before the first round texts are written to which the model is held, with study questions are
    written and learned; these may take longer than the round."""
    step: int
    """Step of that work, from 0; `max_steps` when a round's last loss was taken."""
    max_steps: int
    """How many there are; K while synchronizing."""
    loss: float
    """Synchronization loss before that step; nan in other work."""
    finished: Round | None
    """The round that has just ended, or None."""


OnProgress = Callable[[Progress], None]
