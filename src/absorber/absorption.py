"""Absorbing one context: Algorithm 1 of arXiv 2604.20915.

    1  teacher pass over X Y, no gradient; keep its states at the positions of Y
    2  W* <- W (the adapter as it is)
    3  up to K times: run the student over Y alone; stop if its distance to the teacher is below eps;
       otherwise one optimizer step on W*

Only the adapter changes. Every stream of a batch has its own loss, stops by itself and is rolled back by itself.

Shapes: B streams, N context tokens (X), M subsequent tokens (Y).
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from absorber.adapter import Adapter, Snapshot
from absorber.backbone import Backbone, check_positions, forward_states, on_its_device, untouched, with_sink
from absorber.config import AbsorbConfig
from absorber.errors import ContextError, DeviceMemoryError, DivergedError
from absorber.fused_adapter import together
from absorber.fused_text import fused
from absorber.graphs import graphs_of
from absorber.lessons import Anchors, Lesson, Lessons, LessonsTogether, Part, Past
from absorber.notes import Notes
from absorber.optimizer import new_optimizer, scheduled, take_step
from absorber.student import gradients, look
from absorber.study import learn
from absorber.subsequent import OnCount
from absorber.synchronization import Target, next_token_loss
from absorber.teacher import teach

Outcome = Literal[
    "absorbed", "below_threshold", "shrunk", "rolled_back_worse", "rolled_back_nonfinite", "rolled_back_held_out"
]

_SHARES = (1.0, 0.5, 0.25, 0.0)
"""What may be kept of a round's change if it is judged by held-out text."""


@dataclass(slots=True)
class RoundResult:
    """What one stream's round did."""

    losses: list[float] = field(default_factory=list)
    """Synchronization loss on the round's own text: before study, before the first step and each other step on that
    text, and after the last step."""
    num_steps: int = 0
    """Optimizer steps taken."""
    outcome: Outcome = "absorbed"
    """absorbed: all steps taken. below_threshold: ended early because loss < eps. shrunk: held-out text is said best
    with a part of the round's change, and that was kept. rolled_back_worse, rolled_back_nonfinite and
    rolled_back_held_out: the memory is as it was before the round."""
    seconds: float = 0.0
    """Wall time of the whole batch's round."""

    @property
    def rolled_back(self) -> bool:
        """Whether the round was undone."""
        return self.outcome.startswith("rolled_back")


@dataclass(frozen=True, slots=True)
class Earlier:
    """What a stream brings into a round from those before."""

    past: Sequence[Past] = ()
    """Earlier rounds, to train on again."""
    anchors: Anchors | None = None
    """Texts that the base wrote from nothing, on which the model should stay as it is."""
    round_number: int = 1
    """Decides together with the seed which step trains on what."""
    own: Past | None = None
    """This round's texts, for rounds that train on it again: what the base says of Y is kept there. Y may be followed
    by generated text in the round itself."""


