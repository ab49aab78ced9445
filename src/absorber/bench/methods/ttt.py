"""Test-time training by reconstruction, the objective that arXiv 2604.20915 sets itself against (its eq. 1).

TTT layers (TTT-Linear, arXiv 2407.04620) give each head a fast weight W, a linear map that learns to reconstruct a
token's value from its key while the text goes by, and that is read with the query:

    loss(W; k, v) = 1/2 |W k - v|^2,    W <- W - rate * mean over a mini-batch of its gradient,    output + scale * W q

Those layers are trained in advance to be used so. Here they stand on a pretrained transformer, so that all methods have
the same backbone. What differs from the paper therefore:

- Keys, values and queries are the attention's own projections, before rotary positions; no projection is trained for
  the purpose, and W begins at zero. Heads that share keys and values share a W.
- Keys and queries have length one, so that a rate below 2 cannot diverge.
- What is read is added to what attention found, before its output projection, with one scale for all heads.
- W learns from text that has left the window, read after the sink as the pristine model reads it: what W says of a
  layer does not change what the layers above it learn from.

Shapes: B streams, S rows of a batch for each, T tokens, G heads of keys and values, H heads of queries for each of
them, K width of a key or query, E width of a value.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from absorber.backbone import Backbone, forward_states, num_features, untouched, with_sink
from absorber.bench.methods.reader import Method, Reader, Setting
from absorber.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class TTT(Method):
    """Fast weights that learn values from keys.

    Raises:
        ConfigError: If a value is out of range.
    """

    learning_rate: float = 1.0
    """Of the step of a mini-batch; above 0 and below 2."""
    scale: float = 0.02
    """Of what is read; 0 is the same as dropping the text. With the rate the best of six settings (docs/methods.md)."""
    batch_tokens: int = 16
    """Of a mini-batch; TTT-Linear has 16."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < 2 or self.scale < 0 or self.batch_tokens < 1:
            raise ConfigError(
                f"learning_rate is above 0 and below 2, scale 0 or more and batch_tokens 1 or more; got {self}"
            )

    def begin(self, setting: Setting) -> "TTTReader":
        """Make a reader for B fresh streams.

        Raises:
            ModelError: If the model's attention has no projections of its own for queries, keys and values.
        """
        return TTTReader(setting, self)

    def config(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class _Attention:
    """The projections of one layer."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    num_heads: int
    """G."""


class TTTReader(Reader):
    """B streams with a fast weight for each layer and head."""

    def __init__(self, setting: Setting, method: TTT) -> None:
        """Begin with weights of zero."""
        super().__init__(setting)
        self._method = method
        self._layers = _attentions(setting.backbone)
        self.weights: list[Tensor] = []
        """W of each layer, [B, G, E, K], float32."""
        for layer in self._layers:
            widths = [num_features(projection)[1] // layer.num_heads for projection in (layer.value, layer.key)]
            shape = (setting.num_streams, layer.num_heads, *widths)
            self.weights.append(torch.zeros(shape, device=setting.backbone.device))

    def read(self, token_ids_BT: Tensor) -> None:
        """Learn from what leaves the window."""
        joined_BT = torch.cat([self.recent_BT, token_ids_BT], dim=1)
        super().read(token_ids_BT)
        num_left = joined_BT.shape[1] - self.recent_BT.shape[1]
        for start in range(0, num_left, self.setting.stream.context_tokens):
            end = min(num_left, start + self.setting.stream.context_tokens)
            self._learn(joined_BT[:, start:end])

    @torch.no_grad()
    def _learn(self, context_BT: Tensor) -> None:
        seen = _seen(self.setting, self._layers, context_BT)
        for number, (layer, keys_BTI, values_BTI) in enumerate(zip(self._layers, *seen, strict=True)):
            keys_BGTK = nn.functional.normalize(_by_head(keys_BTI, layer.num_heads), dim=-1)
            values_BGTE = _by_head(values_BTI, layer.num_heads)
            weight_BGEK = self.weights[number]
            size = self._method.batch_tokens
            pairs = zip(torch.split(keys_BGTK, size, dim=2), torch.split(values_BGTE, size, dim=2), strict=True)
            for keys, values in pairs:
                error_BGTE = keys @ weight_BGEK.mT - values
                weight_BGEK = weight_BGEK - self._method.learning_rate / keys.shape[2] * error_BGTE.mT @ keys
            self.weights[number] = weight_BGEK

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """Let every layer read its fast weight."""
        handles, queries = [], dict[int, Tensor]()

        def keeper(number: int) -> Any:
            def keep(module: nn.Module, args: Any, output: Tensor) -> None:
                queries[number] = output

            return keep

        def adder(number: int) -> Any:
            def add(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                read = self._read(number, queries.pop(number))
                return (args[0] + self._method.scale * read.to(args[0]), *args[1:])

            return add

        try:
            for number, layer in enumerate(self._layers):
                handles.append(layer.query.register_forward_hook(keeper(number)))
                handles.append(layer.output.register_forward_pre_hook(adder(number)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _read(self, number: int, queries: Tensor) -> Tensor:
        """W q, for a batch of S rows per stream, those of stream 0 first."""
        weight_BGEK = self.weights[number]
        num_streams, num_heads, _, width = weight_BGEK.shape
        rows, num_tokens = queries.shape[:2]
        shape = (num_streams, rows // num_streams, num_tokens, num_heads, -1, width)
        queries_BSTGHK = nn.functional.normalize(queries.float().reshape(shape), dim=-1)
        read = torch.einsum("bgek,bstghk->bstghe", weight_BGEK, queries_BSTGHK)
        return read.reshape(rows, num_tokens, -1)


def _attentions(backbone: Backbone) -> list[_Attention]:
    config, known = backbone.model.config.get_text_config(), backbone.projections
    places = [name.removesuffix("q_proj") for name in known if name.endswith("q_proj")]
    places = [place for place in places if all(f"{place}{part}_proj" in known for part in "kvo")]
    if not places:
        raise ModelError(
            f"ttt needs attention with q_proj, k_proj, v_proj and o_proj; {type(backbone.model).__name__} has none. "
            "Use a model such as Llama, Qwen or Mistral"
        )
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return [
        _Attention(
            query=known[f"{place}q_proj"],
            key=known[f"{place}k_proj"],
            value=known[f"{place}v_proj"],
            output=known[f"{place}o_proj"],
            num_heads=num_heads,
        )
        for place in places
    ]


def _seen(setting: Setting, layers: list[_Attention], context_BT: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The keys and the values of each layer for the tokens of a context, without the sink's."""
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def keeper(kept: list[Tensor]) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            kept.append(output[:, 1:])

        return keep

    handles = []
    try:
        for layer in layers:
            handles.append(layer.key.register_forward_hook(keeper(keys)))
            handles.append(layer.value.register_forward_hook(keeper(values)))
        with untouched(setting.backbone.model):
            forward_states(setting.backbone, with_sink(setting.sink_id, context_BT.to(setting.backbone.device)))
    finally:
        for handle in handles:
            handle.remove()
    return keys, values


def _by_head(states_BTI: Tensor, num_heads: int) -> Tensor:
    """[B, T, I] to [B, G, T, I / G], float32."""
    return states_BTI.float().reshape(*states_BTI.shape[:2], num_heads, -1).transpose(1, 2)
