"""Triton kernels for the parts of a pass over a text that are no products; `fused` puts them into a model.

    rotate          twin: the model's apply_rotary_pos_emb    rotary positions, and their gradient
    gated           twin: silu(gate) * up                     a gated activation
    gated_slopes    twin: its gradients by autograd

Shapes: B rows, T tokens, H heads, E features of a head.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_BLOCK = 2048


def rotate(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, *, back: bool = False) -> Tensor:
    """Turn features by the angles of their places (arXiv 2104.09864), as the Llama family pairs features.

    Args:
        x_BHTE: E / 2 is a power of two; the last axis is contiguous, or copied.
        cos_BTE: Of the angles; one row may serve all.
        sin_BTE: The same.
        back: Apply the transposed map, which is the gradient.

    Returns:
        [B, H, T, E], with the heads of a token side by side in memory, as a model's projections give them.
    """
    if x_BHTE.stride(-1) != 1:
        x_BHTE = x_BHTE.contiguous()
    rows, heads, num_tokens, features = x_BHTE.shape
    cos_BTE, sin_BTE = (angles.expand(rows, -1, -1) for angles in (cos_BTE, sin_BTE))
    if cos_BTE.stride() != sin_BTE.stride() or cos_BTE.stride(-1) != 1:
        cos_BTE, sin_BTE = cos_BTE.contiguous(), sin_BTE.contiguous()
    out_BTHE = torch.empty(rows, num_tokens, heads, features, device=x_BHTE.device, dtype=x_BHTE.dtype)
    _rotate[(rows * num_tokens,)](
        x_BHTE, cos_BTE, sin_BTE, out_BTHE, num_tokens, heads, *x_BHTE.stride()[:3], *cos_BTE.stride()[:2],
        HEADS=triton.next_power_of_2(heads), HALF=features // 2, BACK=back, num_warps=4,
    )  # fmt: skip
    return out_BTHE.transpose(1, 2)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up of contiguous tensors of one shape."""
    out = torch.empty_like(gate)
    _gated[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, out, gate.numel(), BLOCK=_BLOCK, num_warps=4)
    return out


def gated_slopes(gate: Tensor, up: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of `gated` by gate and up, times what comes from above."""
    gate_slope, up_slope = torch.empty_like(gate), torch.empty_like(up)
    _gated_slopes[(triton.cdiv(gate.numel(), _BLOCK),)](
        gate, up, slope, gate_slope, up_slope, gate.numel(), BLOCK=_BLOCK, num_warps=4
    )
    return gate_slope, up_slope


if triton is not None:

    @triton.jit
    def _rotate(
        x, cos, sin, out, num_tokens, heads, x_row, x_head, x_token, angle_row, angle_token,
        HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
    ) -> Any:  # fmt: skip
        """One program per token of a row, for all of its heads."""
        row = tl.program_id(0).to(tl.int64) // num_tokens
        token = tl.program_id(0).to(tl.int64) % num_tokens
        head = tl.arange(0, HEADS)[:, None]
        feature = tl.arange(0, HALF)[None, :]
        there = head < heads
        x += row * x_row + token * x_token + head * x_head + feature
        out += tl.program_id(0).to(tl.int64) * heads * 2 * HALF + head * 2 * HALF + feature
        angle = row * angle_row + token * angle_token + feature
        first = tl.load(x, mask=there, other=0.0).to(tl.float32)
        second = tl.load(x + HALF, mask=there, other=0.0).to(tl.float32)
        first_cos, second_cos = tl.load(cos + angle).to(tl.float32), tl.load(cos + angle + HALF).to(tl.float32)
        first_sin, second_sin = tl.load(sin + angle).to(tl.float32), tl.load(sin + angle + HALF).to(tl.float32)
        if BACK:
            turned, other = first * first_cos + second * second_sin, second * second_cos - first * first_sin
        else:
            turned, other = first * first_cos - second * first_sin, second * second_cos + first * second_sin
        tl.store(out, turned.to(out.dtype.element_ty), mask=there)
        tl.store(out + HALF, other.to(out.dtype.element_ty), mask=there)

    @triton.jit
    def _gated(gate, up, out, size, BLOCK: tl.constexpr) -> Any:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _gated_slopes(gate, up, slope, gate_slope, up_slope, size, BLOCK: tl.constexpr) -> Any:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(slope + place, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(g)
        to_gate = above * u * share * (1 + g * (1 - share))
        tl.store(gate_slope + place, to_gate.to(gate_slope.dtype.element_ty), mask=inside)
        tl.store(up_slope + place, (above * g * share).to(up_slope.dtype.element_ty), mask=inside)