def absorb_context(
    backbone: Backbone,
    adapter: Adapter,
    context_BN: Tensor,
    subsequent_BM: Tensor,
    config: AbsorbConfig,
    *,
    sink_id: int,
    num_generated: int = 0,
    notes: Notes | None = None,
    studied: Sequence[Notes] = (),
    earlier: Earlier | Sequence[Earlier] = Earlier(),
    optimizer: torch.optim.Optimizer | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    on_study: OnCount | None = None,
) -> list[RoundResult]:
    """Absorb X into the adapter by synchronizing on Y. Algorithm 1, arXiv 2604.20915.

    Args:
        backbone: The model; as it was when this returns or raises.
        adapter: Trained in place. On an error it is as it was before the round.
        context_BN: X, token ids.
        subsequent_BM: Y, token ids.
        config: K, eps, losses, teacher, ...
        sink_id: First token of teacher and student if `config.sink` is "shared".
        num_generated: How many of the last tokens of Y the model wrote itself. The next-token term leaves them
            out, for they tell nothing about the stream.
        notes: What is studied of X before, from `notes.take_notes`; the adapter's part for it has begun
            (`study.begin`).
        studied: Notes of earlier rounds, to be studied again.
        earlier: What the rounds before left: one for all streams, which are of one age then, or one for each, which
            may differ; each then trains on what it would train on alone. With several nothing is studied.
        optimizer: One from `new_optimizer`, to carry its state over rounds; a new one by default.
        on_step: Called before each step with its number and the latest losses [B] on the round's own text.
        on_study: Called before each step of study with its number and how many there are.

    Returns:
        One result per stream.

    Raises:
        ContextError: If X or Y is empty or their batch is not the adapter's.
        ConfigError: If X and Y together are longer than the model's positions.
        DivergedError: If the loss is not finite before the first step, so that the model or the text is at fault.
        DeviceMemoryError: If the device has no room.

    Differs from the paper: the loss is taken once more after the last step, so that a round that did harm is
    noticed and undone. Some steps train on earlier rounds or on anchors (`lessons.Lessons`), if the settings say so.
    """
    num_streams = adapter.num_streams
    if context_BN.shape[1] == 0 or subsequent_BM.shape[1] < 2:
        raise ContextError(
            f"a round needs a context and two subsequent tokens; got {context_BN.shape[1]} and "
            f"{subsequent_BM.shape[1]}. Give more text or smaller context_tokens and sync_tokens"
        )
    if context_BN.shape[0] != num_streams or subsequent_BM.shape[0] != num_streams:
        raise ContextError(f"the adapter has {num_streams} streams; got a batch of {context_BN.shape[0]}")
    check_positions(backbone, context_BN.shape[1] + subsequent_BM.shape[1] + (config.sink == "shared"))

    started = time.perf_counter()
    sink = sink_id if config.sink == "shared" else None
    before = adapter.snapshot()
    moments = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    results = [RoundResult() for _ in range(num_streams)]
    optimizer = optimizer or new_optimizer(adapter.parameters(), config)
    try:
        with (
            untouched(backbone.model),
            on_its_device(backbone),
            adapter.attached(backbone),
            fused(backbone),
            together(backbone, adapter),
        ):
            judged = config.held_out_tokens
            if num_generated or subsequent_BM.shape[1] < judged + 2:
                judged = 0
            trained_BM = subsequent_BM[:, : subsequent_BM.shape[1] - judged]
            own = Lesson(context_BN, trained_BM, num_generated, config.segments)
            lessons = _lessons(own, earlier, config)
            trainer = _Trainer(backbone, adapter, before, lessons, results, config, sink_id=sink)
            if notes is not None and isinstance(earlier, Earlier):
                trainer.look()
                learn(
                    backbone,
                    adapter,
                    notes,
                    studied,
                    trained_BM,
                    config,
                    sink_id=sink,
                    round_number=earlier.round_number,
                    on_step=on_study,
                )
            trainer.train(optimizer, on_step)
            if judged:
                _shrink(backbone, adapter, before, subsequent_BM, judged, results, sink_id=sink)
            _roll_back(results, adapter, before, optimizer, moments, config)
    except BaseException as error:
        adapter.restore(before)
        if moments is not None:
            optimizer.load_state_dict(moments)
        if isinstance(error, torch.OutOfMemoryError):
            raise DeviceMemoryError(
                f"no room on {backbone.device} for a round of {context_BN.shape[1]} + {subsequent_BM.shape[1]} tokens "
                "and the adapter's gradients. Make sync_tokens, context_tokens or rank smaller, or load the model "
                "with quantization"
            ) from error
        raise
    finally:
        for weight in adapter.parameters():
            weight.grad = None
    seconds = time.perf_counter() - started
    for result in results:
        result.seconds = seconds
    return results


def _lessons(own: Lesson, earlier: Earlier | Sequence[Earlier], config: AbsorbConfig) -> Lessons | LessonsTogether:
    def of(own: Lesson, one: Earlier) -> Lessons:
        if config.has_replay and one.own is not None and one.own.subsequent_BM.shape == own.subsequent_BM.shape:
            own = dataclasses.replace(own, source=one.own)
        return Lessons(own, past=one.past, anchors=one.anchors, config=config, round_number=one.round_number)

    if isinstance(earlier, Earlier):
        return of(own, earlier)
    rows = torch.arange(len(earlier))[:, None]
    return LessonsTogether([of(own.rows(row), one) for row, one in zip(rows, earlier, strict=True)])


