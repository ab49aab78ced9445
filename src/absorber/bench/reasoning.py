"""Questions that need several paragraphs of a long context, which is filled up with paragraphs of other questions."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch

from absorber.bench.asking import Asked, Figures, Language, Query, WritingTask, by_stream, fill
from absorber.bench.data_sets import Question, QuestionSet, questions
from absorber.bench.overlap import exact_match, token_f1
from absorber.bench.reading import Reading, continuation_nll
from absorber.errors import BenchmarkError
from absorber.notes import make_guide

# Without an example a small model answers in sentences, or not at all; these two say how short an answer is.
_PROMPT = (
    "Question: Who wrote the novel Emma?\nAnswer: Jane Austen\n\n"
    "Question: When did the Second World War end?\nAnswer: 1945\n\n"
    "Question: {}\nAnswer:"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoning(WritingTask):
    """The protocol's settings."""

    name: ClassVar[str] = "reasoning"
    kinds: ClassVar[tuple[str, ...]] = get_args(QuestionSet)
    units: ClassVar[Mapping[str, str]] = {"f1": "ratio", "exact_match": "ratio", "answer_nll": "nats"}
    kind: QuestionSet = "musique"
    max_new_tokens: int = 16

    def prepare(self, model: Any, tokenizer: Any, data_dir: Path) -> Asked:
        """Read, draw and tokenize.

        Raises:
            BenchmarkError: If there are too few questions or paragraphs.
        """
        language = Language.of(model, tokenizer)
        found = questions(data_dir, self.split)
        if self.num_queries > len(found):
            raise BenchmarkError(f"{self.num_queries} queries are more than the {len(found)} questions there are")
        random.Random(f"questions/{self.seed}").shuffle(found)
        rows, queries = [], []
        for stream in range(self.num_streams):
            first = stream * self.num_queries
            own = [found[(first + place) % len(found)] for place in range(self.num_queries)]
            rows.append(self._context(own, found, language, stream))
            queries.append(
                [
                    Query(
                        language.tokens(_PROMPT.format(one.question)), one.answers, language.tokens(f" {one.question}")
                    )
                    for one in own
                ]
            )
        return Asked(torch.tensor(rows), make_guide(tokenizer, model), queries, language)

    def _context(
        self, own: Sequence[Question], found: Sequence[Question], language: Language, stream: int
    ) -> list[int]:
        dice = random.Random(f"paragraphs/{self.seed}/{stream}")
        needed = dict.fromkeys(text for question in own for text in question.supporting)
        others = {text for question in found if question not in own for text in question.supporting + question.others}
        fillers = sorted(others - set(needed))
        dice.shuffle(fillers)
        pieces = (language.tokens(f"{text}\n\n") for text in fillers)
        return fill(
            [language.tokens(f"{text}\n\n") for text in needed], pieces, self.num_tokens, dice, what="paragraphs"
        )

    def answer(self, reading: Reading, queries: Sequence[Sequence[Query]], texts: Asked) -> Figures:
        """Let each stream write its answers, and see how likely the right one is."""
        turns = [
            continuation_nll(
                reading, [(query.prompt, texts.language.tokens(f" {query.references[0]}")) for query in turn]
            )
            for turn in zip(*queries, strict=True)
        ]
        return self.write(reading, queries, texts.language) | {"answer_nll": by_stream(turns)}

    def judge(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """Compare with the best fitting of the right answers."""
        return {"f1": token_f1(answer, references), "exact_match": exact_match(answer, references)}
