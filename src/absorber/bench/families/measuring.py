"""What a trained family makes of text that is longer than its training rows: nll by position, and recall by distance.

A family reads a stream at once, as far as its state or its attention carries. A method on the trained transformer reads
the same stream through its window, round by round, and is scored at the same positions with what it remembers.

Recall: pairs (a mark, a key, a value) are planted in a stream, text follows, and then each is asked for by its mark and
key.

Shapes: B streams, T tokens, Q tokens of questions.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from absorber.backbone import Backbone, forward_states, inspect, untouched, with_sink
from absorber.bench.data import documents, streams
from absorber.bench.families.corpus import MARK, SEPARATOR, Corpus, draw_pairs
from absorber.bench.families.settings import Families
from absorber.bench.methods import Method, Reader, Setting
from absorber.bench.scoring import passage_nll, predict_passage
from absorber.bench.speed import wait
from absorber.errors import BenchmarkError
from absorber.notes import make_guide

_PAIR_SLOT = 8  # tokens of a stream in which a pair stands
_LOGITS_TOKENS = 2048
_ROWS = 4  # streams read at once


@dataclass(frozen=True, slots=True)
class Asked:
    """Streams with pairs, and the questions for them."""

    distance: int
    """Tokens between the last pair and the first question, at least."""
    read_BT: Tensor
    """What is read."""
    asked_BQ: Tensor
    """Mark, key and value of each pair, in another order."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What is scored, the same for all families and methods."""

    stream_BT: Tensor
    """Plain text."""
    recall: list[Asked]
    """By distance."""


Points = dict[int, list[float]]
"""By position or distance, a value for each stream."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Two curves."""

    nll: Points
    """Mean nll of a passage, by the tokens read before it."""
    recall: Points
    """Share of the pairs whose value is the likeliest token, by distance."""
    seconds: float
    """Wall time."""


def prepare(task: Families, corpus: Corpus, data_dir: Path) -> Scored:
    """Cut the scored books into streams, and plant pairs in copies of them.

    Raises:
        BenchmarkError: If there is too little text, or a distance is longer than a stream.
    """
    stream_BT = streams(
        corpus.tokenizer,
        documents("books", data_dir, task.split),
        kind="books",
        num_streams=task.num_streams,
        num_tokens=task.scored_tokens,
        seed=task.seed,
    )
    return Scored(stream_BT, [_planted(task, corpus, stream_BT, distance) for distance in task.distances])


