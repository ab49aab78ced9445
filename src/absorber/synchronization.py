"""The losses that make the student behave as the teacher; pure functions of tensors.

Every function returns one number per stream, so that each stream of a batch learns as if it were alone.

Shapes: B streams, T scored tokens, D hidden, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from absorber import kernels
from absorber.errors import ContextError

Logits = Callable[[Tensor], Tensor]

# Largest number of logits built at once, by kind of device; a longer text is cut into pieces.
LOGITS_AT_ONCE = defaultdict(lambda: 2**25, cuda=2**27)


@dataclass(frozen=True, slots=True)
class Target:
    """What the student is synchronized with, at the scored positions; no gradient."""

    layers: tuple[Tensor, ...]
    """Hidden states, each [B, T, D], in the order of `AbsorbConfig.hidden_layers`."""
    finals: tuple[tuple[float, Tensor], ...]
    """Final hidden states [B, T, D] whose log-probabilities are averaged with these weights: one entry for a plain
    teacher, two for a mixture."""

    def to(self, device: torch.device | str) -> "Target":
        """Copy to a device, without waiting for it."""
        return self._mapped(lambda states: states.to(device, non_blocking=True))

    def to_host(self) -> "Target":
        """Copy to the CPU; see the function of this name."""
        return self._mapped(to_host)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Target":
        return Target(
            layers=tuple(change(layer) for layer in self.layers),
            finals=tuple((share, change(final)) for share, final in self.finals),
        )

    def rows(self, rows: Tensor) -> "Target":
        """That of some streams."""
        return self._mapped(lambda states: states[rows])

    @classmethod
    def joined(cls, targets: "Sequence[Target]") -> "Target":
        """That of several streams, of what a teacher says of each."""
        return cls(
            layers=tuple(torch.cat(layers) for layers in zip(*(target.layers for target in targets), strict=True)),
            finals=tuple(
                (parts[0][0], torch.cat([final for _, final in parts]))
                for parts in zip(*(target.finals for target in targets), strict=True)
            ),
        )


def to_host(states: Tensor) -> Tensor:
    """Copy to the CPU, from a GPU into pinned memory without waiting for it: who reads it there has to.

    Where the system gives no such memory the copy waits.
    """
    try:
        held = torch.empty(states.shape, dtype=states.dtype, pin_memory=states.is_cuda)
    except RuntimeError:
        return states.to("cpu")
    return held.copy_(states, non_blocking=True)


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


def distribution_loss(
    student_BTD: Tensor,
    target: Target,
    token_ids_BT: Tensor,
    logits: Logits,
    *,
    kl_weight: float,
    next_token_weight: float,
    num_generated: int = 0,
    scored_BT: Tensor | None = None,
) -> Tensor:
    """Weighted sum of KL(teacher || student) and next-token loss, from one projection to the vocabulary.

        kl         = mean over t of  sum over v of p_t(v) (log p_t(v) - log q_t(v))
        next_token = mean over the scored t < T - G of  -log q_t(y_(t+1))

    The last G tokens are generated; log p is the (weighted average of the) teacher's log-probabilities, normalized,
    and q is the student. The KL is the paper's token-distribution objective (table 5, arXiv 2604.20915); the
    next-token term is Temp-LoRA's (arXiv 2401.11504) on the subsequent text.

    Args:
        student_BTD: Final hidden states of the student; carries gradient.
        target: The teacher; not looked at if the KL has no weight.
        token_ids_BT: The scored text itself; position t predicts token t + 1.
        logits: Projects final hidden states to logits.
        kl_weight: Of the first.
        next_token_weight: Of the second.
        num_generated: G; the next-token loss does not score them.
        scored_BT: At which positions the next-token loss looks; None for all. The last one predicts nothing.

    Returns:
        [B], float32, in nats.

    Cost: logits are built once, for a piece of the text at a time.
    """
    num_streams, num_tokens, _ = student_BTD.shape
    if not kl_weight and not next_token_weight:
        return student_BTD.new_zeros(num_streams, dtype=torch.float32)
    known_T = torch.arange(num_tokens, device=student_BTD.device) < num_tokens - 1 - num_generated
    scored_BT = known_T.expand(num_streams, -1) if scored_BT is None else known_T & scored_BT
    work = _Work(
        logits=logits,
        finals=target.finals if kl_weight else (),
        next_ids_BT=torch.roll(token_ids_BT, -1, dims=1),  # the last position predicts nothing and weighs nothing
        kl_weight_BT=torch.full_like(scored_BT, kl_weight / num_tokens, dtype=torch.float32),
        nll_weight_BT=scored_BT * (next_token_weight / scored_BT.sum(dim=1, keepdim=True).clamp_min(1)),
    )
    return _DistributionLoss.apply(student_BTD, work)  # type: ignore[no-untyped-call, no-any-return]


def next_token_loss(
    final_BTD: Tensor, token_ids_BT: Tensor, logits: Logits, *, scored_BT: Tensor | None = None
) -> Tensor:
    """The next-token part of `distribution_loss` alone, [B], float32, in nats."""
    nothing = Target(layers=(), finals=())
    return distribution_loss(
        final_BTD, nothing, token_ids_BT, logits, kl_weight=0.0, next_token_weight=1.0, scored_BT=scored_BT
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """What `distribution_loss` needs beside the student."""

    logits: Logits
    finals: tuple[tuple[float, Tensor], ...]
    next_ids_BT: Tensor
    kl_weight_BT: Tensor
    nll_weight_BT: Tensor


class _DistributionLoss(torch.autograd.Function):
    """The loss, a piece of the text at a time.

    The gradient with respect to the hidden states is taken along with the value, while a piece's logits exist:
    it is [B, T, D], small beside the [B, T, V] that would have to be kept or computed again.
    """

    @staticmethod
    def forward(ctx: Any, student_BTD: Tensor, work: _Work) -> Tensor:
        num_streams, num_tokens, _ = student_BTD.shape
        total_B = torch.zeros(num_streams, device=student_BTD.device)
        gradients: list[Tensor] = []
        vocabulary = work.logits(student_BTD[:1, :1]).shape[-1]
        piece_tokens = max(1, LOGITS_AT_ONCE[student_BTD.device.type] // (vocabulary * num_streams))
        for start in range(0, num_tokens, piece_tokens):
            piece = slice(start, start + piece_tokens)
            hidden = student_BTD[:, piece].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                student_logits = work.logits(hidden)
            loss_BT, slope = _losses_and_slope(student_logits.detach(), piece, work)
            total_B += loss_BT.sum(dim=1)
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(student_logits, hidden, slope)
        ctx.save_for_backward(torch.cat(gradients, dim=1) if gradients else None)
        return total_B

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient_BTD,) = ctx.saved_tensors
        return upstream[0].to(gradient_BTD.dtype)[:, None, None] * gradient_BTD, None


def _losses_and_slope(student_logits: Tensor, piece: slice, work: _Work) -> tuple[Tensor, Tensor]:
    """The loss of each position of a piece, and its derivative by the student's logits, which may be overwritten."""
    shape = student_logits.shape[:2]
    student_NV = student_logits.flatten(0, 1).contiguous()
    next_ids_N = work.next_ids_BT[:, piece].reshape(-1)
    weights = [weight_BT[:, piece].reshape(-1) for weight_BT in (work.kl_weight_BT, work.nll_weight_BT)]
    teachers = [(share, work.logits(final[:, piece]).flatten(0, 1)) for share, final in work.finals]
    if kernels.usable(student_NV) and (not teachers or (len(teachers) == 1 and teachers[0][0] == 1.0)):
        teacher_NV = teachers[0][1] if teachers else None
        loss_N = kernels.weighted_losses(student_NV, teacher_NV, next_ids_N, *weights)
        slope_NV = student_NV
    else:
        loss_N, slope_NV = weighted_losses(student_NV, teachers, next_ids_N, *weights)
    return loss_N.view(shape), slope_NV.view_as(student_logits)


