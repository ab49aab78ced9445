"""A memory's products in a round, of projections that read the same input together; hooks are the slow twin.

The small products of an adapter take far longer than their arithmetic: what counts is how many there are. Here A of q,
k and v is one product, and so is its gradient; what each projection adds to the gradient of their input is summed by
the products that make it; and the factors are brought into the model's type once a pass, all at once. Where the weights
of such projections lie one behind another in memory (`backbone.lay_together`), they are one product as well.

Shapes: B streams, T tokens, R rank, S the ranks of all projections of a family, I inputs and O outputs of a projection.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from absorber import kernels
from absorber.adapter import Adapter
from absorber.backbone import Backbone, altered_by_others, families, lying_together
from absorber.fused_text import forwards
from absorber.low_rank import check_rows, frozen_weight, outer_products


@contextlib.contextmanager
def together(backbone: Backbone, adapter: Adapter) -> Iterator[None]:
    """Let an attached adapter be applied by families inside the `with` block, where kernels can run.

    What is not a plain frozen projection, or is altered by others, keeps its hook. As with `fused`, a backward pass
    through blocks that are `checkpointed` belongs into the same block.
    """
    able = families(backbone) if kernels.usable_on(backbone.device.type) else []
    found = [_Family(backbone, adapter, names) for names in able if _can(backbone, adapter, names)]
    if not found:
        yield
        return
    handle = backbone.decoder.register_forward_pre_hook(lambda *args: _take_factors(found, adapter))
    adapter.elsewhere = frozenset(name for family in found for name in family.names)
    replaced = {module: call for family in found for module, call in family.calls()}
    try:
        with forwards(replaced):
            yield
    finally:
        handle.remove()
        adapter.elsewhere = frozenset()


def _can(backbone: Backbone, adapter: Adapter, names: Sequence[str]) -> bool:
    modules = [backbone.projections[name] for name in names]
    weights = [frozen_weight(module) for module in modules]
    return not altered_by_others(*modules) and all(
        name in adapter.down and weight is not None and weight.device == adapter.down[name].device
        for name, weight in zip(names, weights, strict=True)
    )


class _Family:
    """Projections that read the same input, and what the adapter adds to them."""

    def __init__(self, backbone: Backbone, adapter: Adapter, names: Sequence[str]) -> None:
        """Look up the weights; `take` follows before each pass."""
        self.names, self._adapter = names, adapter
        self.modules: list[Any] = [backbone.projections[name] for name in names]
        self.weights: list[Tensor] = [module.weight for module in self.modules]
        self.sizes, self.scale = [len(weight) for weight in self.weights], adapter.scale
        self._biases = [module.bias for module in self.modules if module.bias is not None]
        # Parts of one result cannot be changed in place, as models do that clip them (OLMo).
        whole = len(self._biases) in (0, len(names)) and getattr(backbone.model.config, "clip_qkv", None) is None
        self.joint_OI = lying_together(self.weights) if whole else None
        self._input: Tensor | None
        self._left: dict[int, Tensor]
        self.forget()

    def calls(self) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """What each projection is to run instead of its own forward."""

        def call_of(index: int) -> Callable[[Tensor], Tensor]:
            return lambda x: self._call(index, x)

        return [(module, call_of(index)) for index, module in enumerate(self.modules)]

    def take(self, rows: Tensor | None) -> None:
        """Choose the weights of the pass that begins, and make room for them in the model's type."""
        kept = [self._adapter.down, self._adapter.up]
        chosen = [[part[name] if rows is None else part[name][rows] for name in self.names] for part in kept]
        self.downs, self.ups = chosen
        kind, (num_streams, rank, inputs) = self.weights[0].dtype, chosen[0][0].shape
        self.down_BSI = chosen[0][0].new_empty(num_streams, rank * len(self.names), inputs, dtype=kind)
        self.ups_BOR = [torch.empty_like(up, dtype=kind) for up in self.ups]

    def forget(self) -> None:
        """Give up what nobody asked for."""
        self._input, self._left = None, {}

    def base(self, x: Tensor) -> list[Tensor]:
        """What the projections make of x without a memory."""
        if self.joint_OI is not None:
            # Made anew in each pass: a recorded one keeps what it made, not what was made before it.
            bias = torch.cat(self._biases) if self._biases else None
            return list(torch.split(nn.functional.linear(x, self.joint_OI, bias), self.sizes, dim=-1))
        return [nn.functional.linear(x, module.weight, module.bias) for module in self.modules]

    def _call(self, index: int, x: Tensor) -> Tensor:
        """One projection of x: all are computed when the first is asked for, or one of them for the second time."""
        if self._input is not x or index not in self._left:
            self._input, self._left = x, dict(enumerate(self._all(x)))
        output = self._left.pop(index)
        if not self._left:
            self._input = None
        return output

    def _all(self, x: Tensor) -> Sequence[Tensor]:
        if not self._adapter.enabled:
            return self.base(x)
        check_rows(x, len(self.down_BSI))
        outputs: tuple[Tensor, ...] = _Together.apply(x, self, *self.downs, *self.ups)  # type: ignore[no-untyped-call]
        return outputs