class _Trainer:
    """Lines 1 to 3 of Algorithm 1 for the streams of one round."""

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        before: Snapshot,
        lessons: Lessons | LessonsTogether,
        results: list[RoundResult],
        config: AbsorbConfig,
        *,
        sink_id: int | None,
    ) -> None:
        """Line 2: W* <- W, as every stream runs."""
        self._backbone, self._adapter, self._before = backbone, adapter, before
        self._lessons, self._results, self._config, self._sink_id = lessons, results, config, sink_id
        self._running_B = torch.ones(len(results), dtype=torch.bool)  # on the CPU, which need not wait to look at it
        self._graphs = graphs_of(backbone, adapter) if config.cuda_graphs else None
        self._unread: list[tuple[Tensor, Tensor]] = []

    def look(self) -> None:
        """Write down the losses on the round's own text before study, so that a round is judged with what it does."""
        loss_B = self._losses(self._parts(0), 0)
        _check_finite(loss_B)
        for result, loss in zip(self._results, loss_B.tolist(), strict=True):
            result.losses.append(loss)

    def train(self, optimizer: torch.optim.Optimizer, on_step: Callable[[int, Tensor], None] | None) -> None:
        """Line 3, with the teacher asked when a lesson first comes up.

        Losses are read when somebody waits for them, and otherwise after the last step: a device that is given one
        step after another does not idle in between. A stream that is not finite is undone, whatever it does until then;
        so is a round whose first loss is not.
        """
        config, first_look = self._config, not self._results[0].losses
        watched = on_step is not None or config.threshold is not None
        own_loss_B = first_loss_B = torch.zeros(len(self._results), device=self._backbone.device)
        for step in range(config.max_steps + 1):  # the last turn only looks
            last = step == config.max_steps
            parts = self._parts(step)
            if last:
                loss_B = self._losses(parts, 0)
            else:
                loss_B = gradients(
                    self._backbone,
                    self._adapter,
                    self._before,
                    parts,
                    config,
                    sink_id=self._sink_id,
                    step=step,
                    graphs=self._graphs,
                )
            own_B = torch.zeros_like(self._running_B)
            for part in parts:
                own_B[slice(None) if part.rows is None else part.rows] = torch.tensor(part.own)
            if on_step is not None:
                own_loss_B = torch.where(own_B.to(loss_B.device), loss_B, own_loss_B)
                on_step(step, own_loss_B)
            self._unread.append((loss_B, own_B))
            first_loss_B = loss_B if step == 0 else first_loss_B
            if first_look and (last or (watched and step == 0)):
                _check_finite(first_loss_B)
            if watched or last:
                self._read(is_over=last)
            if last or not self._running_B.any():
                break
            rates = [scheduled(peak, step, config.max_steps, config) for peak in self._lessons.peaks]
            take_step(optimizer, self._adapter, self._running_B, *rates)

    def _parts(self, step: int) -> list[Part]:
        return self._lessons.parts(step, self._running_B, self._teach)

    def _losses(self, parts: Sequence[Part], step: int) -> Tensor:
        return look(
            self._backbone,
            self._adapter,
            self._before,
            parts,
            self._config,
            sink_id=self._sink_id,
            step=step,
            graphs=self._graphs,
        )

    def _teach(self, lesson: Lesson, rows: Tensor | None) -> Target:
        """Ask the teacher, who has the memory as it was `before` the round, whatever step this is."""
        config, adapter = self._config, self._adapter
        if lesson.is_anchor:
            config = config.replace(teacher="base")
        segments = lesson.pieces(0) if lesson.is_anchor else 1
        now = None if config.teacher == "base" else adapter.snapshot()
        if now is not None:
            adapter.restore(self._before)
        texts = (lesson.context_BN, lesson.subsequent_BM)
        graphs = self._graphs if rows is None else None
        with adapter.only(rows):
            target = teach(
                self._backbone, adapter, *texts, config, sink_id=self._sink_id, segments=segments, graphs=graphs
            )
        if now is not None:
            adapter.restore(now)
        return target

    def _read(self, *, is_over: bool) -> None:
        """Write down losses and steps of the running streams, and stop those that are done.

        Args:
            is_over: Whether the latest losses were only looked at, without a step after them.
        """
        for place, (loss_B, own_B) in enumerate(self._unread):
            looked = is_over and place == len(self._unread) - 1
            lines = zip(self._results, loss_B.tolist(), own_B.tolist(), self._running_B.tolist(), strict=True)
            for index, (result, loss, own, runs) in enumerate(lines):
                if not runs:
                    continue
                if own or not math.isfinite(loss):
                    result.losses.append(loss)
                if not math.isfinite(loss):
                    self._running_B[index] = False
                elif own and self._config.threshold is not None and loss < self._config.threshold:
                    result.outcome = "below_threshold"
                    self._running_B[index] = False
                elif not looked:
                    result.num_steps += 1
        self._unread.clear()


