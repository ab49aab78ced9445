"""Quicker parts for a pass over one token per row, inside a `with` block; the model's own modules go on using them.

A block of a Llama runs about thirty kernels over a single token beside its seven products, most of them in two norms
and in turning queries and keys by their place. Each takes longer to start than to compute, also in a CUDA graph.

Shapes: B rows, H heads of queries, K of keys, C places in the cache, E features of a head.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from absorber import kernels
from absorber.backbone import Backbone
from absorber.fused_text import quick_norms, rotation

_ATTENTION = "absorber_one_token"


@contextlib.contextmanager
def one_token(backbone: Backbone, place_1: Tensor) -> Iterator[None]:
    """Let the model read one token per row, whose keys and values are in a cache of fixed size.

    Args:
        backbone: A model that is `graphs.is_plain`.
        place_1: Where the token stands; what is behind it in the cache is not attended to.
    """
    with _attention(backbone, place_1), quick_norms(backbone), rotation(backbone, _rotate):
        yield


@contextlib.contextmanager
def _attention(backbone: Backbone, place_1: Tensor) -> Iterator[None]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **more: Any
    ) -> tuple[Tensor, None]:
        features = query.shape[-1]
        quick = kernels.usable(query) and features & (features - 1) == 0
        attend = kernels.attend_one if quick else attend_one
        return attend(query[:, :, 0], key, value, place_1, scaling)[:, None], None

    AttentionInterface.register(_ATTENTION, attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    config = backbone.model.config
    before = config._attn_implementation
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def attend_one(query_BHE: Tensor, keys_BKCE: Tensor, values_BKCE: Tensor, place_1: Tensor, scale: float) -> Tensor:
    """Attend with one query per row to the places 0 .. p of a cache; the plain twin of `kernels.attend_one`."""
    heads, key_heads = query_BHE.shape[1], keys_BKCE.shape[1]
    query_BKGE = query_BHE.reshape(query_BHE.shape[0], key_heads, heads // key_heads, -1)
    seen_C = torch.arange(keys_BKCE.shape[2], device=keys_BKCE.device) <= place_1
    out_BKGE = nn.functional.scaled_dot_product_attention(
        query_BKGE, keys_BKCE, values_BKCE, attn_mask=seen_C[None, None, None], scale=scale
    )
    return out_BKGE.flatten(1, 2)


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """Turn queries and keys with one kernel where they are of one token."""
    if query.shape[2] == 1 and cos.shape[0] == 1 and kernels.usable(query):
        return kernels.rotate_one(query, key, cos, sin)
    return None
