"""Tasks that read a long context and ask about it once, after the last round.

Each stream is a context of its own, made of whole pieces (examples, paragraphs, dialogues), with questions of its own
as far as there are so many; then some are asked after several streams. They are asked given the window and the memory
(windowed) and the memory alone (contextless); the yardstick is the same model with everything in view, as far as its
positions reach (full).

Shapes: B streams, T tokens.
"""

import abc
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from absorber.backbone import eos_tokens, untouched
from absorber.bench.methods import Questions, Reader, Setting
from absorber.bench.methods.full import Full
from absorber.bench.reading import Reading, write_greedily
from absorber.bench.records import Record
from absorber.bench.task import Checkpoint, Task
from absorber.errors import BenchmarkError
from absorber.notes import Guide
from absorber.text import cut

# Without a memory of their own streams need not share a batch, and what full attention reads is long.
_FULL_STREAMS = 4

Figures = dict[str, list[float]]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Query:
    """One question about a stream."""

    prompt: list[int]
    """Tokens that stand before the answer."""
    references: tuple[str, ...]
    """Right answers, the main one first."""
    sought: list[int]
    """What a method that searches looks for: the question itself, without examples and the words around it."""


@dataclass(frozen=True, slots=True)
class Language:
    """A tokenizer, as far as it is needed to ask."""

    tokenizer: Any
    """Of the model."""
    end_ids: set[int]
    """Tokens that end a text."""

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "Language":
        """Look up what ends a text."""
        return cls(tokenizer, eos_tokens(model, tokenizer))

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, without special ones."""
        return [
            token for piece in cut([text]) for token in self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ]

    def first_line(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """Return the first line of a text that is not blank, and whether it has come to its end."""
        kept = next((at for at, token in enumerate(token_ids) if token in self.end_ids), len(token_ids))
        line, newline, _ = str(self.tokenizer.decode(token_ids[:kept])).lstrip().partition("\n")
        return line.strip(), bool(newline) or kept < len(token_ids)


@dataclass(slots=True)
class Asked:
    """The contexts and questions of one run, the same for all methods."""

    token_ids_BT: Tensor
    """What is read: m + n * rounds tokens."""
    guide: Guide
    """For study."""
    queries: list[list[Query]]
    """Of each stream, as many of all."""
    language: Language
    """To write answers."""
    full: Figures = field(default_factory=dict)
    """What full attention answers; filled when first needed."""

    def of_streams(self, rows: slice) -> Self:
        """Those of some streams."""
        return replace(self, token_ids_BT=self.token_ids_BT[rows], queries=self.queries[rows], full={})


@dataclass(frozen=True, slots=True, kw_only=True)
class AskingTask(Task):
    """What such tasks share."""

    units: ClassVar[Mapping[str, str]]
    """Of each metric; those that stand in the tables first come first."""
    num_rounds: int = 10
    num_queries: int = 2
    """Questions for each stream."""

    @property
    def checkpoints(self) -> list[int]:
        """After which rounds is asked: the last."""
        return [self.num_rounds]

    @property
    def num_tokens(self) -> int:
        """N, the length of a context."""
        return self.sync_tokens + self.context_tokens * self.num_rounds

    @abc.abstractmethod
    def answer(self, reading: Reading, queries: Sequence[Sequence[Query]], texts: Any) -> Figures:
        """Ask each stream its questions, and judge the answers.

        Args:
            reading: Of the streams.
            queries: Of each of them.
            texts: From `prepare`.

        Returns:
            By metric one number per question, those of stream 0 first.
        """

    def remark(self, texts: Any) -> str:
        """Say how many questions differ, if not all do."""
        asked = [(*query.prompt, query.references) for own in texts.queries for query in own]
        if (differ := len(set(asked))) == len(asked):
            return ""
        return (
            f"only {differ} of the {len(asked)} questions differ; some are asked after several streams, which the "
            "intervals take for independent, so that they are too narrow"
        )

    def examine(self, setting: Setting, reader: Reader, texts: Any, number: int) -> Figures:
        """Ask in every view; the figures are named metric/view."""
        backbone = setting.backbone
        found: dict[str, Figures] = {}
        with untouched(backbone.model):
            if not texts.full:
                texts.full = self._with_everything(setting, texts)
            found["full"] = texts.full
            with reader.speaking():
                kept = reader.reading()
                if kept is not None:
                    found["windowed"] = self.answer(kept, texts.queries, texts)
                else:
                    found["windowed"] = self._after(setting, reader.windowed, texts)
                found["contextless"] = self._after(setting, reader.contextless, texts)
        return {f"{metric}/{view}": values for view, figures in found.items() for metric, values in figures.items()}

    def _after(self, setting: Setting, read: Callable[[Questions], Tensor], texts: Asked) -> Figures:
        """Ask after what a reader puts before the questions, which it is told, one a stream at a time."""
        turns = list(zip(*texts.queries, strict=True))
        prefixes = [read([query.sought for query in turn]) for turn in turns]
        searches = any(not torch.equal(prefix_BT, prefixes[0]) for prefix_BT in prefixes)
        if searches:
            asked = [[[query] for query in turn] for turn in turns]
        else:  # one reading serves all
            prefixes, asked = prefixes[:1], [texts.queries]
        backbone, found = setting.backbone, []
        for prefix_BT, queries in zip(prefixes, asked, strict=True):
            reading = Reading.of(backbone, prefix_BT.to(backbone.device), sink_id=setting.sink_id)
            found.append(self.answer(reading, queries, texts))
        if len(found) == 1:
            return found[0]
        return {metric: by_stream([figures[metric] for figures in found]) for metric in found[0]}

    def _with_everything(self, setting: Setting, texts: Asked) -> Figures:
        full = Full().begin(setting)
        full.read(texts.token_ids_BT)
        found: Figures = {}
        for first in range(0, setting.num_streams, _FULL_STREAMS):
            rows = slice(first, first + _FULL_STREAMS)
            prefix_BT = full.windowed()[rows].to(setting.backbone.device)
            reading = Reading.of(setting.backbone, prefix_BT, sink_id=setting.sink_id)
            for metric, values in self.answer(reading, texts.queries[rows], texts).items():
                found.setdefault(metric, []).extend(values)
        return found

    def to_records(
        self,
        method: str,
        method_config: dict[str, Any],
        measured: Sequence[Checkpoint],
        reference: Sequence[Checkpoint],
        facts: dict[str, Any],
    ) -> list[Record]:
        """Write what a method measured as records, one sample a stream; there is no reference."""
        records = []
        for checkpoint in measured:
            record = partial(self.record, method, method_config, facts, checkpoint)
            for name, values in checkpoint.metrics.items():
                metric, view = name.split("/")
                size = len(values) // self.num_streams
                means = [sum(values[first : first + size]) / size for first in range(0, len(values), size)]
                records.append(record(metric, means, self.units[metric], view=view))
        return records


@dataclass(frozen=True, slots=True, kw_only=True)
class WritingTask(AskingTask):
    """Tasks whose answers are written."""

    max_new_tokens: int
    """Tokens of an answer at most; it ends with its first line."""

    @abc.abstractmethod
    def judge(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """Judge a written answer; the numbers by metric."""

    def write(self, reading: Reading, queries: Sequence[Sequence[Query]], language: Language) -> Figures:
        """Let each stream write its answers, and judge them."""
        turns: list[list[str]] = []  # by stream, the answers of some queries at once
        for some in batched(list(zip(*queries, strict=True)), reading.width):
            written = write_greedily(
                reading.widened(len(some)) if len(some) > 1 else reading,
                [query.prompt for own in zip(*some, strict=True) for query in own],
                max_new_tokens=self.max_new_tokens,
                is_done=lambda token_ids: language.first_line(token_ids)[1],
            )
            lines = [language.first_line(token_ids)[0] for token_ids in written]
            turns += [lines[place :: len(some)] for place in range(len(some))]
        found: Figures = {}
        asked = (query for own in queries for query in own)
        for answer, query in zip(by_stream(turns), asked, strict=True):
            for metric, value in self.judge(answer, query.references).items():
                found.setdefault(metric, []).append(value)
        return found


def batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Cut a sequence into pieces of so many; the last one may be shorter."""
    for first in range(0, len(items), size):
        yield items[first : first + size]