@torch.no_grad()
def _take_factors(found: Sequence[_Family], adapter: Adapter) -> None:
    """Bring the factors of all families into the model's type, B with the adapter's scale; forget the pass before."""
    for family in found:
        family.forget()
    if not adapter.enabled:
        return
    for family in found:
        with torch.enable_grad():
            family.take(adapter.rows)
    places = [place for family in found for place in torch.split(family.down_BSI, adapter.rank, dim=1)]
    torch._foreach_copy_(places, [down for family in found for down in family.downs])
    ups = [up for family in found for up in family.ups]
    if adapter.scale != 1:
        ups = list(torch._foreach_mul(ups, adapter.scale))
    torch._foreach_copy_([place for family in found for place in family.ups_BOR], ups)


class _Together(torch.autograd.Function):
    """W x + b + s B A x of all projections of a family; gradients of A and B are in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, family: _Family, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.family, down_BSI, ups_BOR = family, family.down_BSI, family.ups_BOR
        outputs, num_streams = family.base(x), len(down_BSI)
        low_BTS = torch.bmm(x.reshape(num_streams, -1, x.shape[-1]), down_BSI.mT)
        lows = low_BTS.chunk(len(outputs), dim=-1)
        for output, low_BTR, up_BOR in zip(outputs, lows, ups_BOR, strict=True):
            output.view(num_streams, -1, output.shape[-1]).baddbmm_(low_BTR, up_BOR.mT)
        ctx.save_for_backward(x, low_BTS, down_BSI, *ups_BOR)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        family, (x, low_BTS, down_BSI, *ups_BOR) = ctx.family, ctx.saved_tensors
        count, num_streams = len(ups_BOR), len(down_BSI)
        slopes = [slope.reshape(-1, slope.shape[-1]) for slope in upstream]
        if family.joint_OI is not None:
            joint_slope = torch.cat(slopes, dim=1)
            slopes = list(torch.split(joint_slope, family.sizes, dim=1))
        slopes_BTO = [slope.view(num_streams, -1, slope.shape[-1]) for slope in slopes]
        low_slope_BTS = torch.empty_like(low_BTS)
        low_slopes = low_slope_BTS.chunk(count, dim=-1)
        for low_slope, slope_BTO, up_BOR in zip(low_slopes, slopes_BTO, ups_BOR, strict=True):
            torch.bmm(slope_BTO, up_BOR, out=low_slope)
        x_slope = None
        if ctx.needs_input_grad[0]:
            if family.joint_OI is not None:
                x_slope = joint_slope @ family.joint_OI
            else:
                x_slope = slopes[0] @ family.weights[0]
                for slope, weight in zip(slopes[1:], family.weights[1:], strict=True):
                    x_slope.addmm_(slope, weight)
            x_slope.view(num_streams, -1, x.shape[-1]).baddbmm_(low_slope_BTS, down_BSI)
            x_slope = x_slope.view_as(x)
        x_BTI = x.reshape(num_streams, -1, x.shape[-1])
        if num_streams == 1:
            down_slopes = outer_products(low_slope_BTS, x_BTI).chunk(count, dim=1)
        else:  # parts of one tensor would have gaps between streams, and be copied
            down_slopes = tuple(outer_products(low_slope, x_BTI) for low_slope in low_slopes)
        lows = low_BTS.chunk(count, dim=-1)
        up_slopes = [outer_products(slope, low) for slope, low in zip(slopes_BTO, lows, strict=True)]
        if family.scale != 1:
            up_slopes = [slope.mul_(family.scale) for slope in up_slopes]
        return x_slope, None, *down_slopes, *up_slopes