def weighted_losses(
    student_NV: Tensor,
    teachers: Sequence[tuple[float, Tensor]],
    next_ids_N: Tensor,
    kl_weight_N: Tensor,
    nll_weight_N: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute a KL + b (-log q(next)) per position, and its slope; the plain twin of `kernels.weighted_losses`.

    Args:
        student_NV: Logits of q.
        teachers: Shares and logits whose averaged log-probabilities are those of p; none for no KL.
        next_ids_N: The tokens that the next-token loss scores.
        kl_weight_N: a, float32.
        nll_weight_N: b, float32.

    Returns:
        The losses [N], float32, in nats, and their derivatives by the student's logits, in their type.
    """
    log_q = student_NV.float().log_softmax(dim=-1)
    q = log_q.exp()
    picked_N = log_q.gather(-1, next_ids_N[:, None])[:, 0]
    loss_N = -nll_weight_N * picked_N
    slope = q * nll_weight_N[:, None]
    slope.scatter_add_(-1, next_ids_N[:, None], -nll_weight_N[:, None])
    if teachers:
        log_p = _teacher_log_probabilities(teachers)
        p = log_p.exp()
        loss_N += kl_weight_N * log_p.sub_(log_q).mul_(p).sum(dim=-1)
        slope += q.sub_(p).mul_(kl_weight_N[:, None])
    return loss_N, slope.to(student_NV.dtype)


def _teacher_log_probabilities(teachers: Sequence[tuple[float, Tensor]]) -> Tensor:
    parts = [share * logits.float().log_softmax(dim=-1) for share, logits in teachers]
    if len(parts) == 1 and teachers[0][0] == 1.0:
        return parts[0]
    return torch.stack(parts).sum(dim=0).log_softmax(dim=-1)
