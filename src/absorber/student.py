"""The student: what it loses on a text against its teacher, and the gradients of that.

Shapes: B streams, N context tokens (X), M subsequent tokens (Y), S tokens of the passages that are studied.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from absorber.adapter import Adapter, Snapshot, mean_update
from absorber.backbone import Backbone, forward_states, with_sink
from absorber.config import AbsorbConfig
from absorber.errors import ContextError
from absorber.graphs import graphs_of, without_masks
from absorber.lessons import Lesson
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


def study_loss(backbone: Backbone, passages_BS: Tensor, config: AbsorbConfig, *, sink_id: int | None) -> Tensor:
    """Mean next-token loss on passages that are read one by one, after the sink alone.

    The first `study_cue` tokens of a passage are its cue and are not scored.

    Args:
        backbone: The model, with the adapter that learns attached.
        passages_BS: Passages of `study_tokens` tokens, one after another.
        config: Their length and that of the cue.
        sink_id: First token of each, or None.

    Returns:
        [B], float32, in nats. Not in the paper: nothing in Y depends on the facts of X (docs/method.md).
    """
    num_streams, num_tokens = passages_BS.shape
    input_ids_BT = with_sink(sink_id, passages_BS.reshape(-1, config.study_tokens))
    first = input_ids_BT.shape[1] - config.study_tokens
    final_BSD = forward_states(backbone, input_ids_BT, first=first).rejoined(num_streams).final_BTD
    # What stands at place t of a passage is predicted at t - 1; the last place does not lead to the next passage.
    predicted_S = torch.arange(1, num_tokens + 1, device=passages_BS.device) % config.study_tokens
    return distribution_loss(
        final_BSD,
        Target(layers=(), finals=()),
        passages_BS,
        backbone.logits,
        kl_weight=0.0,
        next_token_weight=1.0,
        scored_T=predicted_S >= config.study_cue,
    )


def gradients(
    backbone: Backbone,
    adapter: Adapter,
    before: Snapshot,
    lesson: Lesson,
    passages_BS: Tensor,
    config: AbsorbConfig,
    running_B: Tensor,
    *,
    sink_id: int | None,
    segments: int,
) -> Tensor:
    """Run the student forward and backward; the gradients for the running streams are left in the weights' `grad`.

    Args:
        backbone: The model, with `adapter` attached.
        adapter: The memory that is trained.
        before: Its weights at the beginning of the round.
        lesson: The text of this step.
        passages_BS: Passages to be learned by heart beside it; may have no tokens.
        config: Losses and their weights.
        running_B: Which streams learn.
        sink_id: First token of the student, or None.
        segments: Into how many pieces, read one by one, the text is cut.

    Returns:
        [B]: the losses on the text, without study and without gradient.
    """
    weights = adapter.parameters()
    for weight in weights:
        weight.grad = None

    def losses(text: Lesson, studied_BS: Tensor) -> tuple[Tensor, Tensor]:
        text_B = synchronization_loss(backbone, adapter, before, text, config, sink_id=sink_id, segments=segments)
        if not studied_BS.shape[1]:
            return text_B, text_B
        return text_B, text_B + config.study_weight * study_loss(backbone, studied_BS, config, sink_id=sink_id)

    graphs, target = graphs_of(backbone, adapter) if config.cuda_graphs else None, lesson.target
    if graphs is not None and target is not None and len(target.finals) <= 1 and config.update_penalty == "none":
        num_layers, shares = len(target.layers), [share for share, _ in target.finals]

        def compute(context_BN: Tensor, subsequent_BM: Tensor, studied_BS: Tensor, *states: Tensor) -> Any:
            finals = tuple(zip(shares, states[num_layers:], strict=True))
            text = dataclasses.replace(
                lesson,
                context_BN=context_BN,
                subsequent_BM=subsequent_BM,
                target=Target(layers=states[:num_layers], finals=finals),
            )
            with without_masks(backbone):
                return losses(text, studied_BS)

        states = [*target.layers, *(final for _, final in target.finals)]
        inputs = [lesson.context_BN, lesson.subsequent_BM, passages_BS, *states]
        key = (lesson.is_anchor, lesson.num_generated, segments, num_layers, tuple(shares), config, sink_id)
        loss_B = graphs.run(key, compute, inputs, running_B, weights)
        if loss_B is not None:
            return loss_B
    text_B, total_B = losses(lesson, passages_BS)
    total_B[running_B].sum().backward()  # type: ignore[no-untyped-call]
    return text_B.detach()
