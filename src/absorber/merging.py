"""A memory in the form in which it is applied soonest: in the base model's type, or in weights that hold both.

Neither touches the base model.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from absorber import kernels
from absorber.adapter import Adapter
from absorber.backbone import Backbone

_UPPER = 1 if sys.byteorder == "little" else 0
"""Which of the two 16-bit halves of a float32 is the upper one."""


def converted(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """A copy in the type in which its products run anyway, so that no step has to convert it."""
    down, up = (
        {name: w.detach().to(dtype, copy=True) for name, w in part.items()} for part in (adapter.down, adapter.up)
    )
    return Adapter(down, up, alpha=adapter.alpha, layout=adapter.layout)


@torch.no_grad()
def side_by_side(
    adapter: Adapter, names: Sequence[str], weights: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Move the A of projections that share an input into one tensor, of which the adapter's become views.

    Args:
        adapter: Of one stream; it goes on as before.
        names: Of the projections; those that it leaves alone are given zeros.
        weights: W of each.

    Returns:
        A of all, one after another [sum of R, I], and B of each, [O, R].
    """
    rank = adapter.rank
    alone = weights[0].new_zeros(rank, weights[0].shape[1])
    down_RI = torch.cat([adapter.down[name][0] if name in adapter.down else alone for name in names])
    for index, name in enumerate(names):
        if name in adapter.down:
            adapter.down[name] = nn.Parameter(down_RI[None, index * rank : (index + 1) * rank])
    ups = tuple(
        adapter.up[name].detach()[0] if name in adapter.up else weight.new_zeros(weight.shape[0], rank)
        for name, weight in zip(names, weights, strict=True)
    )
    return down_RI, ups


def in_decoder(backbone: Backbone, name: str) -> str:
    """A module's name inside the decoder, given that in the model."""
    prefix = next(name for name, module in backbone.model.named_modules() if module is backbone.decoder) + "."
    return name.removeprefix(prefix)


@torch.no_grad()
def merge(backbone: Backbone, adapter: Adapter, merged: dict[str, Tensor]) -> None:
    """Bring weights W + s B A up to date, which stand beside those of the base model and leave them alone.

    In bfloat16 most of a memory's changes are smaller than half the distance of a weight to the next number, and
    rounding to the nearest would take them away; so a weight is rounded up as often as it is near the upper one.

    Args:
        backbone: The model.
        adapter: Of one stream.
        merged: By the weight's name inside the decoder; written in place, or filled if it is empty.
    """
    generator = torch.Generator(backbone.device).manual_seed(0)
    for seed, name in enumerate(adapter.down):
        weight: Tensor = backbone.projections[name].weight  # type: ignore[assignment]
        key = f"{in_decoder(backbone, name)}.weight"
        if key not in merged:
            merged[key] = torch.empty_like(weight)
        factors = (adapter.up[name][0].float().contiguous(), adapter.down[name][0].float().contiguous())
        if kernels.usable(weight) and weight.dtype == torch.bfloat16 and weight.is_contiguous():
            kernels.merge_rounded(weight, *factors, adapter.scale, merged[key], seed=seed)
            continue
        # One copy in float32, which everything below is done in: what this takes is the passes over it.
        exact = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        exact.addmm_(*factors, alpha=adapter.scale)
        _round_into(merged[key], exact, generator)


def _round_into(target: Tensor, exact: Tensor, generator: torch.Generator) -> None:
    """Write float32 into a tensor of another type, and spoil it; to bfloat16 at random, right in the mean."""
    if target.dtype != torch.bfloat16:
        target.copy_(exact)
        return
    # Drawn anew for each weight: with the same noise for two of a shape, their errors would add up and not cancel.
    noise = torch.randint(0, 2**16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    # The upper half of a float32 is a bfloat16; what is added to the lower half carries as often as it should.
    halves = exact.view(torch.int32).add_(noise).view(torch.int16)
    target.view(torch.int16).copy_(halves[..., _UPPER::2])
