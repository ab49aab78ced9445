"""Triton kernels for what plain PyTorch does slowly on a GPU; each has a plain twin that it must equal.

    weighted_losses   twin: synchronization.weighted_losses     reads the logits twice and writes their slope once
    outer_products    twin: low_rank's p.mT @ q in float32      LoRA gradients of many streams at once
    attend_one        twin: one_token.attend_one                one query per row over as much of a cache as is filled
    rotate_one        twin: the model's apply_rotary_pos_emb    rotary positions of one token
    merge_rounded     twin: merging's addmm and rounding        W + s B A, rounded at random, in one pass over W

Without Triton or without CUDA `usable` says no, and the twins run.

Shapes: N positions, V vocabulary; B streams, T tokens, P and Q features; H heads of queries, K of keys, C places in
the cache, E features of a head; I inputs and O outputs of a projection, R rank.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


_KEYS = 64
"""Keys that one program of `attend_one` reads."""

_MERGE_TILE = (64, 128, 4)
"""Rows and columns of W that one program of `merge_rounded` writes, and its warps."""


def usable_on(kind: str) -> bool:
    """Whether the kernels can run on this kind of device."""
    return triton is not None and kind == "cuda"


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can run on these tensors: of several GPUs they do on the current one."""
    return triton is not None and all(
        tensor.is_cuda and tensor.device.index == torch.cuda.current_device() for tensor in tensors
    )


def weighted_losses(
    student_NV: Tensor, teacher_NV: Tensor | None, next_ids_N: Tensor, kl_weight_N: Tensor, nll_weight_N: Tensor
) -> Tensor:
    """Compute a KL + b (-log q(next)) per position, and put its slope in the place of the student's logits.

    Args:
        student_NV: Logits of q, contiguous; overwritten with the derivative of the loss by them.
        teacher_NV: Logits of p; None for no KL.
        next_ids_N: The tokens that the next-token loss scores.
        kl_weight_N: a, float32.
        nll_weight_N: b, float32.

    Returns:
        [N], float32, in nats.
    """
    num_positions, vocabulary = student_NV.shape
    loss_N = torch.empty(num_positions, device=student_NV.device)
    _weighted_losses[(num_positions,)](
        student_NV,
        student_NV if teacher_NV is None else teacher_NV.contiguous(),
        # Not contiguous where a piece of a text is one token long: such a slice is a view after `reshape`.
        next_ids_N.contiguous(),
        kl_weight_N.contiguous(),
        nll_weight_N.contiguous(),
        loss_N,
        vocabulary,
        HAS_TEACHER=teacher_NV is not None,
        BLOCK=2048,
        num_warps=8,
    )
    return loss_N


def outer_products(p_BTP: Tensor, q_BTQ: Tensor) -> Tensor:
    """Compute the sum over t of p_t q_t^T, stream by stream: p.mT @ q.

    cuBLAS takes ten to forty times as long for the long thin factors of a batch of LoRAs (notes/log.md).

    Args:
        p_BTP: Any strides but of the last axis, which is contiguous or copied.
        q_BTQ: As p.

    Returns:
        [B, P, Q], float32, accumulated in float32.
    """
    p_BTP, q_BTQ = (x if x.stride(-1) == 1 else x.contiguous() for x in (p_BTP, q_BTQ))
    num_streams, num_tokens, rows = p_BTP.shape
    columns = q_BTQ.shape[2]
    out_BPQ = torch.empty(num_streams, rows, columns, device=p_BTP.device)
    row_block, column_block = (64, 128) if rows <= columns else (128, 64)
    _outer_products[(num_streams, triton.cdiv(rows, row_block), triton.cdiv(columns, column_block))](
        p_BTP,
        q_BTQ,
        out_BPQ,
        num_tokens,
        rows,
        columns,
        p_BTP.stride(0),
        p_BTP.stride(1),
        q_BTQ.stride(0),
        q_BTQ.stride(1),
        ROWS=row_block,
        COLUMNS=column_block,
        TOKENS=64,
        num_warps=4,
        num_stages=4,
    )
    return out_BPQ


