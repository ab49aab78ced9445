"""Many-shot classification: labelled examples fill the context, then texts without a label are shown.

A class is as likely as its name is after the text, calibrated by how likely it is after texts without content (arXiv
2102.09690). The classes of examples and of queries are balanced, and no text comes twice in a stream.

Banking77 has 77 classes of about 170 texts; a context of some thousand tokens has room for a few examples of each of
16, so that many are drawn by the seed.

Shapes: B streams, Q queries, K texts without content, C classes.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from absorber.bench.asking import Asked, AskingTask, Figures, Language, Query
from absorber.bench.data_sets import Example, LabelledSet, examples
from absorber.bench.methods import Reader, Setting
from absorber.bench.reading import Reading, choice_nll
from absorber.bench.records import Record
from absorber.bench.task import Checkpoint
from absorber.errors import BenchmarkError
from absorber.notes import make_guide

# As in arXiv 2102.09690.
_WITHOUT_CONTENT = ("N/A", "", "[MASK]")
_PROMPTS: dict[str, str] = {
    "ag_news": "News: {}\nCategory:",
    "trec": "Question: {}\nAnswer type:",
    "banking77": "Customer: {}\nIntent:",
}


@dataclass(slots=True)
class Labelled(Asked):
    """The examples and queries of one run."""

    labels: list[str] = field(default_factory=list)
    """Names of the classes."""
    without_content: list[list[int]] = field(default_factory=list)
    """Prompts, tokenized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InContext(AskingTask):
    """The protocol's settings."""

    name: ClassVar[str] = "icl"
    kinds: ClassVar[tuple[str, ...]] = get_args(LabelledSet)
    units: ClassVar[Mapping[str, str]] = {"accuracy": "ratio", "agreement": "ratio", "label_nll": "nats"}
    kind: LabelledSet = "ag_news"
    num_queries: int = 8
    num_classes: int = 16
    """Classes at most; of a set with more so many are drawn."""

    def prepare(self, model: Any, tokenizer: Any, data_dir: Path) -> Labelled:
        """Read, draw and tokenize.

        Raises:
            BenchmarkError: If there are too few texts.
        """
        language = Language.of(model, tokenizer)
        found = examples(self.kind, data_dir, self.split)
        labels = sorted({example.label for example in found})
        if len(labels) > self.num_classes:
            labels = sorted(random.Random(f"classes/{self.seed}").sample(labels, self.num_classes))
        rows, queries = [], []
        for stream in range(self.num_streams):
            asked, shown = self._draw(found, labels, stream)
            rows.append(self._context(shown, language))
            queries.append(
                [
                    Query(language.tokens(self._prompt(one.text)), (one.label,), language.tokens(f" {one.text}"))
                    for one in asked
                ]
            )
        return Labelled(
            token_ids_BT=torch.tensor(rows),
            guide=make_guide(tokenizer, model),
            queries=queries,
            language=language,
            labels=labels,
            without_content=[language.tokens(self._prompt(text)) for text in _WITHOUT_CONTENT],
        )

    def _prompt(self, text: str) -> str:
        # A blank before nothing would be a token of its own.
        return _PROMPTS[self.kind].format(text).replace(": \n", ":\n")

    def _draw(
        self, found: Sequence[Example], labels: Sequence[str], stream: int
    ) -> tuple[list[Example], Iterator[Example]]:
        """Draw a stream's queries, and then its examples: one of every class in turn, as long as the class has any."""
        dice = random.Random(f"icl/{self.seed}/{stream}")
        pools = {label: [example for example in found if example.label == label] for label in labels}
        for pool in pools.values():
            dice.shuffle(pool)
        first = stream * self.num_queries  # streams take turns at the classes, so that all are asked for as often
        wanted = [labels[(first + place) % len(labels)] for place in range(self.num_queries)]
        for label in labels:
            if wanted.count(label) >= len(pools[label]):
                raise BenchmarkError(
                    f"{self.kind} has {len(pools[label])} texts of the class {label}, of which {wanted.count(label)} "
                    "would be asked; use fewer queries"
                )
        asked = [pools[label].pop() for label in wanted]
        dice.shuffle(asked)

        def shown() -> Iterator[Example]:
            while any(pools.values()):
                turn = [pool.pop() for pool in pools.values() if pool]
                dice.shuffle(turn)
                yield from turn

        return asked, shown()

    def _context(self, shown: Iterator[Example], language: Language) -> list[int]:
        """Whole examples up to the end, where the first one drawn stands; the last one is cut at its beginning."""
        pieces: list[list[int]] = []
        length = 0
        for example in shown:
            pieces.append(language.tokens(f"{self._prompt(example.text)} {example.label}\n\n"))
            length += len(pieces[-1])
            if length >= self.num_tokens:
                return [token_id for piece in reversed(pieces) for token_id in piece][-self.num_tokens :]
        raise BenchmarkError(
            f"the examples of {self.kind} hold only {length} tokens; {self.num_tokens} are needed. Use fewer rounds"
        )

    def answer(self, reading: Reading, queries: Sequence[Sequence[Query]], texts: Labelled) -> Figures:
        """Classify each stream's queries."""
        names = [texts.language.tokens(f" {label}") for label in texts.labels]

        def log_p(turn: Sequence[Sequence[int]]) -> Tensor:
            """How likely each class is after a prompt for each stream [B, C]."""
            return -torch.tensor(choice_nll(reading, turn, names), dtype=torch.float64)

        log_p_BQC = torch.stack([log_p([query.prompt for query in turn]) for turn in zip(*queries, strict=True)], 1)
        blank_BKC = torch.stack([log_p([prompt] * len(queries)) for prompt in texts.without_content], 1)
        predicted_BQ = calibrated(log_p_BQC, blank_BKC).argmax(dim=-1)
        right_BQ = torch.tensor([[texts.labels.index(query.references[0]) for query in own] for own in queries])
        return {
            "accuracy": (predicted_BQ == right_BQ).double().flatten().tolist(),
            "label_nll": (-log_p_BQC.gather(2, right_BQ[..., None])).flatten().tolist(),
            "predicted": predicted_BQ.double().flatten().tolist(),
        }

    def examine(self, setting: Setting, reader: Reader, texts: Labelled, number: int) -> Figures:
        """Classify in every view, and compare with what full attention says."""
        found = AskingTask.examine(self, setting, reader, texts, number)
        full = found.pop("predicted/full")
        for view in ("windowed", "contextless"):
            own = found.pop(f"predicted/{view}")
            found[f"agreement/{view}"] = [float(one == other) for one, other in zip(own, full, strict=True)]
        return found | {"chance": [1 / len(texts.labels)] * setting.num_streams}

    def to_records(
        self,
        method: str,
        method_config: dict[str, Any],
        measured: Sequence[Checkpoint],
        reference: Sequence[Checkpoint],
        facts: dict[str, Any],
    ) -> list[Record]:
        """Write what a method measured as records; each says what guessing would give."""
        records: list[Record] = []
        for checkpoint in measured:
            figures = dict(checkpoint.metrics)
            chance = figures.pop("chance")[0]  # the same for all
            plain = Checkpoint(checkpoint.round, figures, checkpoint.seconds)
            for record in AskingTask.to_records(self, method, method_config, [plain], reference, facts):
                record.config["chance"] = chance
                records.append(record)
        return records


def calibrated(log_p_BQC: Tensor, blank_BKC: Tensor) -> Tensor:
    """Contextual calibration: divide the classes' probabilities by those after texts without content.

    Args:
        log_p_BQC: Log-likelihoods of the classes' names after each query.
        blank_BKC: The same after each text without content; their probabilities are averaged.

    Returns:
        Log-probabilities [B, Q, C].
    """
    blank_BC = blank_BKC.log_softmax(dim=-1).logsumexp(dim=1)
    return (log_p_BQC - blank_BC[:, None]).log_softmax(dim=-1)
