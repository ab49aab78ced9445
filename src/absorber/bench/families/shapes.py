"""The families, with equal parameters: Mamba's count is what the others' feed-forward layers are fitted to.

    transformer  Llama: attention and a gated feed-forward
    mamba        Mamba-2: twice as many blocks, which have no feed-forward
    rnn          a gated delta rule, a linear recurrent network, and a gated feed-forward
    ttt          TTT-Linear and a gated feed-forward
    ttt-mlp      TTT-MLP and a gated feed-forward

All have embeddings that are also the head, counted once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from absorber.bench.families.mamba_scan import quicken
from absorber.bench.families.trunk import TrunkConfig, TrunkForCausalLM
from absorber.errors import ConfigError

TOLERANCE = 0.05
"""How far parameters may differ."""


@dataclass(frozen=True, slots=True)
class Size:
    """What all families of a size share."""

    hidden: int
    """Width of the hidden states."""
    layers: int
    """Blocks with a feed-forward each; Mamba has twice as many without."""
    heads: int
    """Heads of attention and of the recurrent layers."""
    state: int
    """State of Mamba, whose heads are as wide as the others'."""


SIZES = {
    "tiny": Size(hidden=32, layers=2, heads=2, state=8),
    "3m": Size(hidden=192, layers=4, heads=3, state=64),
    "30m": Size(hidden=512, layers=8, heads=8, state=64),
}
"""By the name on the command line; the number counts an embedding of 8192 tokens."""


def _llama(size: Size, width: int, vocabulary: int, positions: int) -> Any:
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def _mamba(size: Size, width: int, vocabulary: int, positions: int) -> Any:
    config = Mamba2Config(
        hidden_size=size.hidden,
        num_hidden_layers=2 * size.layers,
        state_size=size.state,
        num_heads=2 * size.heads,
        head_dim=size.hidden // size.heads,
        n_groups=1,
        expand=2,
        vocab_size=vocabulary,
        initializer_range=0.02,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return quicken(Mamba2ForCausalLM(config))


def _trunk(mixer: str) -> Callable[[Size, int, int, int], Any]:
    def build(size: Size, width: int, vocabulary: int, positions: int) -> Any:
        config = TrunkConfig(
            mixer=mixer,
            hidden_size=size.hidden,
            intermediate_size=width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            vocab_size=vocabulary,
        )
        return TrunkForCausalLM(config)

    return build


_BUILDERS: dict[str, Callable[[Size, int, int, int], Any]] = {
    "transformer": _llama,
    "mamba": _mamba,
    "rnn": _trunk("delta"),
    "ttt": _trunk("ttt-linear"),
    "ttt-mlp": _trunk("ttt-mlp"),
}
FAMILIES = tuple(_BUILDERS)
"""Names of the families."""


def build_family(family: str, size: str, *, vocabulary: int, positions: int, seed: int) -> Any:
    """Build a model with random weights in float32, on the CPU.

    Args:
        family: One of `FAMILIES`.
        size: One of `SIZES`.
        vocabulary: Tokens.
        positions: Those that a transformer is trained on.
        seed: Of the weights.

    Raises:
        ConfigError: If there is no such family or size, or parameters differ by more than `TOLERANCE`.
    """
    if family not in _BUILDERS or size not in SIZES:
        raise ConfigError(
            f"a family is one of {', '.join(FAMILIES)}, a size one of {', '.join(SIZES)}; got {family}, {size}"
        )
    build, shape = _BUILDERS[family], SIZES[size]
    with torch.device("meta"):
        target = count_parameters(_mamba(shape, 0, vocabulary, positions))
        few, more = (count_parameters(build(shape, width, vocabulary, positions)) for width in (8, 16))
    # Parameters are linear in the width of the feed-forward; Mamba has none.
    width = 8 + 8 * round((target - few) / (more - few)) if more > few else 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(shape, max(8, width), vocabulary, positions)
    own = count_parameters(model)
    if abs(own - target) > TOLERANCE * target:
        raise ConfigError(f"{family} of size {size} has {own} parameters, not within 5 % of {target}")
    model.config._name_or_path = f"{family}-{size}"
    return model


def count_parameters(model: Any) -> int:
    """How many numbers are trained; those that embedding and head share count once."""
    return sum(weight.numel() for weight in model.parameters())


def shape_of(model: Any) -> dict[str, Any]:
    """What a record says of a model's shape."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_heads", "intermediate_size", "state_size")
    config = model.config
    found = {name: int(value) for name in names if isinstance(value := getattr(config, name, None), int)}
    # Of Mamba it is the width inside a block, not that of a feed-forward.
    return {
        name: value for name, value in found.items() if (config.model_type, name) != ("mamba2", "intermediate_size")
    }
