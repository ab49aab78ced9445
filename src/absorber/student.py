"""The student: what it loses on a text against its teacher, and the gradients of that.

Shapes: B streams, N context tokens (X), M subsequent tokens (Y).
"""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from absorber.adapter import Adapter, Snapshot, mean_update
from absorber.backbone import Backbone, checkpointed, forward_states, with_sink
from absorber.config import AbsorbConfig
from absorber.errors import ContextError
from absorber.graphs import graphs_of, without_masks
from absorber.lessons import Lesson
from absorber.optimizer import clip
from absorber.synchronization import Target, distribution_loss, hidden_distance
from absorber.teacher import hidden_layers


def synchronization_loss(
    backbone: Backbone,
    adapter: Adapter,
    before: Snapshot,
    lesson: Lesson,
    config: AbsorbConfig,
    *,
    sink_id: int | None,
    segments: int = 1,
) -> Tensor:
    """Run the student over Y alone and measure its distance to the teacher. Equation (6), arXiv 2604.20915.

    Args:
        backbone: The model, with `adapter` attached.
        adapter: The memory that is trained.
        before: Its weights at the beginning of the round, for the update penalty.
        lesson: X, Y and what the teacher says of Y.
        config: Losses and their weights.
        sink_id: First token of the student, or None.
        segments: Into how many pieces, read one by one, Y is cut.

    Returns:
        [B], float32: the weighted sum of hidden-state distance, KL, next-token loss and update penalty.
    """
    target, subsequent_BM = lesson.target, lesson.subsequent_BM
    if target is None:
        raise ContextError("the lesson has no target; run the teacher first")
    num_streams, num_tokens = subsequent_BM.shape
    pieces_BT = subsequent_BM.reshape(num_streams * segments, num_tokens // segments)
    input_ids_BT = with_sink(sink_id, pieces_BT)
    first = input_ids_BT.shape[1] - pieces_BT.shape[1]
    position_ids_BT = None
    if config.positions == "teacher" and not lesson.is_anchor:  # whose teacher reads the same pieces
        ids_T = torch.arange(num_tokens, device=input_ids_BT.device) + first + lesson.context_BN.shape[1]
        ids_ST = ids_T.reshape(segments, -1)
        if first:  # the sink stays at 0, in teacher and student
            ids_ST = torch.cat([torch.zeros_like(ids_ST[:, :1]), ids_ST], dim=1)
        position_ids_BT = ids_ST.repeat(num_streams, 1)
    with checkpointed(backbone, active=config.checkpointing and torch.is_grad_enabled()):
        student = forward_states(
            backbone,
            input_ids_BT,
            first=first,
            layers=hidden_layers(backbone, config),
            position_ids_BT=position_ids_BT,
        ).rejoined(num_streams)
    loss_B = torch.zeros(num_streams, device=student.final_BTD.device)
    if config.hidden_weight:
        loss_B = loss_B + config.hidden_weight * hidden_distance(
            student.layers, target.layers, norm=config.norm, normalized=config.normalization == "teacher"
        )
    if config.kl_weight or config.next_token_weight:
        loss_B = loss_B + distribution_loss(
            student.final_BTD,
            target,
            subsequent_BM,
            backbone.logits,
            kl_weight=config.kl_weight,
            next_token_weight=config.next_token_weight,
            num_generated=lesson.num_generated,
        )
    if config.update_penalty != "none" and config.update_penalty_weight:
        loss_B = loss_B + config.update_penalty_weight * mean_update(adapter, before, config.update_penalty)
    return loss_B


def gradients(
    backbone: Backbone,
    adapter: Adapter,
    before: Snapshot,
    lesson: Lesson,
    config: AbsorbConfig,
    running_B: Tensor,
    *,
    sink_id: int | None,
    segments: int,
) -> Tensor:
    """Run the student forward and backward; the running streams' gradients, clipped, are left in the weights' `grad`.

    Args:
        backbone: The model, with `adapter` attached.
        adapter: The memory that is trained, without the part that studies.
        before: Its weights at the beginning of the round.
        lesson: The text of this step.
        config: Losses and their weights.
        running_B: Which streams learn.
        sink_id: First token of the student, or None.
        segments: Into how many pieces, read one by one, the text is cut.

    Returns:
        [B]: the losses, without gradient.
    """
    weights = adapter.parameters()
    for weight in weights:
        weight.grad = None
    loss_B = _recorded(backbone, adapter, before, lesson, config, running_B, sink_id=sink_id, segments=segments)
    if loss_B is None:
        loss_B = synchronization_loss(backbone, adapter, before, lesson, config, sink_id=sink_id, segments=segments)
        loss_B[running_B].sum().backward()  # type: ignore[no-untyped-call]
        _finish(adapter, config)
    return loss_B.detach()


@torch.no_grad()
def look(
    backbone: Backbone,
    adapter: Adapter,
    before: Snapshot,
    lesson: Lesson,
    config: AbsorbConfig,
    *,
    sink_id: int | None,
    segments: int,
) -> Tensor:
    """Compute the losses [B] of `gradients` alone, of streams that are not to learn now."""
    loss_B = _recorded(backbone, adapter, before, lesson, config, None, sink_id=sink_id, segments=segments)
    if loss_B is None:
        loss_B = synchronization_loss(backbone, adapter, before, lesson, config, sink_id=sink_id, segments=segments)
    return loss_B


def _finish(adapter: Adapter, config: AbsorbConfig) -> None:
    """Leave the part that studies alone, and clip what is left."""
    if config.study != "off":
        adapter.drop_gradients(slice(config.rank, None))
    clip(adapter, config.gradient_clip)


def _recorded(
    backbone: Backbone,
    adapter: Adapter,
    before: Snapshot,
    lesson: Lesson,
    config: AbsorbConfig,
    running_B: Tensor | None,
    *,
    sink_id: int | None,
    segments: int,
) -> Tensor | None:
    """The same from a CUDA graph; None where there is none. The losses alone if `running_B` is None."""
    graphs, target = graphs_of(backbone, adapter) if config.cuda_graphs else None, lesson.target
    if graphs is None or target is None or len(target.finals) > 1 or config.update_penalty != "none":
        return None
    num_layers, shares = len(target.layers), [share for share, _ in target.finals]

    def compute(context_BN: Tensor, subsequent_BM: Tensor, *states: Tensor) -> Any:
        finals = tuple(zip(shares, states[num_layers:], strict=True))
        text = dataclasses.replace(
            lesson,
            context_BN=context_BN,
            subsequent_BM=subsequent_BM,
            target=Target(layers=states[:num_layers], finals=finals),
        )
        with without_masks(backbone):
            return synchronization_loss(backbone, adapter, before, text, config, sink_id=sink_id, segments=segments)

    states = [*target.layers, *(final for _, final in target.finals)]
    key = (lesson.is_anchor, lesson.num_generated, segments, num_layers, tuple(shares), config, sink_id)
    inputs = [lesson.context_BN, lesson.subsequent_BM, *states]
    return graphs.run(key, compute, inputs, running_B, partial(_finish, adapter, config))