def by_stream(turns: Iterable[Sequence[Item]]) -> list[Item]:
    """Put what was found turn by turn, one per stream, in the order of the streams."""
    return [value for own in zip(*turns, strict=True) for value in own]


def fill(
    needed: Sequence[list[int]], others: Iterable[list[int]], num_tokens: int, dice: random.Random, *, what: str
) -> list[int]:
    """Make a context of so many tokens of pieces in random order.

    Args:
        needed: Pieces that have to be in it.
        others: Pieces to fill it with; the last one taken comes first and is cut at its beginning, to make the length.
        num_tokens: N.
        dice: Of the order.
        what: What an error calls the pieces.

    Raises:
        BenchmarkError: If the needed pieces are too long, or all pieces together too short.
    """
    pieces, missing = list(needed), num_tokens - sum(map(len, needed))
    if missing < 0:
        raise BenchmarkError(
            f"the {what} asked for take {num_tokens - missing} tokens of {num_tokens}; use more rounds or fewer queries"
        )
    first: list[int] = []
    for piece in others:
        if missing <= len(piece):
            first, missing = piece[len(piece) - missing :], 0
            break
        pieces.append(piece)
        missing -= len(piece)
    if missing:
        raise BenchmarkError(
            f"all {what} together hold only {num_tokens - missing} tokens; {num_tokens} are needed. Use fewer rounds"
        )
    dice.shuffle(pieces)
    return [*first, *(token for piece in pieces for token in piece)]
