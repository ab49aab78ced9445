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
from absorber.synchronization import Target, to_host

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

    def keep(self, target: Target) -> None:
        """Take what the base says of Y."""
        self.target = target.to_host()


class Anchors:
    """Texts that the base wrote from nothing, on which the model should stay as it is; and what it says of them."""

    def __init__(self, texts_QA: Tensor) -> None:
        """Take Q texts of A tokens, on the CPU."""
        self.texts_QA = texts_QA
        self.said: dict[int, Tensor] = {}
        """Final states [A, D] of the texts that the base was asked for, on the CPU; they never change."""

    def draw(self, own: "Lesson", dice: random.Random) -> "Lesson":
        """Some of the texts, together about as long as the Y of a lesson, read one by one."""
        num_texts, num_tokens = self.texts_QA.shape
        like_BM = own.subsequent_BM
        chosen = dice.sample(range(num_texts), max(1, min(num_texts, like_BM.shape[1] // num_tokens)))
        text_BM = self.texts_QA[chosen].flatten().to(like_BM.device).expand(len(like_BM), -1)
        count = text_BM.shape[1]
        target = self._target(chosen, len(like_BM), like_BM.device)
        source = _Drawn(self, chosen)
        return Lesson(text_BM[:, :0], text_BM, count, (len(chosen),), is_anchor=True, target=target, source=source)

    def _target(self, chosen: Sequence[int], num_streams: int, device: torch.device) -> Target | None:
        if any(place not in self.said for place in chosen):
            return None
        final_MD = torch.cat([self.said[place].to(device, non_blocking=True) for place in chosen])
        return Target(layers=(), finals=((1.0, final_MD.expand(num_streams, -1, -1)),))


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The texts of a lesson."""

    anchors: Anchors
    chosen: Sequence[int]

    def keep(self, target: Target) -> None:
        """Take what the base says of them, which is the same in all streams."""
        ((_, final_BMD),) = target.finals
        for place, final_AD in zip(self.chosen, final_BMD[0].chunk(len(self.chosen)), strict=True):
            self.anchors.said[place] = to_host(final_AD)  # of its own: drawn texts come in many groups


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
    source: Past | _Drawn | None = None
    """Where what the base says of it is kept."""

    @classmethod
    def again(cls, past: Past, segments: tuple[int, ...], device: torch.device) -> "Lesson":
        """An earlier round as a lesson, on a device."""
        target = None if past.target is None else past.target.to(device)
        return cls(past.context_BN.to(device), past.subsequent_BM.to(device), 0, segments, target=target, source=past)

    def taught(self, target: Target, *, by_base: bool) -> None:
        """Take what the teacher says; what the base says is kept for later rounds.

        Hidden states are not: they are as large as L texts.
        """
        self.target = target
        if self.source is not None and (by_base or self.is_anchor) and not target.layers:
            self.source.keep(target)

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
            source=None,
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
        anchors: Anchors | None,
        config: AbsorbConfig,
        round_number: int,
    ) -> None:
        """Draw what each step is on; the same for all streams, and for the same seed and round.

        Args:
            own: The round's own text.
            past: Earlier rounds.
            anchors: Texts on which the model should stay as it is.
            config: Shares and seed.
            round_number: From 1.
        """
        dice = random.Random(f"{config.seed}/{round_number}")
        self.own = own
        self.peaks = (settled(config, round_number),)
        self._by_base = config.teacher == "base"
        drawn: dict[int, Lesson] = {}
        anchor = None if anchors is None or not config.has_anchors else anchors.draw(own, dice)
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
