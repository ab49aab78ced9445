"""What the steps of a round train on: the round's own text, earlier ones again, and text that should not change.

The paper trains on the round's own X and Y alone. Over many rounds that forgets what came before, and changes what the
model says of other things; replay and anchors are against both (docs/method.md).

Shapes: B streams, N context tokens, M subsequent tokens.
"""

import dataclasses
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from absorber.config import AbsorbConfig
from absorber.optimizer import settled
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

    def rows(self, rows: Tensor) -> "Lesson":
        """The lesson of some streams."""
        target = None if self.target is None else self.target.rows(rows)
        texts = self.context_BN[rows], self.subsequent_BM[rows]
        return dataclasses.replace(self, context_BN=texts[0], subsequent_BM=texts[1], target=target)

    @classmethod
    def joined(cls, lessons: "Sequence[Lesson]") -> "Lesson":
        """One lesson of several streams, of a lesson of each; its target is joined of theirs where all have one."""
        targets = [lesson.target for lesson in lessons if lesson.target is not None]
        return dataclasses.replace(
            lessons[0],
            context_BN=torch.cat([lesson.context_BN for lesson in lessons]),
            subsequent_BM=torch.cat([lesson.subsequent_BM for lesson in lessons]),
            target=Target.joined(targets) if len(targets) == len(lessons) else None,
            past=None,
        )

    def pieces(self, step: int) -> int:
        """Into how many pieces Y is cut in a step: at most so many as divide it evenly."""
        wanted = min(self.segments[step % len(self.segments)], self.subsequent_BM.shape[1] // 2)
        return next(count for count in range(max(1, wanted), 0, -1) if self.subsequent_BM.shape[1] % count == 0)


@dataclass(frozen=True, slots=True)
class Part:
    """What some streams train on in a step, together."""

    lesson: Lesson
    """Of those streams alone."""
    rows: Tensor | None
    """Which they are, on the CPU; None for all."""
    own: tuple[bool, ...] | bool
    """Whether it is the round's own text: of each of those streams, or of all."""


Ask = Callable[[Lesson, Tensor | None], Target]
"""What the teacher says of a lesson of some streams, or of all."""


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
        self.peaks = (settled(config, round_number),)
        self._by_base = config.teacher == "base"
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

    def parts(self, step: int, running_B: Tensor, ask: Ask) -> list[Part]:
        """What the running streams train on in a step, with what the teacher says of it."""
        lesson = self.of_step(step)
        if lesson.target is None:
            self.take(lesson, ask(lesson, None))
        if running_B.all():
            return [Part(lesson, None, lesson is self.own)]
        rows = running_B.nonzero().flatten()
        return [Part(lesson.rows(rows), rows, lesson is self.own)]

    def take(self, lesson: Lesson, target: Target) -> None:
        """Note what the teacher said of a lesson."""
        lesson.taught(target, by_base=self._by_base)


class LessonsTogether:
    """The lessons of a round of streams of different age, each of which trains on what it would train on alone."""

    def __init__(self, each: Sequence[Lessons]) -> None:
        """Take the lessons of each stream, all of whose own texts have one shape."""
        self._each = each
        self.peaks = tuple(peak for lessons in each for peak in lessons.peaks)

    def parts(self, step: int, running_B: Tensor, ask: Ask) -> list[Part]:
        """What the running streams train on in a step: those whose texts have one shape together."""
        groups: dict[Hashable, list[int]] = {}
        for index in running_B.nonzero().flatten().tolist():
            lesson = self._each[index].of_step(step)
            shape = (lesson.context_BN.shape, lesson.subsequent_BM.shape, lesson.num_generated, lesson.pieces(step))
            groups.setdefault((shape, lesson.is_anchor), []).append(index)
        return [self._part(step, indices, ask) for indices in groups.values()]

    def _part(self, step: int, indices: list[int], ask: Ask) -> Part:
        lessons = [self._each[index].of_step(step) for index in indices]
        untaught = [index for index, lesson in zip(indices, lessons, strict=True) if lesson.target is None]
        if untaught:
            asked = [self._each[index].of_step(step) for index in untaught]
            target = ask(Lesson.joined(asked), torch.tensor(untaught))
            for place, (index, lesson) in enumerate(zip(untaught, asked, strict=True)):
                self._each[index].take(lesson, target.rows(torch.tensor([place])))
        rows = None if len(indices) == len(self._each) else torch.tensor(indices)
        own = tuple(lesson is self._each[index].own for index, lesson in zip(indices, lessons, strict=True))
        return Part(Lesson.joined(lessons), rows, own)


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
