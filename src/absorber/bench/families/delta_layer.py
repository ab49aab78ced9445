"""A gated delta rule: a linear recurrent network whose state is a matrix that forgets and corrects (arXiv 2412.06464).

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T,        output_t = S_t^T q_t

with keys and queries of length one, a forgetting rate a_t = exp(-e^A softplus(w x_t + d)) and a writing rate
b_t = sigmoid(u x_t) for each head. Keys, values and queries get a short causal convolution; what is read is normalized
and gated before the output projection.

Over a chunk of L tokens the values that are really written, U, solve a triangular system, so that all but the state
between chunks is computed for all chunks at once. With g_i the product of a over the chunk's first i tokens:

    (I + A) U = diag(b) (V - diag(g) K S),   A_ij = b_i g_i / g_j (k_i . k_j) for j < i
    output_i = g_i S^T q_i + sum over j <= i of g_i / g_j (q_i . k_j) u_j

Shapes: B rows, T tokens, D hidden, H heads, K width of a head, N chunks, L tokens of one, G = B * H.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from absorber.bench.families.convolution import ShortConvolution

_CHUNK = 64


class DeltaMixer(nn.Module):
    """One layer, in the place of attention."""

    def __init__(self, hidden: int, heads: int) -> None:
        """Make its weights."""
        super().__init__()
        self.heads, self.width = heads, hidden // heads
        self.query, self.key, self.value, self.gate, self.output = (
            nn.Linear(hidden, hidden, bias=False) for _ in range(5)
        )
        self.query_convolution, self.key_convolution, self.value_convolution = (
            ShortConvolution(hidden) for _ in range(3)
        )
        self.write = nn.Linear(hidden, heads, bias=False)
        self.forget = nn.Linear(hidden, heads, bias=False)
        self.scale_H = nn.Parameter(torch.linspace(1, 16, heads).log())
        """A; heads begin with different spans."""
        # softplus of it is .001 to .1, as in Mamba.
        self.shift_H = nn.Parameter(torch.logspace(-3, -1, heads).expm1().log())
        self.norm_weight_K = nn.Parameter(torch.ones(self.width))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Read rows from their beginning."""
        query, key, value = (
            functional.silu(convolution(projection(hidden_BTD)))
            for projection, convolution in (
                (self.query, self.query_convolution),
                (self.key, self.key_convolution),
                (self.value, self.value_convolution),
            )
        )
        writes_BTH, forgets_BTH = self.write(hidden_BTD), self.forget(hidden_BTD)
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            decay_BTH = -self.scale_H.float().exp() * functional.softplus(forgets_BTH.float() + self.shift_H.float())
            read_BTHK = self._read(query, key, value, torch.sigmoid(writes_BTH.float()), decay_BTH)
            read_BTHK = functional.rms_norm(read_BTHK, (self.width,), self.norm_weight_K.float(), eps=1e-6)
        gated = read_BTHK.flatten(2).to(hidden_BTD.dtype) * functional.silu(self.gate(hidden_BTD))
        return self.output(gated)  # type: ignore[no-any-return]

    def _read(
        self, query_BTD: Tensor, key_BTD: Tensor, value_BTD: Tensor, writes_BTH: Tensor, decay_BTH: Tensor
    ) -> Tensor:
        rows, num_tokens, _ = query_BTD.shape
        chunk = min(_CHUNK, num_tokens)
        missing = -num_tokens % chunk

        def by_chunk(states: Tensor) -> Tensor:
            padded = functional.pad(states.float(), (0, 0, 0, missing))
            split = padded.view(rows, -1, chunk, self.heads, states.shape[2] // self.heads)
            return split.permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()

        query, key, value, writes, decay = map(by_chunk, (query_BTD, key_BTD, value_BTD, writes_BTH, decay_BTH))
        query = functional.normalize(query, dim=-1) * self.width**-0.5
        read_NGLK = chunked_delta(query, functional.normalize(key, dim=-1), value, writes, decay)
        split = read_NGLK.view(read_NGLK.shape[0], rows, self.heads, chunk, self.width)
        return split.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :num_tokens]


def chunked_delta(query: Tensor, key: Tensor, value: Tensor, writes: Tensor, decay: Tensor) -> Tensor:
    """The rule over chunks.

    Args:
        query: [N, G, L, K].
        key: The same, of length one.
        value: [N, G, L, K].
        writes: b, [N, G, L, 1].
        decay: log a, [N, G, L, 1].

    Returns:
        What is read, [N, G, L, K].
    """
    chunk, width = key.shape[2], key.shape[3]
    total = decay.cumsum(dim=2)  # log g
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=key.device).tril()
    ratio_LL = (total - total.mT).masked_fill(~seen, -torch.inf).exp()
    system = (writes * ratio_LL * (key @ key.mT)).tril(-1)
    sides = torch.cat([writes * value, writes * total.exp() * key], dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    own, against = solved[..., :width].unbind(0), solved[..., width:].unbind(0)
    left = (total[:, :, -1:] - total).exp()
    keys, remains = (key * left).mT.unbind(0), total[:, :, -1:].exp().unbind(0)
    state = torch.zeros_like(key[0, :, :1].mT @ value[0, :, :1])
    starts, written = [], []
    for own_GLK, against_GLK, keys_GKL, remains_G11 in zip(own, against, keys, remains, strict=True):
        starts.append(state)
        written.append(torch.baddbmm(own_GLK, against_GLK, state, alpha=-1))
        state = torch.baddbmm(remains_G11 * state, keys_GKL, written[-1])
    return (query * total.exp()) @ torch.stack(starts) + (ratio_LL * (query @ key.mT)) @ torch.stack(written)
