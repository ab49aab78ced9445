"""The losses that make the student behave as the teacher; pure functions of tensors.

Every function returns one number per stream, so that each stream of a batch learns as if it were alone.

Shapes: B streams, T scored tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from absorber.errors import ContextError

Logits = Callable[[Tensor], Tensor]

# Largest number of logits built at once; a longer text is cut into pieces.
_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True, slots=True)
class Target:
    """What the student is synchronized with, at the scored positions; no gradient."""

    layers: tuple[Tensor, ...]
    """Hidden states, each [B, T, D], in the order of `AbsorbConfig.hidden_layers`."""
    finals: tuple[tuple[float, Tensor], ...]
    """Final hidden states [B, T, D] whose log-probabilities are averaged with these weights: one entry for a plain
    teacher, two for a mixture."""


def hidden_distance(
    student_BTD: Sequence[Tensor], teacher_BTD: Sequence[Tensor], *, norm: str = "l1", normalized: bool = True
) -> Tensor:
    """Distance of hidden states over positions, features and layers. Equation (6), arXiv 2604.20915.

        l1: mean over l of  mean |s_l - t_l|   / mean |t_l|
        l2: mean over l of  mean (s_l - t_l)^2 / mean t_l^2

    Args:
        student_BTD: One tensor per layer; carries gradient.
        teacher_BTD: The same layers of the teacher.
        norm: "l1" or "l2".
        normalized: Divide by the teacher's mean, layer by layer and stream by stream; False is the plain mean.

    Returns:
        [B], float32; dimensionless if normalized, else in activation units (squared for l2).

    Raises:
        ContextError: If there is no layer or no position.

    Differs from the paper: its norm over L + 1 layers and D features is a sum or a mean, which is not said; here
    it is a mean, so that a threshold means the same on any model.
    """
    if not student_BTD or student_BTD[0].shape[1] == 0:
        raise ContextError("there are no hidden states to compare; give at least one layer and one token")
    power = 1 if norm == "l1" else 2
    total_B = torch.zeros(student_BTD[0].shape[0], device=student_BTD[0].device)
    for student, teacher in zip(student_BTD, teacher_BTD, strict=True):
        difference_B = (student.float() - teacher.float()).abs().pow(power).mean(dim=(1, 2))
        if normalized:
            difference_B = difference_B / teacher.float().abs().pow(power).mean(dim=(1, 2)).clamp_min(1e-12)
        total_B = total_B + difference_B
    return total_B / len(student_BTD)


def distribution_losses(
    student_BTD: Tensor,
    target: Target,
    token_ids_BT: Tensor,
    logits: Logits,
    *,
    with_kl: bool,
    with_next_token: bool,
    num_generated: int = 0,
) -> tuple[Tensor, Tensor]:
    """Mean KL(teacher || student) and mean next-token loss of the student, from one projection to the vocabulary.

        kl         = mean over t of  sum over v of p_t(v) (log p_t(v) - log q_t(v))
        next_token = mean over t < T - G of  -log q_t(y_(t+1))

    The last G tokens are generated; log p is the (weighted average of the) teacher's log-probabilities, normalized,
    and q is the student. The KL is the paper's token-distribution objective (table 5, arXiv 2604.20915); the
    next-token term is Temp-LoRA's (arXiv 2401.11504) on the subsequent text.

    Args:
        student_BTD: Final hidden states of the student; carries gradient.
        target: The teacher.
        token_ids_BT: The scored text itself; position t predicts token t + 1.
        logits: Projects final hidden states to logits.
        with_kl: Whether to compute the first; else it is zero.
        with_next_token: Whether to compute the second; else it is zero.
        num_generated: G; the next-token loss does not score them.

    Returns:
        Two tensors [B], float32, in nats.

    Cost: logits are built once, for a piece of the text at a time.
    """
    num_streams, num_tokens, _ = student_BTD.shape
    if not with_kl and not with_next_token:
        return student_BTD.new_zeros(num_streams, dtype=torch.float32), student_BTD.new_zeros(
            num_streams, dtype=torch.float32
        )
    next_ids_BT = torch.roll(token_ids_BT, -1, dims=1)  # the last position predicts nothing and is masked below
    num_scored = max(0, num_tokens - 1 - num_generated)
    scored_T = torch.arange(num_tokens, device=student_BTD.device) < num_scored
    work = _Work(logits, target, next_ids_BT, scored_T, with_kl, with_next_token)
    kl_B, nll_B = _DistributionLosses.apply(student_BTD, work)  # type: ignore[no-untyped-call]
    return kl_B / num_tokens, nll_B / max(1, num_scored)


@dataclass(frozen=True, slots=True)
class _Work:
    """What `distribution_losses` needs beside the student."""

    logits: Logits
    target: Target
    next_ids_BT: Tensor
    scored_T: Tensor
    with_kl: bool
    with_next_token: bool


class _DistributionLosses(torch.autograd.Function):
    """Sums over positions of both losses, a piece of the text at a time.

    The gradients with respect to the hidden states are taken along with the values, while a piece's logits exist:
    they are [B, T, D], small beside the [B, T, V] that would have to be kept or computed again.
    """

    @staticmethod
    def forward(ctx: Any, student_BTD: Tensor, work: _Work) -> tuple[Tensor, Tensor]:
        num_streams, num_tokens, _ = student_BTD.shape
        totals = [torch.zeros(num_streams, device=student_BTD.device) for _ in range(2)]
        gradients: list[list[Tensor]] = [[], []]
        vocabulary = work.logits(student_BTD[:1, :1]).shape[-1]
        piece_tokens = max(1, _LOGITS_AT_ONCE // (vocabulary * num_streams))
        for start in range(0, num_tokens, piece_tokens):
            piece = slice(start, start + piece_tokens)
            hidden = student_BTD[:, piece].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                student_logits = work.logits(hidden)
            for which, (value, slope) in enumerate(_losses_and_slopes(student_logits.detach(), piece, work)):
                totals[which] += value
                if slope is not None and ctx.needs_input_grad[0]:
                    slope = slope.to(student_logits.dtype)
                    gradients[which] += torch.autograd.grad(student_logits, hidden, slope, retain_graph=which == 0)
        ctx.save_for_backward(*(torch.cat(parts, dim=1) if parts else None for parts in gradients))
        return totals[0], totals[1]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None]:
        total = None
        for factor_B, gradient_BTD in zip(upstream, ctx.saved_tensors, strict=True):
            if gradient_BTD is not None:
                part = factor_B.to(gradient_BTD.dtype)[:, None, None] * gradient_BTD
                total = part if total is None else total + part
        return total, None


def _losses_and_slopes(student_logits: Tensor, piece: slice, work: _Work) -> Iterator[tuple[Tensor, Tensor | None]]:
    """KL, then next-token loss, of a piece: the sums [B] and their derivatives by the student's logits."""
    log_q = student_logits.float().log_softmax(dim=-1)
    q = log_q.exp()
    nothing = log_q.new_zeros(log_q.shape[0])
    if work.with_kl:
        log_p = _teacher_log_probabilities(piece, work)
        p = log_p.exp()
        yield log_p.sub_(log_q).mul_(p).sum(dim=(1, 2)), q - p
    else:
        yield nothing, None
    if work.with_next_token:
        ids, scored = work.next_ids_BT[:, piece, None], work.scored_T[piece]
        picked = log_q.gather(-1, ids)[..., 0]
        q.scatter_add_(-1, ids, torch.full_like(picked, -1.0)[..., None])
        yield -(picked * scored).sum(dim=1), q.mul_(scored[:, None])
    else:
        yield nothing, None


def _teacher_log_probabilities(piece: slice, work: _Work) -> Tensor:
    parts = [weight * work.logits(final[:, piece]).float().log_softmax(dim=-1) for weight, final in work.target.finals]
    if len(parts) == 1 and work.target.finals[0][0] == 1.0:
        return parts[0]
    return torch.stack(parts).sum(dim=0).log_softmax(dim=-1)
