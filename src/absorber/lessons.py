"""What the steps of a round train on: the round's own text, earlier ones again, and text that should not change.

The paper trains on the round's own X and Y alone. Over many rounds that forgets what came before, and changes what the
model says of other things; replay and anchors are against both (docs/method.md).

Shapes: B streams, N context tokens, M subsequent tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from absorber.config import AbsorbConfig
from absorber.synchronization import Target

Item = TypeVar("Item")


@dataclass(slots=True, eq=False)
class Past:
    """What is kept of an earlier round, on the CPU."""

    context_BN: Tensor
    """X."""
    subsequent_BM: Tensor
    """Y."""
    target: Target | None = None
    """What the pristine base says of Y, once it was asked; that never changes."""


@dataclass(slots=True, eq=False)
class Lesson:
    """One text that the student learns from."""

    context_BN: Tensor
    """X; no tokens for an anchor."""
    subsequent_BM: Tensor
    """Y, or what stands in its place."""
    num_generated: int
    """How many of its last tokens a model wrote; the next-token term leaves them out."""
    segments: tuple[int, ...]
    """Into how many pieces the student's Y is cut, step by step in turn."""
    is_anchor: bool = False
    """Whether the teacher is the base whatever the settings, and reads the pieces one by one as well."""
    target: Target | None = None
    """What the teacher says of it, once it was asked."""
    past: Past | None = None
    """The earlier round that it is of."""

    @classmethod
    def again(cls, past: Past, segments: tuple[int, ...], device: torch.device) -> "Lesson":
        """An earlier round as a lesson, on a device."""
        target = None if past.target is None else past.target.to(device)
        return cls(past.context_BN.to(device), past.subsequent_BM.to(device), 0, segments, target=target, past=past)

    def taught(self, target: Target, *, by_base: bool) -> None:
        """Take what the teacher says; what the base says of an earlier round is kept for later ones.

        Hidden states are not: they are as large as L texts.
        """
        self.target = target
        if self.past is not None and by_base and not target.layers:
            self.past.target = target.to("cpu")

    def pieces(self, step: int) -> int:
        """Into how many pieces Y is cut in a step: at most so many as divide it evenly."""
        wanted = min(self.segments[step % len(self.segments)], self.subsequent_BM.shape[1] // 2)
        return next(count for count in range(max(1, wanted), 0, -1) if self.subsequent_BM.shape[1] % count == 0)


class Lessons:
    """The lessons of one round. Step 0 and the look after the last step are on the round's own text."""

    def __init__(
        self,
        own: Lesson,
        *,
        past: Sequence[Past],
        anchors: Tensor | None,
        config: AbsorbConfig,
        round_number: int,
    ) -> None:
        """Draw what each step is on; the same for all streams, and for the same seed and round.

        Args:
            own: The round's own text.
            past: Earlier rounds.
            anchors: Texts [Q, A] on which the model should stay as it is.
            config: Shares and seed.
            round_number: From 1.
        """
        dice = random.Random(f"{config.seed}/{round_number}")
        self.own = own
        drawn: dict[int, Lesson] = {}
        anchor = None if anchors is None or not config.has_anchors else _anchor(own, anchors, dice)
        self._of_step: list[Lesson] = []
        for step in range(config.max_steps):
            text = own
            if step and anchor is not None and dice.random() < config.anchor_share:
                text = anchor
            elif step and past and dice.random() < config.replay_share:
                place = dice.randrange(len(past))
                if place not in drawn:
                    drawn[place] = Lesson.again(past[place], config.segments, own.subsequent_BM.device)
                text = drawn[place]
            self._of_step.append(text)
        self._of_step.append(own)

    def of_step(self, step: int) -> Lesson:
        """The text of a step, from 0; of K, the look after the last."""
        return self._of_step[step]


def _anchor(own: Lesson, anchors: Tensor, dice: random.Random) -> Lesson:
    """Some of the texts, together about as long as Y, read one by one."""
    num_texts, num_tokens = anchors.shape
    chosen = dice.sample(range(num_texts), max(1, min(num_texts, own.subsequent_BM.shape[1] // num_tokens)))
    row = anchors[chosen].flatten().to(own.subsequent_BM.device)
    text_BM = row.expand(own.subsequent_BM.shape[0], -1)
    return Lesson(text_BM[:, :0], text_BM, text_BM.shape[1], (len(chosen),), is_anchor=True)


class Reservoir(Generic[Item]):
    """A sample of what the rounds left, of constant size, each as likely as any other (Vitter's Algorithm R)."""

    def __init__(self, size: int, *, seed: object) -> None:
        """Begin with none."""
        self._size, self._seed = size, seed
        self.items: list[Item] = []
        """At most `size`."""

    def add(self, item: Item, *, round_number: int) -> None:
        """Take a round's, or not.

        Args:
            item: What could be kept of it.
            round_number: From 1; decides together with the seed.
        """
        if len(self.items) < self._size:
            self.items.append(item)
        elif self._size:
            place = random.Random(f"{self._seed}/reservoir/{round_number}").randrange(round_number)
            if place < self._size:
                self.items[place] = item
