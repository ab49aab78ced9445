"""Triton kernels of which six run a block of a Llama over one token; each has a plain twin that it must equal.

    project          twin: fused.plain_project          norm, up to three products of one input, low rank, residual
    project_gated    twin: fused.plain_project_gated    norm, gate and up, silu(gate) * up
    attend_new       twin: fused.plain_attend_new       rotary positions, writing into the cache, attention

Nothing but the weights counts for the time of a product with one vector: they have to be read at the full bandwidth of
the device, with as few kernels as possible between which it idles. So a program reads rows of a weight whole, the next
tile before it uses the last, and everything else is done by the programs that need it: each takes the norm's mean
anew, which scales a sum that is already taken, and adds the part of the memory that belongs to its rows.
Sums are taken in float32 in one fixed order: the same input gives the same bits.

Shapes: I inputs and O outputs of a product, R rank; H heads of queries, K of keys, C places in the cache, E features of
a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from absorber import kernels

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm (arXiv 1910.07467)."""

    gain: Tensor
    """What each feature is multiplied with."""
    eps: float
    """Added to the mean of the squares."""


@dataclass(frozen=True, slots=True)
class Products:
    """One to three projections W that read the same input, and what a memory adds to them: W x + b + s B A x."""

    weights: tuple[Tensor, ...]
    """W, each [O, I], contiguous."""
    biases: tuple[Tensor, ...] = ()
    """b, each [O]; none, or one per weight."""
    down_RI: Tensor | None = None
    """A of all projections in one tensor, one after another; None without a memory."""
    ups: tuple[Tensor, ...] = ()
    """B, each [O, R]; none, or one per weight."""
    scale: float = 1.0
    """s."""

    @property
    def outputs(self) -> tuple[int, ...]:
        """O of each."""
        return tuple(weight.shape[0] for weight in self.weights)


class Launch(NamedTuple):
    """How a product is cut into programs."""

    rows: int
    """Outputs of a program."""
    block: int
    """Inputs that it reads at once."""
    warps: int
    """Of 32 threads."""


LAUNCHES: dict[tuple[int, int], Launch] = {
    # (I, O of all weights that are read), those of LLaMA2-7B and its adapter of rank 64; best of a sweep on an H200.
    (4096, 12288): Launch(2, 2048, 8),
    (4096, 4096): Launch(1, 4096, 8),
    (4096, 22016): Launch(2, 4096, 4),  # of gate and of up
    (11008, 4096): Launch(4, 1024, 2),
    (4096, 32000): Launch(2, 2048, 8),
    (4096, 192): Launch(2, 2048, 8),
    (11008, 64): Launch(1, 4096, 4),
}
"""What was found best for a shape; `launch_for` says what others get."""

ATTEND = Launch(64, 0, 4)
"""Of `attend_new`: keys of a program, and warps."""


def launch_for(inputs: int, outputs: int) -> Launch:
    """How a product of this shape is cut; few outputs, as those of A, one by one, that many processors take part."""
    found = LAUNCHES.get((inputs, outputs))
    if found is not None:
        return found
    whole: int = triton.next_power_of_2(inputs)
    return Launch(1, min(whole, 4096), 8) if outputs <= 1024 else Launch(4, min(whole, 1024), 4)


