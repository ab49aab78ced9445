"""What the steps of a round train on: the round's own text, earlier ones again, study, and text that should not change.

The paper trains on the round's own X and Y alone. Over many rounds that forgets what came before, and changes what the
model says of other things; replay and anchors are against both. And nothing in Y depends on the facts of X, so that
they are lost; study is against that (docs/method.md).

Shapes: B streams, N context tokens, M subsequent tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from absorber.config import AbsorbConfig
from absorber.synchronization import Target

Pair = tuple[Tensor, Tensor]
Kind = Literal["text", "reread", "written", "anchor"]


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
    kind: Kind = "text"
    """text: Y follows X in the stream. reread: X again in pieces, learned by heart, with no teacher. written: pieces
    that the model wrote about X. anchor: pieces on which the model should stay as it is; the teacher is the base."""
    target: Target | None = None
    """What the teacher says of it, once it was asked."""

    @property
    def isolated(self) -> bool:
        """Whether the teacher, too, reads each piece as if there were no other."""
        return self.kind in ("written", "anchor")

    def pieces(self, step: int) -> int:
        """Into how many pieces Y is cut in a step: at most so many as divide it evenly."""
        wanted = min(self.segments[step % len(self.segments)], self.subsequent_BM.shape[1] // 2)
        return next(count for count in range(max(1, wanted), 0, -1) if self.subsequent_BM.shape[1] % count == 0)


class Lessons:
    """The lessons of one round. Step 0 and the look after the last step are on the round's own text."""

    def __init__(
        self, own: Lesson, *, replayed: Sequence[Pair], anchors: Tensor | None, config: AbsorbConfig, round_number: int
    ) -> None:
        """Draw what each step is on; the same for all streams, and for the same seed and round.

        Args:
            own: The round's own text.
            replayed: Earlier pairs (X, Y).
            anchors: Texts [Q, A] on which the model should stay as it is.
            config: Shares and seed.
            round_number: From 1.
        """
        dice = random.Random(f"{config.seed}/{round_number}")
        self.own = own
        earlier = [Lesson(context, subsequent, 0, config.segments) for context, subsequent in replayed]
        anchor = None if anchors is None or not config.has_anchors else _anchor(own, anchors, dice)
        self._of_step = [own]
        for _ in range(1, config.max_steps):
            lesson = own
            if anchor is not None and dice.random() < config.anchor_share:
                lesson = anchor
            else:
                if earlier and dice.random() < config.replay_share:
                    lesson = dice.choice(earlier)
                if config.study != "off" and dice.random() < config.study_share:
                    lesson = _reread(lesson, config.study_tokens, dice)
            self._of_step.append(lesson)
        self._of_step.append(own)

    def of_step(self, step: int) -> Lesson:
        """The lesson of a step, from 0; of K, the look after the last."""
        return self._of_step[step]


def _anchor(own: Lesson, anchors: Tensor, dice: random.Random) -> Lesson:
    """Some of the texts, together about as long as Y, read one by one."""
    num_texts, num_tokens = anchors.shape
    chosen = dice.sample(range(num_texts), max(1, min(num_texts, own.subsequent_BM.shape[1] // num_tokens)))
    row = anchors[chosen].flatten().to(own.subsequent_BM.device)
    text_BM = row.expand(own.subsequent_BM.shape[0], -1)
    return Lesson(text_BM[:, :0], text_BM, text_BM.shape[1], (len(chosen),), kind="anchor")


def _reread(lesson: Lesson, piece_tokens: int, dice: random.Random) -> Lesson:
    """The lesson's X in short pieces, cut elsewhere each time, so that any place may come to stand first."""
    num_tokens = lesson.context_BN.shape[1]
    piece_tokens = max(2, min(piece_tokens, num_tokens // 2))
    first = dice.randrange(min(piece_tokens, num_tokens - piece_tokens + 1))
    count = (num_tokens - first) // piece_tokens
    text_BM = lesson.context_BN[:, first : first + count * piece_tokens]
    return Lesson(text_BM[:, :0], text_BM, 0, (count,), kind="reread", target=Target(layers=(), finals=()))


class Reservoir:
    """A sample of the rounds so far, of constant size, each as likely as any other (Vitter's Algorithm R)."""

    def __init__(self, size: int, *, seed: int) -> None:
        """Begin with none."""
        self._size, self._seed = size, seed
        self.pairs: list[Pair] = []
        """At most `size` pairs (X, Y)."""

    def add(self, pair: Pair, *, round_number: int) -> None:
        """Take a round's text, or not.

        Args:
            pair: X and Y.
            round_number: From 1; decides together with the seed.
        """
        if len(self.pairs) < self._size:
            self.pairs.append(pair)
        elif self._size:
            place = random.Random(f"{self._seed}/reservoir/{round_number}").randrange(round_number)
            if place < self._size:
                self.pairs[place] = pair