def _planted(task: Families, corpus: Corpus, stream_BT: Tensor, distance: int) -> Asked:
    span = task.num_pairs * _PAIR_SLOT
    rounds = -(-max(0, distance + span - task.sync_tokens) // task.context_tokens)
    length = task.sync_tokens + task.context_tokens * rounds
    if length > task.scored_tokens:
        raise BenchmarkError(f"pairs {distance} tokens back need streams of {length} tokens; raise scored_tokens")
    read_BT, asked = stream_BT[:, :length].clone(), []
    for row, read_T in enumerate(read_BT):
        dice = np.random.default_rng([task.seed, 2, distance, row])
        keys, values = draw_pairs(task.num_pairs, corpus.vocabulary, dice)
        pairs = torch.from_numpy(np.stack([np.full_like(keys, MARK), keys, values], axis=1))
        begin = length - distance - span
        read_T[begin : begin + span].view(task.num_pairs, _PAIR_SLOT)[:, :3] = pairs
        asked.append(pairs[torch.from_numpy(dice.permutation(task.num_pairs))].flatten())
    return Asked(distance, read_BT, torch.stack(asked))


@torch.no_grad()
def measure_family(task: Families, model: Any, texts: Scored) -> Measured:
    """Let a family read everything at once."""
    backbone, started = inspect(model), time.perf_counter()
    nll: dict[int, list[float]] = {start: [] for start in range(0, task.scored_tokens, task.passage_tokens)}
    recall: Points = {}
    with untouched(model):
        for rows_BT in torch.split(texts.stream_BT, _ROWS):
            nll_BT = _token_nll(backbone, rows_BT)
            for start, values in nll.items():
                values += nll_BT[:, start : start + task.passage_tokens].mean(dim=1).tolist()
        for asked in texts.recall:
            recall[asked.distance] = []
            for read_BT, asked_BQ in zip(
                torch.split(asked.read_BT, _ROWS), torch.split(asked.asked_BQ, _ROWS), strict=True
            ):
                recall[asked.distance] += _exact(backbone, read_BT, asked_BQ)
    wait(backbone.device)
    return Measured(nll, recall, time.perf_counter() - started)


def _token_nll(backbone: Backbone, rows_BT: Tensor) -> Tensor:
    """Of every token, given the sink and all before it; [B, T]."""
    rows_BT = rows_BT.to(backbone.device)
    input_ids_BT = with_sink(SEPARATOR, rows_BT)
    final_BTD = forward_states(backbone, input_ids_BT).final_BTD[:, :-1]
    found = []
    parts = torch.split(final_BTD, _LOGITS_TOKENS, dim=1)
    for states, ids in zip(parts, torch.split(rows_BT, _LOGITS_TOKENS, dim=1), strict=True):
        logits = backbone.logits(states).float()
        found.append(functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none"))
    return torch.cat(found, dim=1).cpu()


def _exact(backbone: Backbone, before_BT: Tensor, asked_BQ: Tensor) -> list[float]:
    """Share of the values that are the likeliest tokens after their keys, by stream."""
    states = predict_passage(backbone, before_BT, asked_BQ, sink_id=SEPARATOR)[:, 2::3]
    right = backbone.logits(states).argmax(dim=-1).cpu() == asked_BQ[:, 2::3]
    return right.float().mean(dim=1).tolist()


def measure_method(
    task: Families,
    method: Method,
    model: Any,
    texts: Scored,
    tokenizer: Any,
    *,
    on_round: Callable[[int], None] = lambda number: None,
) -> Measured:
    """Let a method with a window read the same streams round by round.

    Args:
        task: The settings.
        method: Truncation, or one with a memory.
        model: The trained transformer.
        texts: From `prepare`.
        tokenizer: Of the corpus.
        on_round: Called with the rounds done, over all streams read.
    """
    backbone, started = inspect(model), time.perf_counter()
    setting = Setting(
        backbone=backbone,
        stream=task.stream,
        sink_id=SEPARATOR,
        num_streams=task.num_streams,
        seed=task.seed,
        guide=make_guide(tokenizer, model),
    )
    nll: Points = {}
    recall: Points = {}
    done = 0
    reader = method.begin(setting)
    for position in _read(task, reader, texts.stream_BT):
        passage_BP = texts.stream_BT[:, position : position + task.passage_tokens]
        if passage_BP.shape[1] == task.passage_tokens:
            nll[position] = _read_passage(reader, passage_BP)
        done += 1
        on_round(done)
    for asked in texts.recall:
        reader = method.begin(setting)
        for _ in _read(task, reader, asked.read_BT):
            done += 1
            on_round(done)
        with torch.no_grad(), untouched(model), reader.speaking():
            recall[asked.distance] = _exact(backbone, reader.windowed(), asked.asked_BQ)
    wait(backbone.device)
    return Measured(nll, recall, time.perf_counter() - started)


def _read(task: Families, reader: Reader, stream_BT: Tensor) -> Iterator[int]:
    """Give the reader the first m tokens, then n a round; yields the tokens read so far after each."""
    begin = 0
    for end in range(task.sync_tokens, stream_BT.shape[1] + 1, task.context_tokens):
        reader.read(stream_BT[:, begin:end])
        begin = end
        yield end


def _read_passage(reader: Reader, passage_BP: Tensor) -> list[float]:
    backbone = reader.setting.backbone
    with torch.no_grad(), reader.speaking():
        final_BPD = predict_passage(backbone, reader.windowed(), passage_BP, sink_id=SEPARATOR)
        return passage_nll(backbone, final_BPD, passage_BP).tolist()
