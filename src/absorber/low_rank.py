"""The product that an adapter adds to a projection's, and its gradients.

Shapes: B streams, T tokens, R rank, I inputs and O outputs of a projection.
"""

from typing import Any

import torch
from torch import Tensor, nn

from absorber import kernels
from absorber.errors import ModelError


def add_low_rank(
    output: Tensor, x: Tensor, down_BRI: Tensor, up_BOR: Tensor, *, scale: float, over: bool = False
) -> Tensor:
    """Compute output + s B A x with each row's own A and B, in the type of x.

    Args:
        output: What the projection gave, [B, T, O].
        x: What it was given, [B, T, I], or [B * T, I] from models that flatten the batch; with one stream any [..., I].
        down_BRI: A.
        up_BOR: B.
        scale: s.
        over: Whether the sum may be written over the output where nothing is differentiated.

    Returns:
        As `output`.

    Raises:
        ModelError: If the batch is not of B rows.
    """
    if scale != 1:
        up_BOR = up_BOR * scale  # the smaller factor
    num_streams = down_BRI.shape[0]
    check_rows(x, num_streams)
    if kernels.usable(x) and torch.is_grad_enabled():
        summed: Tensor = _AddLowRank.apply(output, x, down_BRI, up_BOR)  # type: ignore[no-untyped-call]
        return summed
    output_BTO, x_BTI = output.reshape(num_streams, -1, output.shape[-1]), x.reshape(num_streams, -1, x.shape[-1])
    low_BTR = torch.bmm(x_BTI, down_BRI.to(x.dtype).mT)
    if over and not torch.is_grad_enabled() and output.is_contiguous():
        output_BTO.baddbmm_(low_BTR, up_BOR.to(x.dtype).mT)
        return output
    return torch.baddbmm(output_BTO, low_BTR, up_BOR.to(x.dtype).mT).view_as(output)


def check_rows(x: Tensor, num_streams: int) -> None:
    """Refuse an input whose rows cannot be shared out among the streams.

    Raises:
        ModelError: If it is one.
    """
    if num_streams > 1 and x.shape[0] % num_streams:
        raise ModelError(
            f"the adapter has {num_streams} streams, so the batch needs as many rows, or a multiple; got {x.shape[0]}"
        )


def frozen_weight(module: nn.Module) -> Tensor | None:
    """W of a plain projection that is not trained itself."""
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return None
    return None if module.bias is not None and module.bias.requires_grad else module.weight


class _AddLowRank(torch.autograd.Function):
    """output + B A x, with the gradients of A and B in float32."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, down_BRI: Tensor, up_BOR: Tensor) -> Tensor:
        down_BRI, up_BOR = down_BRI.to(x.dtype), up_BOR.to(x.dtype)
        output_BTO, x_BTI = (y.reshape(len(down_BRI), -1, y.shape[-1]) for y in (output, x))
        low_BTR = torch.bmm(x_BTI, down_BRI.mT)
        ctx.save_for_backward(x, low_BTR, down_BRI, up_BOR)
        # No view, which models could not change in place.
        summed = torch.empty_like(output, memory_format=torch.contiguous_format)
        torch.baddbmm(output_BTO, low_BTR, up_BOR.mT, out=summed.view_as(output_BTO))
        return summed

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, low_BTR, down_BRI, up_BOR = ctx.saved_tensors
        slope_BTO, x_BTI = (y.reshape(len(down_BRI), -1, y.shape[-1]) for y in (upstream[0], x))
        low_slope_BTR = torch.bmm(slope_BTO, up_BOR)
        x_slope = torch.bmm(low_slope_BTR, down_BRI).view_as(x) if ctx.needs_input_grad[1] else None
        return upstream[0], x_slope, outer_products(low_slope_BTR, x_BTI), outer_products(slope_BTO, low_BTR)


def outer_products(p_BTP: Tensor, q_BTQ: Tensor) -> Tensor:
    """The sum over t of p_t q_t^T, stream by stream, in float32; for a single stream cuBLAS has a good kernel."""
    if p_BTP.shape[0] == 1 and p_BTP.is_cuda and p_BTP.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(p_BTP[0].mT, q_BTQ[0], out_dtype=torch.float32)[None]
    return kernels.outer_products(p_BTP, q_BTQ)