def attend_one(query_BHE: Tensor, keys_BKCE: Tensor, values_BKCE: Tensor, place_1: Tensor, scale: float) -> Tensor:
    """Attend with one query per row to the places 0 .. p of a cache of fixed size, of which the rest is not read.

    The keys are cut into pieces that are read side by side (Flash-Decoding, Dao et al., 2023): with one row there are
    fewer heads than the device has processors.

    Args:
        query_BHE: E is a power of two.
        keys_BKCE: Contiguous; query head h reads key head h * K // H.
        values_BKCE: The same.
        place_1: p, on the device, so that a recorded graph serves every place.
        scale: Of the scores.

    Returns:
        [B, H, E], in the type of the query.
    """
    rows, heads, features = query_BHE.shape
    _, key_heads, capacity, _ = keys_BKCE.shape
    num_pieces = triton.cdiv(capacity, _KEYS)
    out_BHE = torch.empty(rows, heads, features, device=query_BHE.device, dtype=query_BHE.dtype)
    parts = torch.empty(rows * heads, num_pieces, features, device=query_BHE.device)
    peaks, sums = (torch.empty(rows * heads, num_pieces, device=query_BHE.device) for _ in range(2))
    _attend_piece[(rows * key_heads, num_pieces)](
        query_BHE.contiguous(), keys_BKCE, values_BKCE, place_1, parts, peaks, sums, scale, capacity, num_pieces,
        GROUPS=heads // key_heads, FEATURES=features, KEYS=_KEYS, num_warps=4,
    )  # fmt: skip
    attend_join[(rows * heads,)](
        parts, peaks, sums, place_1, out_BHE, num_pieces,
        FEATURES=features, KEYS=_KEYS, PIECES=32, num_warps=4,
    )  # fmt: skip
    return out_BHE


