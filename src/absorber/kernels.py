"""Triton kernels for what plain PyTorch does slowly on a GPU; each has a plain twin that it must equal.

    weighted_losses   twin: synchronization.weighted_losses     reads the logits twice and writes their slope once
    outer_products    twin: adapter's p.mT @ q in float32       LoRA gradients of many streams at once

Without Triton or without CUDA `usable` says no, and the twins run.

Shapes: N positions, V vocabulary; B streams, T tokens, P and Q features.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can run on these tensors."""
    return triton is not None and all(tensor.is_cuda for tensor in tensors)


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


if triton is not None:

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
