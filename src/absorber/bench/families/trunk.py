"""A small causal language model around a recurrent layer, as transformers would have it: what Llama has attention for.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from absorber.bench.families.delta_layer import DeltaMixer
from absorber.bench.families.ttt_layer import TTTMixer
from absorber.errors import ModelError

MIXERS = ("ttt-linear", "ttt-mlp", "delta")
"""Layers that there are."""


@dataclass(kw_only=True)
class TrunkConfig:
    """Shape of a model."""

    mixer: str
    """One of `MIXERS`."""
    hidden_size: int
    """D."""
    intermediate_size: int
    """Width of the feed-forward layers."""
    num_hidden_layers: int
    """Blocks."""
    num_attention_heads: int
    """Heads of the mixers."""
    vocab_size: int
    """V."""
    tie_word_embeddings: bool = True
    """Whether the head has the weights of the embedding."""
    initializer_range: float = 0.02
    """Deviation of the first weights."""
    eos_token_id: int = 0
    """What ends a text."""
    _name_or_path: str = ""

    @property
    def model_type(self) -> str:
        """As configurations of transformers have it."""
        return f"absorber-{self.mixer}"

    def get_text_config(self) -> "TrunkConfig":
        """Itself."""
        return self


@dataclass(kw_only=True)
class Output:
    """What a call gives; transformers' own classes have changed the name of the cache."""

    last_hidden_state: Tensor
    """[B, T, D]."""
    logits: Any = None
    """[B, T, V]; None from a trunk alone."""
    cache: Any = None
    """States, if they were asked for."""


class _FeedForward(nn.Module):
    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(hidden)) * self.up(hidden))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.mixer_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.mixer = (
            DeltaMixer(hidden, heads)
            if config.mixer == "delta"
            else TTTMixer(hidden, heads, inner=config.mixer.removeprefix("ttt-"), std=config.initializer_range)
        )
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.feed_forward = _FeedForward(config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.mixer(self.mixer_norm(hidden))
        return hidden + self.feed_forward(self.norm(hidden))  # type: ignore[no-any-return]

    def step(self, hidden_BD: Tensor, state: Any) -> Tensor:
        mixer: Any = self.mixer
        hidden_BD = hidden_BD + mixer.step(self.mixer_norm(hidden_BD), state)
        return hidden_BD + self.feed_forward(self.norm(hidden_BD))  # type: ignore[no-any-return]


class Trunk(nn.Module):
    """Token ids to final hidden states."""

    def __init__(self, config: TrunkConfig) -> None:
        """Make its weights."""
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)

    def forward(self, input_ids: Tensor, *, use_cache: bool = False, cache: Any = None) -> Output:
        """Read rows from their beginning, or with a cache one token after another.

        Args:
            input_ids: [B, T].
            use_cache: Whether to go on from states, and to return them.
            cache: States of an earlier call, which are changed in place.

        Raises:
            ModelError: If the layers have no step for a single token.
        """
        hidden_BTD: Tensor = self.embed_tokens(input_ids)
        blocks: list[Any] = list(self.layers)
        if not use_cache:
            for block in blocks:
                hidden_BTD = block(hidden_BTD)
            return Output(last_hidden_state=self.norm(hidden_BTD))
        if not hasattr(blocks[0].mixer, "step"):
            raise ModelError(f"{type(blocks[0].mixer).__name__} reads whole rows only; leave use_cache out")
        states = cache or [block.mixer.fresh(input_ids.shape[0]) for block in blocks]
        rows = []
        for hidden_BD in hidden_BTD.unbind(1):
            for block, state in zip(blocks, states, strict=True):
                hidden_BD = block.step(hidden_BD, state)
            rows.append(hidden_BD)
        return Output(last_hidden_state=self.norm(torch.stack(rows, dim=1)), cache=states)


class TrunkForCausalLM(nn.Module):
    """A trunk with its head."""

    def __init__(self, config: TrunkConfig) -> None:
        """Make its weights.

        Raises:
            ModelError: If there is no such mixer, or heads do not divide the hidden size.
        """
        super().__init__()
        if config.mixer not in MIXERS or config.hidden_size % config.num_attention_heads:
            raise ModelError(f"a mixer is one of {', '.join(MIXERS)}, and heads divide the hidden size; got {config}")
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def base_model(self) -> Trunk:
        """As models of transformers have it."""
        return self.model

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.lm_head.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def forward(self, input_ids: Tensor, *, use_cache: bool = False, cache: Any = None) -> Output:
        """Logits of the tokens that follow; arguments as for `Trunk.forward`."""
        output = self.model(input_ids, use_cache=use_cache, cache=cache)
        output.logits = self.lm_head(output.last_hidden_state)
        return output  # type: ignore[no-any-return]