def _check_finite(loss_B: Tensor) -> None:
    if not loss_B.isfinite().all():
        raise DivergedError(
            f"the synchronization loss is {loss_B.tolist()} before the first step: the model gives "
            "non-finite states for this text. Check the model's weights, or load it with dtype float32"
        )


@torch.no_grad()
def _shrink(
    backbone: Backbone,
    adapter: Adapter,
    before: Snapshot,
    subsequent_BM: Tensor,
    num_tokens: int,
    results: list[RoundResult],
    *,
    sink_id: int | None,
) -> None:
    """Keep of the round's change as much as says the last tokens of Y best, read after the others; stream by stream."""
    after = adapter.snapshot()
    input_ids_BT = with_sink(sink_id, subsequent_BM)
    place = input_ids_BT.shape[1] - num_tokens - 1
    losses_SB = []
    for share in _SHARES:
        adapter.restore([torch.lerp(old, new, share) for old, new in zip(before, after, strict=True)])
        final_BTD = forward_states(backbone, input_ids_BT, first=place).final_BTD
        losses_SB.append(next_token_loss(final_BTD, input_ids_BT[:, place:], backbone.logits))
    best_B = torch.stack(losses_SB).nan_to_num(nan=torch.inf).argmin(dim=0)
    share_B = torch.tensor(_SHARES, device=best_B.device)[best_B]
    for result, share in zip(results, share_B.tolist(), strict=True):
        if not math.isfinite(result.losses[-1]):
            continue
        if share == 0:
            result.outcome = "rolled_back_held_out"
        elif share < 1:
            result.outcome = "shrunk"
    kept = share_B.view(-1, 1, 1)
    # The ends as they are, not as an interpolation rounds them.
    adapter.restore(
        [
            torch.where(kept == 1, new, torch.lerp(old, new, kept.to(old.dtype)))
            for old, new in zip(before, after, strict=True)
        ]
    )


def _roll_back(
    results: list[RoundResult],
    adapter: Adapter,
    before: Snapshot,
    optimizer: torch.optim.Optimizer,
    moments: dict[str, Any] | None,
    config: AbsorbConfig,
) -> None:
    """Undo the rounds that ended non-finite, or worse than they began, or that held-out text refused."""
    for result in results:
        first, last = result.losses[0], result.losses[-1]
        if not math.isfinite(last):
            result.outcome = "rolled_back_nonfinite"
        elif config.rollback == "worse" and last > first:
            result.outcome = "rolled_back_worse"
    undone_B = torch.tensor([result.rolled_back for result in results], device=before[0].device)
    if not undone_B.any():
        return
    adapter.restore([weight[undone_B] for weight in before], undone_B)
    if moments is None:
        return
    if undone_B.all():
        optimizer.load_state_dict(moments)
        return
    for index, weight in enumerate(adapter.parameters()):
        for name, value in optimizer.state[weight].items():
            if value.dim() == 3:  # a moment of every weight; the step count is common to all streams
                saved = moments["state"].get(index, {}).get(name)
                value[undone_B] = 0.0 if saved is None else saved[undone_B]
