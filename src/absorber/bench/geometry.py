"""Models with the shape of known ones and random weights: speed and memory need no trained weights.

The weights are made on the device itself, and are the same at every call.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, Qwen3Config

from absorber.backbone import lay_together
from absorber.bench.families.trunk import TrunkConfig, TrunkForCausalLM
from absorber.errors import ConfigError, DeviceMemoryError
from absorber.models import choose_device, choose_dtype

_POSITIONS = 2**18
"""All attention models get so many, so that full attention is measured where the original has no positions."""


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int, **more: Any
) -> Any:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=_POSITIONS,
        **more,
    )


def _qwen(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> Any:
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=128,
        vocab_size=vocabulary,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
    )


def _mamba(hidden: int, layers: int, vocabulary: int, **more: Any) -> Any:
    return MambaConfig(hidden_size=hidden, num_hidden_layers=layers, vocab_size=vocabulary, **more)


def _ttt(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int) -> Any:
    return TrunkConfig(
        mixer="ttt-linear",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


GEOMETRIES = {
    "llama2-7b": lambda: _llama(4096, 11008, 32, 32, 32, 32000),
    "qwen3-4b": lambda: _qwen(2560, 9728, 36, 32, 8, 151936),
    "smollm2-135m": lambda: _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "tiny": lambda: _llama(32, 64, 2, 4, 2, 257),
    "mamba-2.8b": lambda: _mamba(2560, 64, 50280),
    "mamba-130m": lambda: _mamba(768, 24, 50280),
    "mamba-tiny": lambda: _mamba(32, 2, 257, state_size=4),
    "ttt-7b": lambda: _ttt(4096, 9600, 32, 64, 32000),
    "ttt-1.3b": lambda: _ttt(2048, 4480, 24, 32, 32000),
    "ttt-tiny": lambda: _ttt(32, 64, 2, 4, 257),
}
"""Configurations by name; arXiv 2307.09288, 2505.09388, 2502.02737 and 2312.00752. TTT-Linear (arXiv 2407.04620) has
hidden size, blocks and vocabulary of its 1.3B model and of LLaMA2-7B, heads of 64, and a feed-forward that makes it as
large."""


def geometry_config(name: str) -> Any:
    """Return the configuration of this name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in GEOMETRIES:
        raise ConfigError(f"there is no geometry {name!r}; there are {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]()


def build_geometry(name: str, *, device: str = "auto", dtype: str = "auto") -> Any:
    """Build a model of this shape with random weights, in eval mode and frozen.

    Args:
        name: One of `GEOMETRIES`.
        device: auto, cpu, cuda, cuda:1, mps.
        dtype: auto, float32, bfloat16, float16.

    Raises:
        ConfigError: If there is no such geometry, device or type.
        DeviceMemoryError: If the weights do not fit on the device.
    """
    config, place = geometry_config(name), choose_device(device)
    kind = choose_dtype(dtype, place)
    devices = [place] if place.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), place:
            torch.manual_seed(0)
            model = _from_config(config, kind)
        if place.type == "cuda":  # as `load` does
            lay_together(model)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(f"{name} does not fit on {place}: {error}. Choose a smaller geometry") from error
    model.config._name_or_path = name
    return model.eval().requires_grad_(False)


def blank_geometry(name: str) -> Any:
    """Build a model of this shape without weights, to ask what could be measured with it.

    Raises:
        ConfigError: If there is no such geometry.
    """
    with torch.device("meta"):
        return _from_config(geometry_config(name), torch.get_default_dtype())


def _from_config(config: Any, dtype: torch.dtype) -> Any:
    if not isinstance(config, TrunkConfig):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return TrunkForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
