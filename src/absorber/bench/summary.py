"""Summaries of one of many dialogues or stories that a long context holds, each under a heading of its own."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch

from absorber.bench.asking import Asked, Figures, Language, Query, WritingTask, by_stream, fill
from absorber.bench.data_sets import Document, Request, SummarySet, summarized
from absorber.bench.overlap import rouge_l, token_f1
from absorber.bench.reading import Reading, continuation_nll
from absorber.bench.records import without_place
from absorber.bench.similarity import similarity
from absorber.errors import BenchmarkError
from absorber.notes import make_guide


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(WritingTask):
    """The protocol's settings."""

    name: ClassVar[str] = "summary"
    kinds: ClassVar[tuple[str, ...]] = get_args(SummarySet)
    units: ClassVar[Mapping[str, str]] = {
        "rouge_l": "ratio",
        "f1": "ratio",
        "similarity": "cosine",
        "summary_nll": "nats/token",
    }
    kind: SummarySet = "samsum"
    max_new_tokens: int = 64
    embedder: str = ""
    """For `similarity`, which is left out without one; see there."""

    def config(self) -> dict[str, Any]:
        """What a record says of the settings: of an embedder in a folder its name, not its place."""
        values = WritingTask.config(self)
        embedder = values.pop("embedder")
        return values | ({"embedder": without_place(embedder)} if embedder else {})

    def prepare(self, model: Any, tokenizer: Any, data_dir: Path) -> Asked:
        """Read, draw and tokenize.

        Raises:
            BenchmarkError: If there are too few documents.
            MissingExtraError: If the package for ROUGE, or that for embeddings, is missing.
        """
        self.judge("a", ["b"])  # a missing package must not be found out after the first method
        language = Language.of(model, tokenizer)
        found = summarized(self.kind, data_dir, self.split)
        random.Random(f"documents/{self.seed}").shuffle(found)
        pieces = {one: language.tokens(f"{one.heading}\n{one.text}\n\n") for one in found}
        wanted = self._choose(found, pieces)
        rows, queries = [], []
        for stream, own in enumerate(wanted):
            dice = random.Random(f"order/{self.seed}/{stream}")
            fillers = _under_other_headings([one for one, _ in own], dice.sample(found, len(found)))
            needed = dict.fromkeys(one for one, _ in own)
            rows.append(
                fill(
                    [pieces[one] for one in needed],
                    (pieces[one] for one in fillers),
                    self.num_tokens,
                    dice,
                    what=f"documents of {self.kind}",
                )
            )
            prompts = [language.tokens(asked.prompt) for _, asked in own]
            # The request names the heading, and nothing else stands around it.
            queries.append(
                [Query(prompt, asked.references, prompt) for prompt, (_, asked) in zip(prompts, own, strict=True)]
            )
        return Asked(torch.tensor(rows), make_guide(tokenizer, model), queries, language)

    def _choose(
        self, found: Sequence[Document], pieces: Mapping[Document, list[int]]
    ) -> list[list[tuple[Document, Request]]]:
        """Choose what each stream is asked: about one document after another, and about as few at once as can be."""
        fitting = [one for one in found if len(pieces[one]) <= self.num_tokens]
        times_asked = dict.fromkeys(pieces, 0)
        chosen: list[list[tuple[Document, Request]]] = []
        place = 0
        for _ in range(self.num_streams):
            own: list[tuple[Document, Request]] = []
            headings: set[str] = set()
            for _ in fitting:
                if len(own) == self.num_queries:
                    break
                one, place = fitting[place % len(fitting)], place + 1
                if one.heading in headings:  # two documents under one heading cannot be told apart
                    continue
                headings.add(one.heading)
                for _ in one.requests[: self.num_queries - len(own)]:
                    own.append((one, one.requests[times_asked[one] % len(one.requests)]))
                    times_asked[one] += 1
            if len(own) < self.num_queries:
                raise BenchmarkError(
                    f"{self.kind} has {len(fitting)} documents that {self.num_tokens} tokens hold, too few for "
                    f"{self.num_queries} queries; the shortest takes {min(map(len, pieces.values()))}. Use more rounds "
                    "or fewer queries"
                )
            chosen.append(own)
        return chosen

    def answer(self, reading: Reading, queries: Sequence[Sequence[Query]], texts: Asked) -> Figures:
        """Let each stream write its summaries, and see how likely that of a person is."""
        turns = []
        for turn in zip(*queries, strict=True):
            references = [texts.language.tokens(f" {query.references[0]}") for query in turn]
            pairs = [(query.prompt, reference) for query, reference in zip(turn, references, strict=True)]
            sums = continuation_nll(reading, pairs)
            turns.append([total / len(reference) for total, reference in zip(sums, references, strict=True)])
        return self.write(reading, queries, texts.language) | {"summary_nll": by_stream(turns)}

    def judge(self, answer: str, references: Sequence[str]) -> dict[str, float]:
        """Compare with the best fitting of the summaries of people."""
        near = {"similarity": similarity(self.embedder)(answer, references)} if self.embedder else {}
        return {"rouge_l": rouge_l()(answer, references), "f1": token_f1(answer, references)} | near


def _under_other_headings(own: Sequence[Document], order: Sequence[Document]) -> list[Document]:
    """Of the other documents, in this order, those whose heading has not come before."""
    headings = {one.heading for one in own}
    found = []
    for one in order:
        if one.heading not in headings:
            headings.add(one.heading)
            found.append(one)
    return found
