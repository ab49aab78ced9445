"""Retrieval: everything read is kept, and the passages most like a question stand before a shorter window.

Okapi BM25 over token ids, so that it needs no tokenizer and no language. The window and the passages are as many tokens
as the window of all other methods. What grows with the stream is the text that is kept, on the CPU, and the search.

Shapes: B streams, T tokens.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from absorber.bench.methods.reader import Method, Questions, Reader, Setting
from absorber.errors import ConfigError, MissingExtraError


@dataclass(frozen=True, slots=True, kw_only=True)
class BM25(Method):
    """Retrieval of what left the window.

    Raises:
        ConfigError: If a value is out of range.
    """

    passage_tokens: int = 64
    """Of a passage; neighbors overlap by a half, so that what stands at a border is whole in one of them."""
    share: float = 0.5
    """Of the window that gives way to passages."""
    query_tokens: int = 64
    """How many of the window's last tokens are looked for, where no question follows."""

    def __post_init__(self) -> None:
        if self.passage_tokens < 2 or self.query_tokens < 1 or not 0 < self.share < 1:
            raise ConfigError(
                f"passage_tokens is 2 or more, query_tokens 1 or more and share between 0 and 1; got {self}"
            )

    def begin(self, setting: Setting) -> Reader:
        """Make a reader for B fresh streams.

        Raises:
            MissingExtraError: If bm25s is not installed.
        """
        _index()
        return _BM25Reader(setting, self)

    def config(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)


class _BM25Reader(Reader):
    def __init__(self, setting: Setting, method: BM25) -> None:
        super().__init__(setting)
        self._method = method
        self._read_BT = self.recent_BT
        room = int(self.kept_tokens * method.share)
        self._size = max(1, min(method.passage_tokens, room))
        self._count = room // self._size

    def read(self, token_ids_BT: Tensor) -> None:
        super().read(token_ids_BT)
        self._read_BT = torch.cat([self._read_BT, token_ids_BT], dim=1)

    def windowed(self, questions: Questions | None = None) -> Tensor:
        if self._read_BT.shape[1] <= self.kept_tokens:
            return self.recent_BT  # nothing has left the window
        num_last = self.kept_tokens - self._size * self._count
        older_BT, last_BT = self._read_BT[:, :-num_last], self._read_BT[:, -num_last:]
        queries = last_BT[:, -self._method.query_tokens :].tolist() if questions is None else questions
        return torch.cat([self._found(older_BT, queries), last_BT], dim=1)

    def contextless(self, questions: Questions | None = None) -> Tensor:
        left_BT = self._read_BT[:, : -self.kept_tokens]
        # Without a window and a question there is nothing to look for.
        return super().contextless() if questions is None else self._found(left_BT, questions)

    def _found(self, text_BT: Tensor, queries: Questions) -> Tensor:
        rows = [self._best(row, query) for row, query in zip(text_BT.tolist(), queries, strict=True)]
        return torch.tensor(rows, dtype=torch.long)

    def _best(self, text: Sequence[int], query: Sequence[int]) -> list[int]:
        """The best passages in the order of the text; of equally good ones the later."""
        size = min(self._size, len(text))
        if not size:
            return []
        starts = sorted({*range(0, len(text) - size, max(1, size // 2)), len(text) - size})
        index = _index()
        index.index([[str(token) for token in text[start : start + size]] for start in starts], show_progress=False)
        scores = index.get_scores([str(token) for token in query])
        order = sorted(range(len(starts)), key=lambda place: (-scores[place], -starts[place]))
        apart: list[int] = []
        for place in order:
            if all(abs(starts[place] - starts[other]) >= size for other in apart):
                apart.append(place)
        # Passages that do not overlap first; all streams have to get equally many.
        chosen = [*apart, *(place for place in order if place not in apart)][: self._count]
        return [token for place in sorted(chosen) for token in text[starts[place] : starts[place] + size]]


def _index() -> Any:
    """An empty index.

    bm25s imports JAX where it finds it, which takes three quarters of the GPU's memory for a search on the CPU; so it
    finds none, unless the program itself has it.

    Raises:
        MissingExtraError: If bm25s is not installed.
    """
    hidden = "jax" not in sys.modules
    if hidden:
        sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        from bm25s import BM25 as Index  # noqa: N811
    except ImportError as error:
        raise MissingExtraError("the method bm25 needs bm25s: pip install 'absorber[bench]'") from error
    finally:
        if hidden:
            del sys.modules["jax"]
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets its own to DEBUG, and others' handlers print that
    return Index()
