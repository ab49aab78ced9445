"""The student: what it loses on a text against its teacher, and the gradients of that.

Shapes: B streams, N context tokens (X), M subsequent tokens (Y).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from absorber.adapter import Adapter, Snapshot, mean_update
from absorber.backbone import Backbone, checkpointed, forward_states, with_sink
from absorber.config import AbsorbConfig
from absorber.errors import ContextError
from absorber.graphs import StepGraphs, without_masks
from absorber.lessons import Part
from absorber.optimizer import clip
from absorber.synchronization import Target, distribution_loss, hidden_distance
from absorber.teacher import hidden_layers

Loss = partial[Tensor]
"""`synchronization_loss`, which a part is missing of."""


def synchronization_loss(
    backbone: Backbone,
    adapter: Adapter,
    before: Snapshot,
    part: Part,
    config: AbsorbConfig,
    *,
    sink_id: int | None,
    step: int,
) -> Tensor:
    """Run the student over Y alone and measure its distance to the teacher. Equation (6), arXiv 2604.20915.

    Args:
        backbone: The model, with `adapter` attached.
        adapter: The memory that is trained.
        before: Its weights at the beginning of the round, for the update penalty.
        part: X, Y and what the teacher says of Y, of some or all streams.
        config: Losses and their weights.
        sink_id: First token of the student, or None.
        step: Which step; says into how many pieces, read one by one, Y is cut.

    Returns:
        One number for each of the part's streams, float32: the weighted sum of hidden-state distance, KL, next-token
        loss and update penalty.
    """
    lesson = part.lesson
    target, subsequent_BM, segments = lesson.target, lesson.subsequent_BM, lesson.pieces(step)
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
        moved_B = mean_update(adapter, before, config.update_penalty)
        loss_B = loss_B + config.update_penalty_weight * (moved_B if part.rows is None else moved_B[part.rows])
    return loss_B


def gradients(
    backbone: Backbone,
    adapter: Adapter,
    before: Snapshot,
    parts: Sequence[Part],
    config: AbsorbConfig,
    *,
    sink_id: int | None,
    step: int,
    graphs: StepGraphs | None = None,
) -> Tensor:
    """Run the student forward and backward; the streams' gradients, clipped, are left in the weights' `grad`.

    Args:
        backbone: The model, with `adapter` attached.
        adapter: The memory that is trained, without the part that studies.
        before: Its weights at the beginning of the round.
        parts: The texts of this step; streams that are in none have no gradient.
        config: Losses and their weights.
        sink_id: First token of the student, or None.
        step: Which step; says into how many pieces, read one by one, the texts are cut.
        graphs: Where the step is recorded and replayed, from `graphs_of`; None to run it as it is.

    Returns:
        [B]: the losses, without gradient; zero for streams that are in no part.
    """
    for weight in adapter.parameters():
        weight.grad = None
    finish = partial(_finish, adapter, config)
    compute = partial(synchronization_loss, backbone, adapter, before, config=config, sink_id=sink_id, step=step)
    loss_B = _recorded(graphs, backbone, parts, compute, finish)
    if loss_B is None:
        loss_B = _as_usual(adapter, parts, compute, learns=True)
        finish()
    return loss_B


@torch.no_grad()
def look(
    backbone: Backbone,
    adapter: Adapter,
    before: Snapshot,
    parts: Sequence[Part],
    config: AbsorbConfig,
    *,
    sink_id: int | None,
    step: int,
    graphs: StepGraphs | None = None,
) -> Tensor:
    """Compute the losses [B] of `gradients` alone, of streams that are not to learn now."""
    compute = partial(synchronization_loss, backbone, adapter, before, config=config, sink_id=sink_id, step=step)
    loss_B = _recorded(graphs, backbone, parts, compute, None)
    return _as_usual(adapter, parts, compute, learns=False) if loss_B is None else loss_B


def _as_usual(adapter: Adapter, parts: Sequence[Part], compute: Loss, *, learns: bool) -> Tensor:
    """The losses of all parts, one part after another, and their gradients added up."""
    loss_B = torch.zeros(adapter.num_streams, device=next(iter(adapter.down.values())).device)
    for part in parts:
        with adapter.only(part.rows):  # the backward pass too, for blocks that are computed again
            loss = compute(part=part)
            if learns:
                loss.sum().backward()  # type: ignore[no-untyped-call]
        loss_B[slice(None) if part.rows is None else part.rows] = loss.detach()
    return loss_B


def _finish(adapter: Adapter, config: AbsorbConfig) -> None:
    """Leave the part that studies alone, and clip what is left."""
    if config.study != "off":
        adapter.drop_gradients(slice(config.rank, None))
    clip(adapter, config.gradient_clip)


def _recorded(
    graphs: StepGraphs | None,
    backbone: Backbone,
    parts: Sequence[Part],
    compute: Loss,
    finish: Callable[[], None] | None,
) -> Tensor | None:
    """The same of all streams from a CUDA graph; None where there is none. Without `finish` the losses alone."""
    config, sink_id, step = (compute.keywords[name] for name in ("config", "sink_id", "step"))
    part, target = parts[0], parts[0].lesson.target
    if graphs is None or len(parts) > 1 or part.rows is not None or target is None:
        return None
    if len(target.finals) > 1 or config.update_penalty != "none":
        return None
    lesson, num_layers, shares = part.lesson, len(target.layers), [share for share, _ in target.finals]

    def of_tensors(context_BN: Tensor, subsequent_BM: Tensor, *states: Tensor) -> Any:
        finals = tuple(zip(shares, states[num_layers:], strict=True))
        text = dataclasses.replace(
            lesson,
            context_BN=context_BN,
            subsequent_BM=subsequent_BM,
            target=Target(layers=states[:num_layers], finals=finals),
        )
        with without_masks(backbone):
            return compute(part=dataclasses.replace(part, lesson=text))

    states = [*target.layers, *(final for _, final in target.finals)]
    key = (lesson.is_anchor, lesson.num_generated, lesson.pieces(step), num_layers, tuple(shares), config, sink_id)
    return graphs.run(key, of_tensors, [lesson.context_BN, lesson.subsequent_BM, *states], finish)
