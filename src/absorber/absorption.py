"""Absorbing one context: Algorithm 1 of arXiv 2604.20915.

    1  teacher pass over X Y, no gradient; keep its states at the positions of Y
    2  W* <- W (the adapter as it is)
    3  up to K times: run the student over Y alone; stop if its distance to the teacher is below eps;
       otherwise one optimizer step on W*

Only the adapter changes. Every stream of a batch has its own loss, stops by itself and is rolled back by itself.

Shapes: B streams, N context tokens (X), M subsequent tokens (Y).
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from absorber.adapter import Adapter, Snapshot, mean_update
from absorber.backbone import Backbone, check_positions, forward_states, untouched
from absorber.config import AbsorbConfig
from absorber.errors import ContextError, DeviceMemoryError, DivergedError
from absorber.synchronization import Target, distribution_losses, hidden_distance
from absorber.teacher import hidden_layers, teach, with_sink

Outcome = Literal["absorbed", "below_threshold", "rolled_back_worse", "rolled_back_nonfinite"]


@dataclass(slots=True)
class RoundResult:
    """What one stream's round did."""

    losses: list[float] = field(default_factory=list)
    """Synchronization loss before each step and after the last: `num_steps + 1` numbers."""
    outcome: Outcome = "absorbed"
    """absorbed: all steps taken. below_threshold: ended early because loss < eps. rolled_back_worse and
    rolled_back_nonfinite: the memory is as it was before the round."""
    seconds: float = 0.0
    """Wall time of the whole batch's round."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps taken."""
        return len(self.losses) - 1

    @property
    def rolled_back(self) -> bool:
        """Whether the round was undone."""
        return self.outcome.startswith("rolled_back")


