"""The losses that make the student behave as the teacher; pure functions of tensors.

Every function returns one number per stream, so that each stream of a batch learns as if it were alone.

Shapes: B streams, T scored tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from absorber.errors import ContextError

Logits = Callable[[Tensor], Tensor]

# Largest number of logits built at once; more are cut into pieces of the text and recomputed for the gradient.
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

    Cost: logits are built for a piece of the text at a time, and again for the gradient if there are several.
    """
    num_streams, num_tokens, _ = student_BTD.shape
    kl_B = torch.zeros(num_streams, device=student_BTD.device)
    nll_B = torch.zeros(num_streams, device=student_BTD.device)
    if not with_kl and not with_next_token:
        return kl_B, nll_B
    next_ids_BT = torch.roll(token_ids_BT, -1, dims=1)  # the last position predicts nothing and is masked below
    num_scored = max(0, num_tokens - 1 - num_generated)
    scored_T = torch.arange(num_tokens, device=student_BTD.device) < num_scored

    def piece_losses(student: Tensor, next_ids: Tensor, scored: Tensor, *finals: Tensor) -> tuple[Tensor, Tensor]:
        log_q = logits(student).float().log_softmax(dim=-1)
        kl = nll = torch.zeros(num_streams, device=student.device)
        if with_kl:
            with torch.no_grad():
                mixed = sum(
                    weight * logits(final).float().log_softmax(dim=-1)
                    for (weight, _), final in zip(target.finals, finals, strict=True)
                )
                log_p = torch.as_tensor(mixed).log_softmax(dim=-1)
            kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=(1, 2))
        if with_next_token:
            nll = -(log_q.gather(-1, next_ids[..., None])[..., 0] * scored).sum(dim=1)
        return kl, nll

    with torch.no_grad():
        vocabulary = logits(student_BTD[:1, :1]).shape[-1]
    piece_tokens = max(1, _LOGITS_AT_ONCE // (vocabulary * num_streams))
    for start in range(0, num_tokens, piece_tokens):
        piece = slice(start, start + piece_tokens)
        arguments = (
            student_BTD[:, piece],
            next_ids_BT[:, piece],
            scored_T[piece],
            *(final[:, piece] for _, final in target.finals),
        )
        if piece_tokens < num_tokens and torch.is_grad_enabled():
            kl, nll = checkpoint(piece_losses, *arguments, use_reentrant=False)
        else:
            kl, nll = piece_losses(*arguments)
        kl_B, nll_B = kl_B + kl, nll_B + nll
    return kl_B / num_tokens, nll_B / max(1, num_scored)