def project(
    x_I: Tensor,
    products: Products,
    *,
    norm: Norm | None = None,
    residual_O: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute residual + W norm(x) + b + s B A norm(x) of one to three projections.

    Args:
        x_I: The input, contiguous.
        products: The projections.
        norm: Of the input; none if None.
        residual_O: Added to the result; nothing if None.
        dtype: Of the result; that of the input if None.

    Returns:
        The results one after another, [sum of O].
    """
    weights, outputs, inputs = products.weights, products.outputs, x_I.shape[0]
    low = _low(x_I, products, norm)
    launch = launch_for(inputs, sum(outputs))
    out = torch.empty(sum(outputs), device=x_I.device, dtype=dtype or x_I.dtype)
    sizes = (*outputs, 0, 0)[:3]
    _project[(sum(triton.cdiv(size, launch.rows) for size in outputs),)](
        x_I, None if norm is None else norm.gain, *_three(weights), *_three(products.biases), *_three(products.ups),
        low, residual_O, out, *sizes, 0.0 if norm is None else norm.eps, products.scale,
        SIZE=inputs, RANK=_rank(products), BLOCK_RANK=triton.next_power_of_2(_rank(products)),
        COUNT=len(weights), ROWS=launch.rows, BLOCK=launch.block, num_warps=launch.warps,
    )  # fmt: skip
    return out


def project_gated(x_I: Tensor, products: Products, norm: Norm) -> Tensor:
    """Compute silu(gate) * up (arXiv 2002.05202), both as in `project`.

    Args:
        x_I: The input, contiguous.
        products: gate and up.
        norm: Of the input.

    Returns:
        [O], in the type of the input.
    """
    inputs, outputs = x_I.shape[0], products.outputs[0]
    low = _low(x_I, products, norm)
    launch = launch_for(inputs, 2 * outputs)
    out_O = x_I.new_empty(outputs)
    added = (*(products.biases or (None, None)), *(products.ups or (None, None)))
    _project_gated[(triton.cdiv(outputs, launch.rows),)](
        x_I, norm.gain, *products.weights, *added, low, out_O, outputs, norm.eps, products.scale,
        SIZE=inputs, RANK=_rank(products), BLOCK_RANK=triton.next_power_of_2(_rank(products)),
        ROWS=launch.rows, BLOCK=launch.block, num_warps=launch.warps,
    )  # fmt: skip
    return out_O


def attend_new(
    qkv: Tensor,
    cos_E: Tensor,
    sin_E: Tensor,
    keys_KCE: Tensor,
    values_KCE: Tensor,
    place_1: Tensor,
    *,
    scale: float,
    norms: tuple[Norm, Norm] | None = None,
) -> Tensor:
    """Turn a new token's queries and key by its place, write key and value into the cache, and attend to all of it.

    Args:
        qkv: Queries of all heads, keys, values, [(H + 2 K) E], contiguous.
        cos_E: Of the angles of this place; E is a power of two.
        sin_E: The same.
        keys_KCE: The cache, contiguous; written at the place.
        values_KCE: The same.
        place_1: Where the token stands, on the device; what is behind it is not read.
        scale: Of the scores.
        norms: Of queries and keys before they are turned (Qwen 3).

    Returns:
        [H E], in the type of the input.
    """
    key_heads, capacity, features = keys_KCE.shape
    heads = qkv.shape[0] // features - 2 * key_heads
    num_pieces = triton.cdiv(capacity, ATTEND.rows)
    out = qkv.new_empty(heads * features)
    parts = torch.empty(heads, num_pieces, features, device=qkv.device)
    peaks, sums = (torch.empty(heads, num_pieces, device=qkv.device) for _ in range(2))
    query_gain, key_gain = (None, None) if norms is None else (norm.gain for norm in norms)
    _attend_new[(key_heads, num_pieces)](
        qkv, cos_E, sin_E, query_gain, key_gain, keys_KCE, values_KCE, place_1, parts, peaks, sums,
        scale, 0.0 if norms is None else norms[0].eps, capacity, num_pieces,
        KEY_HEADS=key_heads, GROUPS=heads // key_heads, FEATURES=features, KEYS=ATTEND.rows, num_warps=ATTEND.warps,
    )  # fmt: skip
    kernels.attend_join[(heads,)](
        parts, peaks, sums, place_1, out, num_pieces, FEATURES=features, KEYS=ATTEND.rows, PIECES=32, num_warps=4
    )
    return out


def _low(x_I: Tensor, products: Products, norm: Norm | None) -> Tensor | None:
    """A norm(x) of all projections, in float32."""
    if products.down_RI is None:
        return None
    return project(x_I, Products((products.down_RI,)), norm=norm, dtype=torch.float32)


def _rank(products: Products) -> int:
    return products.ups[0].shape[1] if products.ups else 1


def _three(tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Repeat the last, which a program of none of them never reads."""
    return (*tensors, *[tensors[-1]] * 2)[:3] if tensors else (None, None, None)


if triton is not None:

    @triton.jit
    def _tile(weight, row, column, inside, SIZE: tl.constexpr) -> Any:
        """A part of some rows, of which nobody will read anything again before the next token."""
        where = row[:, None].to(tl.int64) * SIZE + column[None, :]
        there = inside[:, None] & (column < SIZE)[None, :]
        return tl.load(weight + where, mask=there, other=0.0, eviction_policy="evict_first")

    @triton.jit
    def _added(bias, up_tile, low, row, inside, scale, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr) -> Any:
        """What bias and memory add to the outputs of some rows."""
        added = tl.zeros(row.shape, tl.float32)
        if bias is not None:
            added += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
        if up_tile is not None:
            rank = tl.arange(0, BLOCK_RANK)
            there = tl.load(low + rank, mask=rank < RANK, other=0.0)
            added += scale * tl.sum(up_tile.to(tl.float32) * there[None, :], 1)
        return added

    @triton.jit
    def _project(
        x, gain, w0, w1, w2, b0, b1, b2, u0, u1, u2, low, residual, out, o0, o1, o2, eps, scale,
        SIZE: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, COUNT: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ) -> Any:  # fmt: skip
        """One program per few rows of one of the weights."""
        block = tl.program_id(0)
        weight, bias, up, size, start = w0, b0, u0, o0, 0
        if COUNT > 1:
            blocks0, blocks1 = tl.cdiv(o0, ROWS), tl.cdiv(o1, ROWS)
            if block >= blocks0 + blocks1:
                weight, size, start = w2, o2, o0 + o1
                if b0 is not None:
                    bias = b2
                if u0 is not None:
                    up, low = u2, low + 2 * RANK
                block -= blocks0 + blocks1
            elif block >= blocks0:
                weight, size, start = w1, o1, o0
                if b0 is not None:
                    bias = b1
                if u0 is not None:
                    up, low = u1, low + RANK
                block -= blocks0
        row = block * ROWS + tl.arange(0, ROWS)
        inside = row < size
        column = tl.arange(0, BLOCK)
        tile = _tile(weight, row, column, inside, SIZE)
        if up is not None:  # asked for now, so that nobody waits for it at the end
            up = _tile(up, row, tl.arange(0, BLOCK_RANK), inside, RANK)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        squares = tl.zeros((1, BLOCK), tl.float32)
        for first in range(0, SIZE, BLOCK):
            # Under way while the tile before it is used.
            ahead = _tile(weight, row, first + BLOCK + column, inside, SIZE)
            # Two axes from the beginning, so that the input lies in the threads as the tile does.
            where = first + column[None, :]
            part = tl.load(x + where, mask=where < SIZE, other=0.0).to(tl.float32)
            if gain is not None:
                squares += part * part
                part *= tl.load(gain + where, mask=where < SIZE, other=0.0).to(tl.float32)
            total += tile.to(tl.float32) * part
            tile = ahead
        result = tl.sum(total, 1)
        if gain is not None:
            result *= tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / SIZE + eps)
        result += _added(bias, up, low, row, inside, scale, RANK, BLOCK_RANK)
        if residual is not None:
            result += tl.load(residual + start + row, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + start + row, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _project_gated(
        x, gain, gate, value, gate_bias, value_bias, gate_up, value_up, low, out, size, eps, scale,
        SIZE: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ) -> Any:  # fmt: skip
        """One program per few rows of both weights; otherwise as `_project`."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = row < size
        column = tl.arange(0, BLOCK)
        gate_tile = _tile(gate, row, column, inside, SIZE)
        value_tile = _tile(value, row, column, inside, SIZE)
        value_low = low
        if gate_up is not None:
            value_low = low + RANK
            gate_up = _tile(gate_up, row, tl.arange(0, BLOCK_RANK), inside, RANK)
            value_up = _tile(value_up, row, tl.arange(0, BLOCK_RANK), inside, RANK)
        gates = tl.zeros((ROWS, BLOCK), tl.float32)
        values = tl.zeros((ROWS, BLOCK), tl.float32)
        squares = tl.zeros((1, BLOCK), tl.float32)
        for first in range(0, SIZE, BLOCK):
            gate_ahead = _tile(gate, row, first + BLOCK + column, inside, SIZE)
            value_ahead = _tile(value, row, first + BLOCK + column, inside, SIZE)
            where = first + column[None, :]
            part = tl.load(x + where, mask=where < SIZE, other=0.0).to(tl.float32)
            squares += part * part
            part *= tl.load(gain + where, mask=where < SIZE, other=0.0).to(tl.float32)
            gates += gate_tile.to(tl.float32) * part
            values += value_tile.to(tl.float32) * part
            gate_tile, value_tile = gate_ahead, value_ahead
        inverse = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / SIZE + eps)
        g = tl.sum(gates, 1) * inverse
        g += _added(gate_bias, gate_up, low, row, inside, scale, RANK, BLOCK_RANK)
        v = tl.sum(values, 1) * inverse
        v += _added(value_bias, value_up, value_low, row, inside, scale, RANK, BLOCK_RANK)
        tl.store(out + row, (g / (1 + tl.exp(-g)) * v).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _turned(x, at, gain, eps, cos, sin, FEATURES: tl.constexpr) -> Any:
        """A head's features after its norm, if it has one, and turned by the place (arXiv 2104.09864), in float32."""
        feature = tl.arange(0, FEATURES)
        half: tl.constexpr = FEATURES // 2
        other = (feature + half) % FEATURES
        own = tl.load(x + at + feature).to(tl.float32)
        pair = tl.load(x + at + other).to(tl.float32)
        if gain is not None:
            inverse = tl.rsqrt(tl.sum(own * own, 0) / FEATURES + eps)
            own *= inverse * tl.load(gain + feature).to(tl.float32)
            pair *= inverse * tl.load(gain + other).to(tl.float32)
        pair = tl.where(feature < half, -pair, pair)
        return own * tl.load(cos + feature).to(tl.float32) + pair * tl.load(sin + feature).to(tl.float32)

    @triton.jit
    def _attend_new(
        qkv, cos, sin, query_gain, key_gain, keys, values, place, parts, peaks, sums, scale, eps, capacity, num_pieces,
        KEY_HEADS: tl.constexpr, GROUPS: tl.constexpr, FEATURES: tl.constexpr, KEYS: tl.constexpr,
    ) -> Any:  # fmt: skip
        """One program per key head and piece; that of the last piece brings the new key and value into the cache."""
        head = tl.program_id(0)
        piece = tl.program_id(1)
        last = tl.load(place)
        feature = tl.arange(0, FEATURES)
        key = piece * KEYS + tl.arange(0, KEYS)
        before = (key < last)[:, None]
        new = (key == last)[:, None]
        where = (head.to(tl.int64) * capacity + key[:, None]) * FEATURES + feature[None, :]
        # Earlier tokens wrote these, so nothing has to be waited for.
        k = tl.load(keys + where, mask=before, other=0.0)
        v = tl.load(values + where, mask=before, other=0.0)
        if piece * KEYS <= last:
            key_at = (GROUPS * KEY_HEADS + head) * FEATURES
            own_key = _turned(qkv, key_at, key_gain, eps, cos, sin, FEATURES).to(keys.dtype.element_ty)
            own_value = tl.load(qkv + key_at + KEY_HEADS * FEATURES + feature).to(values.dtype.element_ty)
            k = tl.where(new, own_key[None, :], k)
            v = tl.where(new, own_value[None, :], v)
            tl.store(keys + where, k, mask=new)
            tl.store(values + where, v, mask=new)
            there = key <= last
            for group in tl.static_range(GROUPS):
                row = head * GROUPS + group
                q = _turned(qkv, row * FEATURES, query_gain, eps, cos, sin, FEATURES) * scale
                scores = tl.where(there, tl.sum(k.to(tl.float32) * q[None, :], 1), -1e30)
                peak = tl.max(scores, 0)
                weights = tl.where(there, tl.exp(scores - peak), 0.0)
                slot = row * num_pieces + piece
                tl.store(peaks + slot, peak)
                tl.store(sums + slot, tl.sum(weights, 0))
                tl.store(parts + slot * FEATURES + feature, tl.sum(weights[:, None] * v.to(tl.float32), 0))