def absorb_context(
    backbone: Backbone,
    adapter: Adapter,
    context_BN: Tensor,
    subsequent_BM: Tensor,
    config: AbsorbConfig,
    *,
    sink_id: int,
    num_generated: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
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
        optimizer: One from `new_optimizer`, to carry its state over rounds; a new one by default.
        on_step: Called before each step with its number and the losses [B].

    Returns:
        One result per stream.

    Raises:
        ContextError: If X or Y is empty or their batch is not the adapter's.
        ConfigError: If X and Y together are longer than the model's positions.
        DivergedError: If the loss is not finite before the first step, so that the model or the text is at fault.
        DeviceMemoryError: If the device has no room.

    Differs from the paper: the loss is taken once more after the last step, so that a round that did harm is
    noticed and undone.
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
    optimizer = optimizer or new_optimizer(adapter, config)
    try:
        with untouched(backbone.model), adapter.attached(backbone):
            target = teach(backbone, adapter, context_BN, subsequent_BM, config, sink_id=sink)  # line 1
            running_B = torch.ones(num_streams, dtype=torch.bool, device=backbone.device)  # line 2: W* <- W
            for step in range(config.max_steps + 1):  # line 3; the last turn only looks
                last = step == config.max_steps
                with torch.set_grad_enabled(not last):
                    loss_B = synchronization_loss(
                        backbone,
                        adapter,
                        before,
                        target,
                        context_BN,
                        subsequent_BM,
                        config,
                        sink_id=sink,
                        num_generated=num_generated,
                    )
                if on_step is not None:
                    on_step(step, loss_B.detach())
                running_B = _note(results, loss_B.detach(), running_B, config.threshold)
                if step == 0 and not loss_B.isfinite().all():
                    raise DivergedError(
                        f"the synchronization loss is {loss_B.tolist()} before the first step: the model gives "
                        "non-finite states for this text. Check the model's weights, or load it with dtype float32"
                    )
                if last or not running_B.any():
                    break
                _step(optimizer, adapter, loss_B, running_B, _learning_rate(step, config), config)
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


def synchronization_loss(
    backbone: Backbone,
    adapter: Adapter,
    before: Snapshot,
    target: Target,
    context_BN: Tensor,
    subsequent_BM: Tensor,
    config: AbsorbConfig,
    *,
    sink_id: int | None,
    num_generated: int = 0,
) -> Tensor:
    """Run the student over Y alone and measure its distance to the teacher. Equation (6), arXiv 2604.20915.

    Returns:
        [B], float32: the weighted sum of hidden-state distance, KL, next-token loss and update penalty.
    """
    input_ids_BT = with_sink(sink_id, subsequent_BM)
    first = input_ids_BT.shape[1] - subsequent_BM.shape[1]
    position_ids_BT = None
    if config.positions == "teacher":
        ids_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
        ids_T[first:] += context_BN.shape[1]  # the sink stays at 0, in teacher and student
        position_ids_BT = ids_T.expand_as(input_ids_BT)
    student = forward_states(
        backbone,
        input_ids_BT,
        first=first,
        layers=hidden_layers(backbone, config),
        position_ids_BT=position_ids_BT,
    )
    loss_B = torch.zeros(subsequent_BM.shape[0], device=student.final_BTD.device)
    if config.hidden_weight:
        loss_B = loss_B + config.hidden_weight * hidden_distance(
            student.layers, target.layers, norm=config.norm, normalized=config.normalization == "teacher"
        )
    if config.kl_weight or config.next_token_weight:
        kl_B, nll_B = distribution_losses(
            student.final_BTD,
            target,
            subsequent_BM,
            backbone.logits,
            with_kl=config.kl_weight > 0,
            with_next_token=config.next_token_weight > 0,
            num_generated=num_generated,
        )
        loss_B = loss_B + config.kl_weight * kl_B + config.next_token_weight * nll_B
    if config.update_penalty != "none" and config.update_penalty_weight:
        loss_B = loss_B + config.update_penalty_weight * mean_update(adapter, before, config.update_penalty)
    return loss_B


def new_optimizer(adapter: Adapter, config: AbsorbConfig) -> torch.optim.Optimizer:
    """Make the AdamW that trains the adapter; its state is elementwise, so streams do not touch each other."""
    return torch.optim.AdamW(
        adapter.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


def _learning_rate(step: int, config: AbsorbConfig) -> float:
    """Linear warm-up, then linear decay to zero or constant."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return config.learning_rate * warm
    decay = (config.max_steps - step) / max(1, config.max_steps - config.warmup_steps)
    return config.learning_rate * min(warm, decay)


def _note(results: list[RoundResult], loss_B: Tensor, running_B: Tensor, threshold: float | None) -> Tensor:
    """Write down the losses of the running streams; return which go on."""
    goes_on_B = running_B.clone()
    for index, loss in enumerate(loss_B.tolist()):
        if not running_B[index]:
            continue
        results[index].losses.append(loss)
        if not math.isfinite(loss):
            goes_on_B[index] = False
        elif threshold is not None and loss < threshold:
            results[index].outcome = "below_threshold"
            goes_on_B[index] = False
    return goes_on_B


def _step(
    optimizer: torch.optim.Optimizer,
    adapter: Adapter,
    loss_B: Tensor,
    running_B: Tensor,
    learning_rate: float,
    config: AbsorbConfig,
) -> None:
    """One optimizer step of the running streams; the others keep their weights."""
    weights = adapter.parameters()
    optimizer.zero_grad(set_to_none=True)
    loss_B[running_B].sum().backward()  # type: ignore[no-untyped-call]
    if config.gradient_clip is not None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norms_B = torch.stack([gradient.flatten(1).float().norm(dim=1) for gradient in gradients])
        factor_B = (config.gradient_clip / norms_B.norm(dim=0).clamp_min(1e-12)).clamp_max(1.0)
        for gradient in gradients:
            gradient.mul_(factor_B.view(-1, 1, 1).to(gradient.dtype))
    # AdamW's momentum and weight decay would move a stopped stream even without a gradient.
    stopped_B = None if running_B.all() else ~running_B
    held = None if stopped_B is None else adapter.snapshot(stopped_B)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    if held is not None:
        adapter.restore(held, stopped_B)


def _roll_back(
    results: list[RoundResult],
    adapter: Adapter,
    before: Snapshot,
    optimizer: torch.optim.Optimizer,
    moments: dict[str, Any] | None,
    config: AbsorbConfig,
) -> None:
    """Undo the rounds that ended non-finite, or worse than they began."""
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