def rotate_one(query_BH1E: Tensor, key_BK1E: Tensor, cos_11E: Tensor, sin_11E: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the queries and keys of one token by its place (arXiv 2104.09864), as the Llama family pairs features.

    Args:
        query_BH1E: E is even.
        key_BK1E: The same with fewer heads.
        cos_11E: Of the angles; all rows stand at the same place.
        sin_11E: The same.

    Returns:
        Both, contiguous.
    """
    rows, heads, _, features = query_BH1E.shape
    key_heads = key_BK1E.shape[1]
    query, key = torch.empty_like(query_BH1E).contiguous(), torch.empty_like(key_BK1E).contiguous()
    _rotate_one[(rows, heads + key_heads)](
        query_BH1E.contiguous(), key_BK1E.contiguous(), cos_11E.contiguous(), sin_11E.contiguous(), query, key,
        heads, key_heads, HALF=features // 2, BLOCK=triton.next_power_of_2(features // 2), num_warps=1,
    )  # fmt: skip
    return query, key


def merge_rounded(
    weight_OI: Tensor, up_OR: Tensor, down_RI: Tensor, scale: float, merged_OI: Tensor, *, seed: int
) -> None:
    """Write W + s B A into bfloat16, rounded up as often as it is near the upper number: right in the mean.

    Args:
        weight_OI: W, bfloat16, contiguous.
        up_OR: B, float32, contiguous.
        down_RI: A, float32, contiguous.
        scale: s.
        merged_OI: Overwritten; bfloat16, contiguous.
        seed: Of the noise; the same seed and shape give the same noise.
    """
    outputs, inputs = weight_OI.shape
    rows, columns, warps = _MERGE_TILE
    _merge_rounded[(triton.cdiv(outputs, rows), triton.cdiv(inputs, columns))](
        weight_OI, up_OR, down_RI, merged_OI, scale, (seed + 1) * 0x9E3779B9 % 2**31, outputs, inputs, up_OR.shape[1],
        OUTPUTS=rows, INPUTS=columns, RANK=32, num_warps=warps,
        # Triton's interpreter, in which tests run without a GPU, cannot multiply bfloat16.
        FACTOR=tl.bfloat16 if weight_OI.is_cuda else tl.float32,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _merge_rounded(
        weight, up, down, merged, scale, seed, outputs, inputs, rank,
        OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, RANK: tl.constexpr, FACTOR: tl.constexpr,
    ) -> Any:  # fmt: skip
        """One program per tile of W, whose places are counted from its first one."""
        row = tl.arange(0, OUTPUTS)[:, None]
        column = tl.arange(0, INPUTS)[None, :]
        first_row = tl.program_id(0) * OUTPUTS
        first_column = tl.program_id(1) * INPUTS
        there = (first_row + row < outputs) & (first_column + column < inputs)
        local = row * inputs + column
        first = first_row.to(tl.int64) * inputs + first_column
        exact = tl.load(weight + first + local, mask=there, other=0.0).to(tl.float32)
        change = tl.zeros((OUTPUTS, INPUTS), tl.float32)
        for start in range(0, rank, RANK):
            across = start + tl.arange(0, RANK)[None, :]
            along = start + tl.arange(0, RANK)[:, None]
            at_b, at_a = (first_row + row) * rank + across, along * inputs + first_column + column
            b = tl.load(up + at_b, mask=(first_row + row < outputs) & (across < rank), other=0.0)
            a = tl.load(down + at_a, mask=(along < rank) & (first_column + column < inputs), other=0.0)
            # A float32 is two numbers of bfloat16 but for its last bits, and their products are exact in float32.
            b_high, a_high = b.to(FACTOR), a.to(FACTOR)
            b_low, a_low = (b - b_high.to(tl.float32)).to(FACTOR), (a - a_high.to(tl.float32)).to(FACTOR)
            change = tl.dot(b_high, a_low, change)
            change = tl.dot(b_low, a_high, change)
            change = tl.dot(b_high, a_high, change)
        exact += scale * change
        # The place, mixed until each bit depends on all (the last steps of MurmurHash3, Appleby, 2011).
        noise = (first.to(tl.int32) + local + seed).to(tl.uint32)
        noise = (noise ^ (noise >> 16)) * 0x85EBCA6B
        noise = (noise ^ (noise >> 13)) * 0xC2B2AE35
        noise = noise ^ (noise >> 16)
        # The upper half of a float32 is a bfloat16; what is added to the lower half carries as often as it should.
        bits = exact.to(tl.uint32, bitcast=True) + (noise >> 16)
        rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        tl.store(merged + first + local, rounded.to(tl.bfloat16), mask=there)

    @triton.jit
    def _rotate_one(
        query, key, cos, sin, query_out, key_out, heads, key_heads, HALF: tl.constexpr, BLOCK: tl.constexpr
    ) -> Any:
        """One program per row and head, of queries first; what is not of its kind is masked."""
        row = tl.program_id(0)
        head = tl.program_id(1)
        low = tl.arange(0, BLOCK)
        high = low + HALF
        there = low < HALF
        of_query = there & (head + 0 * low < heads)
        of_key = there & (head + 0 * low >= heads)
        query_at = (row * heads + head) * 2 * HALF
        key_at = (row * key_heads + head - heads) * 2 * HALF
        x = tl.load(query + query_at + low, mask=of_query, other=0.0).to(tl.float32)
        y = tl.load(query + query_at + high, mask=of_query, other=0.0).to(tl.float32)
        x += tl.load(key + key_at + low, mask=of_key, other=0.0).to(tl.float32)
        y += tl.load(key + key_at + high, mask=of_key, other=0.0).to(tl.float32)
        cos_low = tl.load(cos + low, mask=there, other=0.0).to(tl.float32)
        cos_high = tl.load(cos + high, mask=there, other=0.0).to(tl.float32)
        sin_low = tl.load(sin + low, mask=there, other=0.0).to(tl.float32)
        sin_high = tl.load(sin + high, mask=there, other=0.0).to(tl.float32)
        left = (x * cos_low - y * sin_low).to(query_out.dtype.element_ty)
        right = (y * cos_high + x * sin_high).to(query_out.dtype.element_ty)
        tl.store(query_out + query_at + low, left, mask=of_query)
        tl.store(query_out + query_at + high, right, mask=of_query)
        tl.store(key_out + key_at + low, left, mask=of_key)
        tl.store(key_out + key_at + high, right, mask=of_key)

    @triton.jit
    def _attend_piece(
        query, keys, values, place, parts, peaks, sums, scale, capacity, num_pieces,
        GROUPS: tl.constexpr, FEATURES: tl.constexpr, KEYS: tl.constexpr,
    ) -> Any:  # fmt: skip
        """One program per key head and piece: an attention of its own, with its peak and the sum below it."""
        head = tl.program_id(0).to(tl.int64)
        piece = tl.program_id(1)
        last = tl.load(place)
        feature = tl.arange(0, FEATURES)
        key = piece * KEYS + tl.arange(0, KEYS)
        there = (key <= last) & (key < capacity)
        if piece * KEYS <= last:
            where = head * capacity * FEATURES + key[:, None].to(tl.int64) * FEATURES + feature[None, :]
            k = tl.load(keys + where, mask=there[:, None], other=0.0).to(tl.float32)
            v = tl.load(values + where, mask=there[:, None], other=0.0).to(tl.float32)
            for group in tl.static_range(GROUPS):
                row = head * GROUPS + group
                q = tl.load(query + row * FEATURES + feature).to(tl.float32) * scale
                scores = tl.where(there, tl.sum(k * q[None, :], 1), -1e30)
                peak = tl.max(scores, 0)
                weights = tl.where(there, tl.exp(scores - peak), 0.0)
                slot = row * num_pieces + piece
                tl.store(peaks + slot, peak)
                tl.store(sums + slot, tl.sum(weights, 0))
                tl.store(parts + slot * FEATURES + feature, tl.sum(weights[:, None] * v, 0))

    @triton.jit
    def attend_join(
        parts, peaks, sums, place, out, num_pieces,
        FEATURES: tl.constexpr, KEYS: tl.constexpr, PIECES: tl.constexpr,
    ) -> Any:  # fmt: skip
        """One program per query head: the pieces weighed by what their peaks and sums say."""
        row = tl.program_id(0).to(tl.int64)
        filled = tl.minimum(tl.load(place).to(tl.int32) // KEYS + 1, num_pieces)  # what lies beyond was never written
        feature = tl.arange(0, FEATURES)
        peak = -1e30
        total = 0.0
        sum_E = tl.zeros((FEATURES,), tl.float32)
        for start in range(0, filled, PIECES):
            piece = start + tl.arange(0, PIECES)
            there = piece < filled
            slot = row * num_pieces + piece
            own = tl.load(peaks + slot, mask=there, other=-1e30)
            higher = tl.maximum(peak, tl.max(own, 0))
            weights = tl.where(there, tl.exp(own - higher), 0.0)
            part = tl.load(parts + slot[:, None] * FEATURES + feature[None, :], mask=there[:, None], other=0.0)
            before = tl.exp(peak - higher)
            sum_E = sum_E * before + tl.sum(weights[:, None] * part, 0)
            total = total * before + tl.sum(weights * tl.load(sums + slot, mask=there, other=0.0), 0)
            peak = higher
        tl.store(out + row * FEATURES + feature, (sum_E / total).to(out.dtype.element_ty))

    @triton.jit
    def _weighted_losses(
        student, teacher, next_ids, kl_weights, nll_weights, losses, vocabulary,
        HAS_TEACHER: tl.constexpr, BLOCK: tl.constexpr,
    ) -> Any:  # fmt: skip
        """One program per position: log-sum-exps in a first pass over the vocabulary, loss and slope in a second."""
        row = tl.program_id(0).to(tl.int64)
        student += row * vocabulary
        teacher += row * vocabulary
        places = tl.arange(0, BLOCK)
        # Each lane keeps a running maximum and a sum relative to it.
        high_s = tl.full((BLOCK,), -1e30, tl.float32)
        sum_s = tl.zeros((BLOCK,), tl.float32)
        high_t = tl.full((BLOCK,), -1e30, tl.float32)
        sum_t = tl.zeros((BLOCK,), tl.float32)
        next_id = tl.load(next_ids + row)
        # Gathered on the way: a load of its own could come after another warp's store of the slope.
        picked = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            inside = start + places < vocabulary
            s = tl.load(student + start + places, mask=inside, other=-1e30).to(tl.float32)
            higher = tl.maximum(high_s, s)
            sum_s = sum_s * tl.exp(high_s - higher) + tl.exp(s - higher)
            high_s = higher
            picked += tl.where(start + places == next_id, s, 0.0)
            if HAS_TEACHER:
                t = tl.load(teacher + start + places, mask=inside, other=-1e30).to(tl.float32)
                higher = tl.maximum(high_t, t)
                sum_t = sum_t * tl.exp(high_t - higher) + tl.exp(t - higher)
                high_t = higher
        top = tl.max(high_s, 0)
        log_sum_s = top + tl.log(tl.sum(sum_s * tl.exp(high_s - top), 0))
        log_sum_t = 0.0
        if HAS_TEACHER:
            top = tl.max(high_t, 0)
            log_sum_t = top + tl.log(tl.sum(sum_t * tl.exp(high_t - top), 0))

        kl_weight = tl.load(kl_weights + row)
        nll_weight = tl.load(nll_weights + row)
        loss = nll_weight * (log_sum_s - tl.sum(picked, 0))
        kl = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            inside = start + places < vocabulary
            s = tl.load(student + start + places, mask=inside, other=-1e30).to(tl.float32)
            log_q = s - log_sum_s
            q = tl.exp(log_q)
            slope = nll_weight * (q - tl.where(start + places == next_id, 1.0, 0.0))
            if HAS_TEACHER:
                t = tl.load(teacher + start + places, mask=inside, other=-1e30).to(tl.float32)
                log_p = t - log_sum_t
                p = tl.exp(log_p)
                kl += tl.where(inside, p * (log_p - log_q), 0.0)
                slope += kl_weight * (q - p)
            tl.store(student + start + places, slope.to(student.dtype.element_ty), mask=inside)
        tl.store(losses + row, loss + kl_weight * tl.sum(kl, 0))

    @triton.jit
    def _outer_products(
        p, q, out, num_tokens, rows, columns, p_stream, p_token, q_stream, q_token,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
    ) -> Any:  # fmt: skip
        """One program per stream and tile of the result; it walks along the tokens."""
        stream = tl.program_id(0).to(tl.int64)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        token = tl.arange(0, TOKENS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        p += stream * p_stream + token[:, None] * p_token + row[None, :]
        q += stream * q_stream + token[:, None] * q_token + column[None, :]
        for start in range(0, num_tokens, TOKENS):
            there = start + token[:, None] < num_tokens
            left = tl.load(p, mask=there & (row[None, :] < rows), other=0.0)
            right = tl.load(q, mask=there & (column[None, :] < columns), other=0.0)
            total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
            p += TOKENS * p_token
            q += TOKENS * q_token
        place = stream * rows * columns + row[:, None] * columns + column[None, :]
        tl.store(out + place, total, mask=(row[:, None] < rows) & (column[None, :] < columns))
