"""One tiny model per family of causal language models; the tables of tests run over them."""

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

VOCABULARY = 257  # that of the byte tokenizer
SLIDING = 6
"""Tokens that a sliding-window layer of these models sees."""
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64}
"""Of a Llama of two blocks whose heads kernels can take."""


@dataclass(frozen=True)
class Architecture:
    """A family: its configuration class and what it has to be told."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    keeps_cache: bool = True
    takes_positions: bool = True


def _llama_like(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **more,
    }


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", _llama_like()),
    "mistral": Architecture("MistralConfig", _llama_like(sliding_window=SLIDING)),
    "qwen2": Architecture("Qwen2Config", _llama_like(tie_word_embeddings=True)),
    "qwen3": Architecture("Qwen3Config", _llama_like(head_dim=8)),
    "gemma2": Architecture(
        "Gemma2Config",
        _llama_like(head_dim=8, sliding_window=SLIDING, query_pre_attn_scalar=8, final_logit_softcapping=2.0),
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        _llama_like(
            head_dim=8,
            sliding_window=SLIDING,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "phi": Architecture("PhiConfig", _llama_like(num_key_value_heads=4)),
    "phi3": Architecture("Phi3Config", _llama_like(pad_token_id=0)),
    "gpt_neox": Architecture("GPTNeoXConfig", _llama_like()),
    "opt": Architecture("OPTConfig", _llama_like(ffn_dim=48, word_embed_proj_dim=16)),
    "gpt2": Architecture("GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "olmo2": Architecture("Olmo2Config", _llama_like(pad_token_id=0)),
    "granite": Architecture(
        "GraniteConfig", _llama_like(logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5)
    ),
    "cohere": Architecture("CohereConfig", _llama_like(logit_scale=0.25, pad_token_id=0)),
    "falcon": Architecture("FalconConfig", {**_llama_like(), "new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": Architecture("BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4}, takes_positions=False),
    "mamba": Architecture(
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
        # Under another name, which we do not pass, before transformers 5.24.
        keeps_cache="cache" in signature(transformers.MambaModel.forward).parameters,
        takes_positions=False,
    ),
}


def build(name: str) -> Any:
    """Build the model of this family; the same at every call."""
    architecture = ARCHITECTURES[name]
    config = getattr(transformers, architecture.config)(
        vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, initializer_range=0.15, **architecture.options
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
