"""Reading tokens into a cache and choosing the next one; knows windows of one stream.

Shapes: T tokens, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from absorber.adapter import Adapter
from absorber.backbone import Backbone, read_on, untouched
from absorber.errors import ContextError, ModelError


class Decoder:
    """A key-value cache that grows, and the logits after its last token; of any model, one kernel after another."""

    ahead = 1
    """How many tokens are best written at once."""

    def __init__(self, backbone: Backbone, *, read_tokens: int, adapter: Adapter | None = None) -> None:
        """Begin with nothing read.

        Args:
            backbone: The model.
            read_tokens: Largest piece given to the model at once, so that activations stay small.
            adapter: The memory that reads and speaks. None: whatever is attached to the model when it does.
        """
        self._backbone = backbone
        self._read_tokens = read_tokens
        self._adapter = adapter
        self.reset()

    def reset(self) -> None:
        """Forget everything read."""
        self._cache = DynamicCache(config=self._backbone.model.config)
        self._logits_V: Tensor | None = None
        self._ids: list[int] = []

    release = reset

    @property
    def num_tokens(self) -> int:
        """How many tokens are read."""
        return len(self._ids)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is read and written inside the `with` block is forgotten after it."""
        held = self._cache, self._logits_V, self._ids
        self._cache, self._ids = copy.deepcopy(self._cache), list(self._ids)
        try:
            yield
        finally:
            self._cache, self._logits_V, self._ids = held

    def read_all(self, token_ids: Sequence[int]) -> None:
        """Have read these tokens and nothing else; those at the beginning that were read before are not read again."""
        if self._ids != list(token_ids[: len(self._ids)]):
            self.reset()
        self.read(token_ids[len(self._ids) :])

    def write(self, num_tokens: int) -> list[int]:
        """Write and read the likeliest next token, so many times."""
        written = []
        for _ in range(num_tokens):
            written.append(int(self.logits_V.argmax()))
            self.read(written[-1:])
        return written

    @torch.no_grad()
    def read(self, token_ids: Sequence[int]) -> None:
        """Read tokens after those read before, in pieces.

        Raises:
            ContextError: If that is more than the model's positions.
            ModelError: If the model keeps no cache.

        After any error inside the model nothing is held as read.
        """
        check_room(self._backbone, self.num_tokens + len(token_ids))
        for start in range(0, len(token_ids), self._read_tokens):
            piece = list(token_ids[start : start + self._read_tokens])
            input_ids_BT = torch.tensor([piece], device=self._backbone.device)
            try:
                with applied(self._backbone, self._adapter):
                    final_BTD, has_cache = read_on(self._backbone, input_ids_BT, self._cache)
                if not has_cache:
                    raise ModelError(
                        f"{type(self._backbone.model).__name__} keeps no key-value cache, so it cannot generate"
                    )
                self._logits_V = self._backbone.logits(final_BTD[:, -1:])[0, 0].float()
                self._ids += piece
            except BaseException:
                self.reset()  # some layers have the piece in the cache and others do not
                raise

    @property
    def logits_V(self) -> Tensor:
        """Logits of the token after the last one read.

        Raises:
            ContextError: If nothing was read.
        """
        if self._logits_V is None:
            raise ContextError("there is nothing to continue; append text or give a prompt first")
        return self._logits_V

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values held."""
        tensors = [
            (layer.keys, layer.values) for layer in self._cache.layers if getattr(layer, "keys", None) is not None
        ]
        return sum(tensor.numel() * tensor.element_size() for pair in tensors for tensor in pair)


def check_room(backbone: Backbone, num_tokens: int) -> None:
    """Refuse to hold more tokens than the model has positions.

    Raises:
        ContextError: If it would.
    """
    limit = backbone.max_positions
    if limit is not None and num_tokens > limit:
        raise ContextError(
            f"{num_tokens} tokens are more than the model's {limit} positions; ask or "
            "generate less at once, or make context_tokens and sync_tokens smaller"
        )


@contextlib.contextmanager
def applied(backbone: Backbone, adapter: Adapter | None) -> Iterator[None]:
    """The model with a memory, or with what the caller has attached to it."""
    memory = contextlib.nullcontext() if adapter is None else adapter.attached(backbone)
    with untouched(backbone.model), memory:
        yield


def choose_token(logits_V: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Choose the next token: the most likely at temperature 0, else a nucleus sample (arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits_V.argmax())
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    scores_BV = warpers(torch.empty(1, 0, dtype=torch.long), logits_V.float().cpu()[None])
    return int(torch.multinomial(scores_BV.softmax(dim=-1)[0], 1, generator=generator))
