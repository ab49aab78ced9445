"""A short causal convolution of each feature, as a sum of shifted products: quick without kernels of its own.

Shapes: B rows, T tokens, D features, W taps.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

TAPS = 4
"""W, unless said otherwise."""


def causal_convolution(states_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """Sum over the last W tokens, each feature with weights of its own; the last weight is that of the token itself."""
    taps, num_tokens = weight_DW.shape[1], states_BTD.shape[1]
    padded = functional.pad(states_BTD, (0, 0, taps - 1, 0))
    found = padded[:, :num_tokens] * weight_DW[:, 0]
    for tap in range(1, taps):
        found = torch.addcmul(found, padded[:, tap : tap + num_tokens], weight_DW[:, tap])
    return found if bias_D is None else found + bias_D


class ShortConvolution(nn.Module):
    """The same as a layer, which begins near the identity."""

    def __init__(self, features: int, taps: int = TAPS) -> None:
        """Make its weights."""
        super().__init__()
        weight = torch.randn(features, 1, taps) / (4 * taps)
        weight[..., -1] += 1
        self.weight = nn.Parameter(weight)

    def forward(self, states_BTD: Tensor) -> Tensor:
        """Convolve rows from their beginning."""
        return causal_convolution(states_BTD, self.weight[:, 0].to(states_BTD.dtype))

    def fresh(self, rows: int) -> Tensor:
        """The tokens before the first, [B, W - 1, D]."""
        features, _, taps = self.weight.shape
        return self.weight.new_zeros(rows, taps - 1, features)

    def step(self, states_BD: Tensor, tail_BWD: Tensor) -> Tensor:
        """Convolve one token more; the tail moves on in place."""
        seen_BWD = torch.cat([tail_BWD, states_BD[:, None].to(tail_BWD.dtype)], dim=1)
        tail_BWD.copy_(seen_BWD[:, 1:])
        return torch.einsum("bwd,dw->bd", seen_BWD, self.weight[:, 0])
