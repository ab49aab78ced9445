"""Whether a question is about what a memory holds, so that all other questions keep the base model's answers.

Not in the paper. The question is read twice, with the memory and without; two rules say when the memory speaks:

entropy      the first token of the answer is less uncertain with the memory
likelihood   the question itself is likelier with the memory

Shapes: B questions, T tokens, D hidden.
"""

import contextlib
import typing
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from absorber.adapter import Adapter
from absorber.backbone import Backbone, check_positions, forward_states, untouched
from absorber.errors import ConfigError
from absorber.synchronization import next_token_loss

Rule = Literal["off", "entropy", "likelihood"]


class Signals(NamedTuple):
    """What one reading of a question says."""

    nll_B: Tensor
    """Mean loss of the question's tokens, in nats."""
    entropy_B: Tensor
    """Entropy of the token after the question, in nats."""


@torch.no_grad()
def signals(backbone: Backbone, final_BTD: Tensor, question_BT: Tensor) -> Signals:
    """Measure one reading, with or without a memory.

    Args:
        backbone: The model.
        final_BTD: Final states from which each token of the question is predicted, and the one after it: T + 1.
        question_BT: The question.

    Returns:
        One loss and one entropy per question, float32.
    """
    question_BT = question_BT.to(final_BTD.device)
    shifted_BT = torch.cat([question_BT[:, :1], question_BT], dim=1)  # state t predicts token t, not t + 1
    log_q_BV = backbone.logits(final_BTD[:, -1]).float().log_softmax(dim=-1)
    return Signals(next_token_loss(final_BTD, shifted_BT, backbone.logits), -(log_q_BV.exp() * log_q_BV).sum(dim=-1))


def opens(with_memory: Signals, without: Signals, rule: Rule) -> Tensor:
    """For which questions the memory speaks, [B], bool.

    Args:
        with_memory: A reading of the questions with the memory attached.
        without: The same of the base model.
        rule: off: for all.
    """
    if rule == "entropy":
        return with_memory.entropy_B < without.entropy_B
    if rule == "likelihood":
        return with_memory.nll_B < without.nll_B
    return torch.ones_like(without.nll_B, dtype=torch.bool)


@torch.no_grad()
def helps(
    backbone: Backbone, adapter: Adapter, prefix_ids: Sequence[int], question_ids: Sequence[int], rule: Rule
) -> bool:
    """Whether one question is to be answered with the memory.

    Args:
        backbone: The model, with no adapter attached.
        adapter: The memory.
        prefix_ids: What stands before the question, at least one token.
        question_ids: The question.
        rule: off: always; nothing is read then.

    Raises:
        ConfigError: If there is no such rule, or the text is longer than the model's positions.
    """
    if rule not in typing.get_args(Rule):
        raise ConfigError(f"gate must be one of {', '.join(typing.get_args(Rule))}; got {rule!r}")
    if rule == "off":
        return True
    ids_BT = torch.tensor([[*prefix_ids, *question_ids]], device=backbone.device)
    check_positions(backbone, ids_BT.shape[1])

    def read() -> Signals:
        final_BTD = forward_states(backbone, ids_BT, first=len(prefix_ids) - 1).final_BTD
        return signals(backbone, final_BTD, ids_BT[:, len(prefix_ids) :])

    readings = []
    for memory in (adapter.attached(backbone), contextlib.nullcontext()):
        with untouched(backbone.model), memory:
            readings.append(read())
    return bool(opens(readings[0], readings[1], rule))
