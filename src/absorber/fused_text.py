"""Quicker parts for a pass over a text, inside a `with` block; the model's own modules go on using them.

Half of what a GPU does in a student step of a Llama is not products: norms, rotary positions and the gated activation
read and write the same states again and again, one small operation after another. Here each is one kernel forward and
one backward. They round once where the model rounds after every operation.

Shapes: B rows, T tokens, H heads, E features of a head.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from absorber import kernels, kernels_text
from absorber.backbone import Backbone

_ROTATE = "apply_rotary_pos_emb"


@contextlib.contextmanager
def fused(backbone: Backbone) -> Iterator[None]:
    """Let the model use quicker parts where it has them and they can run; afterwards it is as it was.

    A backward pass through blocks that are `checkpointed` runs them again, so it belongs into the same block.
    """
    if not kernels.usable_on(backbone.device.type):
        yield
        return
    with quick_norms(backbone), _activations(backbone), rotation(backbone, _rotate_both):
        yield


# --- Norms


@contextlib.contextmanager
def quick_norms(backbone: Backbone) -> Iterator[None]:
    """Norms in one kernel instead of seven; in bfloat16 they round once instead of twice."""

    def quick(norm: Any) -> Callable[[Tensor], Tensor]:
        def forward(hidden: Tensor) -> Tensor:
            return nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)

        return forward

    norms = [
        module
        for module in backbone.decoder.modules()
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    ]
    with forwards({norm: quick(norm) for norm in norms}):
        yield


# --- Gated activation


@contextlib.contextmanager
def _activations(backbone: Backbone) -> Iterator[None]:
    def quick(mlp: Any) -> Callable[[Tensor], Tensor]:
        def forward(hidden: Tensor) -> Tensor:
            result: Tensor = mlp.down_proj(gated(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
            return result

        return forward

    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    found = [
        module
        for module in backbone.blocks.modules()
        if type(module).__name__.endswith("MLP") and all(hasattr(module, part) for part in parts)
    ]
    with forwards({mlp: quick(mlp) for mlp in found if type(mlp.act_fn).__name__.startswith(("SiLU", "Silu"))}):
        yield


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up, of two tensors of one shape; the twin of a model's two operations."""
    result: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return kernels_text.gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return kernels_text.gated_slopes(gate, up, upstream[0].contiguous())


# --- Rotary positions


@contextlib.contextmanager
def rotation(backbone: Backbone, rotate_both: Callable[..., tuple[Tensor, Tensor] | None]) -> Iterator[None]:
    """Turn queries and keys by another function than that of the model's file, which is asked where it returns None."""
    place: Any = sys.modules[type(backbone.blocks[0]).__module__]
    usual = getattr(place, _ROTATE, None)
    if usual is None:
        yield
        return

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **more: Any) -> Any:
        turned = None if args or more else rotate_both(query, key, cos, sin)
        return usual(query, key, cos, sin, *args, **more) if turned is None else turned

    try:
        setattr(place, _ROTATE, rotate)
        yield
    finally:
        setattr(place, _ROTATE, usual)


def _rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    half = cos.shape[-1] // 2
    if not kernels.usable(query) or query.shape[-1] != 2 * half or half & (half - 1):
        return None
    return rotate(query, cos, sin), rotate(key, cos, sin)


def rotate(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Turn features by the angles of their places (arXiv 2104.09864), as the Llama family pairs them.

    Args:
        x_BHTE: E / 2 is a power of two; any strides but of the last axis.
        cos_BTE: Of the angles; one row may serve all.
        sin_BTE: The same.
    """
    result: Tensor = _Rotated.apply(x_BHTE, cos_BTE, sin_BTE)  # type: ignore[no-untyped-call]
    return result


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTE, sin_BTE)
        return kernels_text.rotate(x_BHTE, cos_BTE, sin_BTE)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return kernels_text.rotate(upstream[0], *ctx.saved_tensors, back=True), None, None


@contextlib.contextmanager
def forwards(replaced: dict[Any, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let modules run other functions, and afterwards what they ran before."""
    before = {module: vars(module).get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            module.forward = forward
        yield
    finally:
        for module, usual in before.items():
            if usual is None:
                vars(module).pop("forward", None)
            else:
                module.forward = usual
