"""TTT-Linear and TTT-MLP: layers whose state is a small model that learns while text goes by (arXiv 2407.04620).

Each head has a model f that learns to reconstruct a token's value from its key, and is read with the query:

    f(x) = x + LN(x W + b)                          TTT-Linear
    f(x) = x + LN(gelu(x W1 + b1) W2 + b2)          TTT-MLP
    loss_t = 1/2 |f(k_t) - v_t|^2
    W_t = W_start - c_i * sum over s <= t of rate_s * gradient of loss_s at W_start,        output_t = f(q_t; W_t)

W_start is that at the beginning of t's mini-batch of 16 tokens, i is t's place in it, c_i = 1 / i plus a learned
number, and rate_s = sigmoid(a learned map of token s) / K. The next mini-batch starts with the last W_t. The first W
is learned.

`forward` is the dual form: within a mini-batch no W_t is made, since q_t W_t = q_t W_start - c_i sum rate_s (q_t k_s)
g_s. Only what the next mini-batch needs is computed one after another, and what is read from them for all at once.
`step` is the primal form for one token, whose state has a fixed size.

What differs from the paper: keys and queries get a short causal convolution each, as in its Mamba backbone, and no
rotary positions within a mini-batch; the block around it is the same as that of the other families.

Shapes: B rows, T tokens, D hidden, H heads, K width of a head, N mini-batches, L tokens of one, G = B * H.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from absorber.bench.families.convolution import ShortConvolution

_EPSILON = 1e-6
_INNER = 4
"""Inner width of TTT-MLP, as a multiple of K."""


class TTTMixer(nn.Module):
    """One layer, in the place of attention."""

    def __init__(self, hidden: int, heads: int, *, inner: str = "linear", batch_tokens: int = 16, std: float = 0.02):
        """Make its weights; `inner` is linear or mlp."""
        super().__init__()
        self.heads, self.width, self.batch_tokens = heads, hidden // heads, batch_tokens
        self.query, self.key, self.value, self.gate, self.output = (
            nn.Linear(hidden, hidden, bias=False) for _ in range(5)
        )
        self.query_convolution, self.key_convolution = ShortConvolution(hidden), ShortConvolution(hidden)
        self.rate = nn.Linear(hidden, heads)
        self.place_L = nn.Parameter(torch.zeros(batch_tokens))
        """Learned part of c."""
        self.norm_weight_HK = nn.Parameter(torch.ones(heads, self.width))
        self.norm_bias_HK = nn.Parameter(torch.zeros(heads, self.width))
        wide = _INNER * self.width
        widths = [(self.width, self.width)] if inner == "linear" else [(self.width, wide), (wide, self.width)]
        self.weights = nn.ParameterList(nn.Parameter(std * torch.randn(heads, *pair)) for pair in widths)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(heads, 1, pair[1])) for pair in widths)
        self.final_norm = nn.LayerNorm(hidden, eps=_EPSILON)

    # --- Training and reading at once

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Read rows from their beginning."""
        query_BTD, key_BTD = self.query_convolution(self.query(hidden_BTD)), self.key_convolution(self.key(hidden_BTD))
        value_BTD, rates_BTH = self.value(hidden_BTD), self.rate(hidden_BTD)
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            rates_BTH = torch.sigmoid(rates_BTH.float()) / self.width
            parts = (self._by_batch(part) for part in (query_BTD, key_BTD, value_BTD, rates_BTH))
            read_NGLK = self._dual(*parts)
            read_BTD = self._joined(read_NGLK, hidden_BTD.shape[1])
        return self._finish(hidden_BTD, read_BTD.to(hidden_BTD.dtype))

    def _finish(self, hidden: Tensor, read: Tensor) -> Tensor:
        gated: Tensor = functional.gelu(self.gate(hidden), approximate="tanh") * self.final_norm(read)
        return self.output(gated)  # type: ignore[no-any-return]

    def _by_batch(self, states_BTI: Tensor) -> Tensor:
        """[B, T, H * W] to [N, G, L, W], float32; what is filled up at the end is seen from no token."""
        rows, num_tokens, _ = states_BTI.shape
        missing = -num_tokens % self.batch_tokens
        padded = functional.pad(states_BTI.float(), (0, 0, 0, missing))
        split = padded.view(rows, -1, self.batch_tokens, self.heads, states_BTI.shape[2] // self.heads)
        return split.permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()

    def _joined(self, read_NGLK: Tensor, num_tokens: int) -> Tensor:
        split = read_NGLK.view(read_NGLK.shape[0], -1, self.heads, *read_NGLK.shape[2:])
        return split.permute(1, 0, 3, 2, 4).flatten(3, 4).flatten(1, 2)[:, :num_tokens]

    @property
    def _places(self) -> Tensor:
        """The factors c [L]."""
        count = torch.arange(1, self.batch_tokens + 1, device=self.place_L.device)
        return (1 / count + self.place_L.float()).clamp(min=0)

    def _norms(self, rows: int) -> tuple[Tensor, Tensor]:
        """The inner norm's weight and bias for each row and head, [G, 1, K]."""
        return _repeated(self.norm_weight_HK[:, None], rows), _repeated(self.norm_bias_HK[:, None], rows)

    def _dual(self, query_NGLK: Tensor, key_NGLK: Tensor, value_NGLK: Tensor, rates_NGL1: Tensor) -> Tensor:
        rows, places_L = query_NGLK.shape[1] // self.heads, self._places
        norms = self._norms(rows)
        steps = (places_L[-1] * rates_NGL1).unbind(0)
        keys, targets = key_NGLK.unbind(0), (value_NGLK - key_NGLK).unbind(0)
        weights = [_repeated(weight, rows) for weight in self.weights]
        biases = [_repeated(bias, rows) for bias in self.biases]
        kept: list[list[Tensor]] = []
        for key_GLK, target_GLK, step_GL1 in zip(keys, targets, steps, strict=True):
            inputs, gradients = _gradients(key_GLK, target_GLK, weights, biases, *norms)
            kept.append([*weights, *biases, *inputs[1:], *gradients])
            moves = [step_GL1 * gradient for gradient in gradients]
            weights = [
                torch.baddbmm(w, x.mT, move, alpha=-1) for w, x, move in zip(weights, inputs, moves, strict=True)
            ]
            biases = [b - move.sum(dim=1, keepdim=True) for b, move in zip(biases, moves, strict=True)]
        stacked = [torch.stack(parts) for parts in zip(*kept, strict=True)]
        depth = len(weights)
        starts, shifts = stacked[:depth], stacked[depth : 2 * depth]
        inputs_seen, gradients_seen = [key_NGLK, *stacked[2 * depth : -depth]], stacked[-depth:]
        factors_NGLL = (places_L[:, None] * rates_NGL1.mT).tril()
        states = query_NGLK
        for layer in range(depth):
            if layer:
                states = functional.gelu(states, approximate="tanh")
            # 1 is the bias's own product.
            scores_NGLL = factors_NGLL * (states @ inputs_seen[layer].mT + 1)
            states = states @ starts[layer] + shifts[layer] - scores_NGLL @ gradients_seen[layer]
        return query_NGLK + _normalized(states) * norms[0] + norms[1]

    # --- One token after another

    def fresh(self, rows: int) -> list[Tensor]:
        """The state before the first token; `step` changes it in place."""
        device = self.place_L.device
        convolutions = [self.query_convolution.fresh(rows), self.key_convolution.fresh(rows)]
        start = [_repeated(part, rows).float().clone() for part in (*self.weights, *self.biases)]
        place = torch.zeros(1, dtype=torch.long, device=device)
        return [place, *convolutions, *start, *(torch.zeros_like(part) for part in start)]

    @torch.no_grad()
    def step(self, hidden_BD: Tensor, state: list[Tensor]) -> Tensor:
        """Read one token more."""
        place, query_tail, key_tail, *rest = state
        depth = len(self.weights)
        starts, sums = rest[: 2 * depth], rest[2 * depth :]
        rows = hidden_BD.shape[0]
        norms = self._norms(rows)

        def by_head(part_BD: Tensor) -> Tensor:
            return part_BD.float().reshape(rows * self.heads, 1, self.width)

        query_G1K = by_head(self.query_convolution.step(self.query(hidden_BD), query_tail))
        key_G1K = by_head(self.key_convolution.step(self.key(hidden_BD), key_tail))
        target_G1K = by_head(self.value(hidden_BD)) - key_G1K
        rate_G11 = torch.sigmoid(self.rate(hidden_BD).float()).reshape(-1, 1, 1) / self.width
        inputs, gradients = _gradients(key_G1K, target_G1K, starts[:depth], starts[depth:], *norms)
        found = [x.mT @ (rate_G11 * g) for x, g in zip(inputs, gradients, strict=True)]
        found += [rate_G11 * gradient for gradient in gradients]
        for total, part in zip(sums, found, strict=True):
            total += part
        factor = self._places.index_select(0, place)
        now = [start - factor * total for start, total in zip(starts, sums, strict=True)]
        states = query_G1K
        for layer in range(depth):
            if layer:
                states = functional.gelu(states, approximate="tanh")
            states = states @ now[layer] + now[depth + layer]
        read_BD = (query_G1K + _normalized(states) * norms[0] + norms[1]).reshape(rows, -1)
        # No look at the place's value, so that a step can be recorded.
        is_last = place == self.batch_tokens - 1
        for start, total, current in zip(starts, sums, now, strict=True):
            start.copy_(torch.where(is_last, current, start))
            total.copy_(torch.where(is_last, 0.0, total))
        place.copy_((place + 1) % self.batch_tokens)
        return self._finish(hidden_BD, read_BD.to(hidden_BD.dtype))


def _gradients(
    key_GLK: Tensor, target_GLK: Tensor, weights: Any, biases: Any, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs of f's layers for some keys, and each token's gradient of the loss by what the layers put out."""
    inputs, states = [key_GLK], torch.baddbmm(biases[0], key_GLK, weights[0])
    between = states
    if len(weights) == 2:
        inputs.append(functional.gelu(between, approximate="tanh"))
        states = torch.baddbmm(biases[1], inputs[1], weights[1])
    slope = (fused("cuda") if states.is_cuda else None) or _norm_gradient
    last = slope(states, target_GLK, norm_weight, norm_bias)
    if len(weights) == 1:
        return inputs, [last]
    return inputs, [(last @ weights[1].mT) * _gelu_slope(between), last]


def _norm_gradient(states: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gradient by the states of 1/2 |LN(states) - target|^2."""
    centered = states - states.mean(dim=-1, keepdim=True)
    scale = torch.rsqrt(centered.square().mean(dim=-1, keepdim=True) + _EPSILON)
    normal = centered * scale
    slope = (normal * weight + bias - target) * weight
    mean, along = slope.mean(dim=-1, keepdim=True), (slope * normal).mean(dim=-1, keepdim=True)
    return (slope - mean - normal * along) * scale


@functools.cache
def fused(device: str) -> Callable[..., Tensor] | None:
    """`_norm_gradient` compiled to one kernel each way, since small kernels in a row are most of a pass on a GPU.

    Returns:
        The function; None where it cannot be compiled.
    """
    compiled = torch.compile(_norm_gradient, dynamic=False)
    states = torch.ones(2, 16, 64, device=device).cumsum(dim=-1).requires_grad_()
    weight = torch.ones(2, 1, 64, device=device, requires_grad=True)
    try:
        with torch.enable_grad():
            compiled(states, states.detach(), weight, weight).sum().backward()  # type: ignore[no-untyped-call]
    except Exception:  # whatever compilers raise where a part of them is missing
        return None
    return compiled


def _normalized(states: Tensor) -> Tensor:
    return functional.layer_norm(states, states.shape[-1:], eps=_EPSILON)


def _gelu_slope(x: Tensor) -> Tensor:
    """Derivative of the gelu that is approximated by tanh."""
    factor, cubic = 0.7978845608028654, 0.044715  # sqrt(2 / pi)
    bent = torch.tanh(factor * (x + cubic * x**3))
    return 0.5 * (1 + bent) + 0.5 * x * (1 - bent.square()) * factor * (1 + 3 * cubic * x.square())


def _repeated(part: Tensor, rows: int) -> Tensor:
    """[H, ...] to [G, ...], row by row."""
    return part.float().expand(rows, *part.shape).flatten(0, 1)
