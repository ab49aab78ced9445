"""Reading tokens into a cache and choosing the next one; knows windows of one stream, not memories.

Shapes: T tokens, V vocabulary.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from absorber.backbone import Backbone, read_on
from absorber.errors import ContextError, ModelError


class Decoder:
    """A key-value cache and the logits after its last token. Run it with the adapter attached."""

    def __init__(self, backbone: Backbone, *, read_tokens: int) -> None:
        """Begin with nothing read.

        Args:
            backbone: The model.
            read_tokens: Largest piece given to the model at once, so that activations stay small.
        """
        self._backbone = backbone
        self._read_tokens = read_tokens
        self.reset()

    def reset(self) -> None:
        """Forget everything read."""
        self._cache = DynamicCache(config=self._backbone.model.config)
        self._logits_V: Tensor | None = None
        self.num_tokens = 0

    def fork(self) -> "Decoder":
        """Return an independent copy that goes on from here."""
        twin = Decoder(self._backbone, read_tokens=self._read_tokens)
        twin._cache = copy.deepcopy(self._cache)
        twin._logits_V, twin.num_tokens = self._logits_V, self.num_tokens
        return twin

    @torch.no_grad()
    def read(self, token_ids: Sequence[int]) -> None:
        """Read tokens after those read before, in pieces.

        Raises:
            ContextError: If that is more than the model's positions.
            ModelError: If the model keeps no cache.

        After any error inside the model nothing is held as read.
        """
        limit = self._backbone.max_positions
        if limit is not None and self.num_tokens + len(token_ids) > limit:
            raise ContextError(
                f"{self.num_tokens + len(token_ids)} tokens are more than the model's {limit} positions; ask or "
                "generate less at once, or make context_tokens and sync_tokens smaller"
            )
        for start in range(0, len(token_ids), self._read_tokens):
            piece = list(token_ids[start : start + self._read_tokens])
            input_ids_BT = torch.tensor([piece], device=self._backbone.device)
            try:
                final_BTD, has_cache = read_on(self._backbone, input_ids_BT, self._cache)
                if not has_cache:
                    raise ModelError(
                        f"{type(self._backbone.model).__name__} keeps no key-value cache, so it cannot generate"
                    )
                self._logits_V = self._backbone.logits(final_BTD[:, -1:])[0, 0].float()
                self.num_tokens += len(piece)
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


def choose_token(logits_V: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Choose the next token: the most likely at temperature 0, else a nucleus sample (arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits_V.argmax())
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    scores_BV = warpers(torch.empty(1, 0, dtype=torch.long), logits_V.float().cpu()[None])
    return int(torch.multinomial(scores_BV.softmax(dim=-1)[0], 1, generator=generator))
