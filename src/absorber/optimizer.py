"""Steps of the adapter's weights: which optimizer, its learning rate over a round, clipping, streams that have stopped.

Every update is made of a stream's own gradients, so that streams do not touch each other.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from absorber.adapter import Adapter
from absorber.config import AbsorbConfig

_MOMENTUM = 0.9
_LION_BETAS = (0.9, 0.99)  # arXiv 2302.06675
_MUON_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan, Muon, 2024
_NEWTON_SCHULZ_STEPS = 5


def new_optimizer(weights: Iterable[nn.Parameter], config: AbsorbConfig) -> torch.optim.Optimizer:
    """Make the optimizer that `config.optimizer` names.

    Args:
        weights: What it trains, axis 0 the stream.
        config: Its settings.
    """
    rate, decay = config.learning_rate, config.weight_decay
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(weights, lr=rate, weight_decay=decay, momentum=_MOMENTUM)
        case "lion":
            return _Lion(weights, {"lr": rate, "weight_decay": decay})
        case "muon":
            return _Muon(weights, {"lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(weights, lr=rate, weight_decay=decay, eps=config.adam_epsilon, fused=True)


class _Momentum(torch.optim.Optimizer):
    """Decoupled weight decay, and a step along something made of the gradient and one moment."""

    def __init__(self, weights: Iterable[nn.Parameter], defaults: dict[str, Any]) -> None:
        super().__init__(weights, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(self.direction(weight.grad, state["momentum"]), alpha=group["lr"])

    def direction(self, gradient: Tensor, momentum: Tensor) -> Tensor:
        """Where to go from; the momentum is brought up to date in place."""
        raise NotImplementedError


class _Lion(_Momentum):
    """The sign of an interpolated momentum (arXiv 2302.06675)."""

    def direction(self, gradient: Tensor, momentum: Tensor) -> Tensor:
        sign: Tensor = torch.lerp(momentum, gradient, 1 - _LION_BETAS[0]).sign_()
        momentum.lerp_(gradient, 1 - _LION_BETAS[1])
        return sign


class _Muon(_Momentum):
    """Nesterov momentum made orthogonal, matrix by matrix (Jordan et al., 2024; torch.optim.Muon has no batch axis)."""

    def direction(self, gradient: Tensor, momentum: Tensor) -> Tensor:
        momentum.mul_(_MUON_MOMENTUM).add_(gradient)
        ahead = torch.add(gradient, momentum, alpha=_MUON_MOMENTUM)
        rows, columns = ahead.shape[-2:]
        return orthogonal(ahead).mul_(max(1.0, rows / columns) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices [..., R, C] near one by Newton-Schulz iteration; a zero matrix stays."""
    a, b, c = _NEWTON_SCHULZ
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        square: Tensor = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = x if wide else x.mT
    return result.to(matrices.dtype)


def scheduled(peak: float, step: int, num_steps: int, config: AbsorbConfig) -> float:
    """The learning rate of a step: linear warm-up, then linear decay to zero, or constant.

    Args:
        peak: Largest learning rate.
        step: From 0.
        num_steps: How many there are.
        config: Warm-up and schedule.
    """
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return peak * warm
    return peak * min(warm, (num_steps - step) / max(1, num_steps - config.warmup_steps))


def settled(config: AbsorbConfig, round_number: int) -> float:
    """The peak learning rate of a round, from 1."""
    if config.settling_rounds is None:
        return config.learning_rate
    return config.learning_rate / math.sqrt(1 + (round_number - 1) / config.settling_rounds)


def take_step(
    optimizer: torch.optim.Optimizer,
    adapter: Adapter,
    running_B: Tensor,
    *learning_rates: float,
) -> None:
    """One optimizer step of the running streams; the others keep their weights.

    Args:
        optimizer: From `new_optimizer`.
        adapter: With gradients, clipped.
        running_B: Which streams learn; on the CPU.
        learning_rates: Of this step: one for all streams, or one for each.
    """
    largest = max(learning_rates)
    weights = adapter.parameters()
    # Momentum and weight decay would move a stopped stream even without a gradient, and its moments as well.
    stopped_B = None if running_B.all() else ~running_B
    held = None if stopped_B is None else [tensor[stopped_B].clone() for tensor in _by_stream(optimizer, weights)]
    # Every optimizer's step is as long as its rate, also that of weight decay.
    begun = adapter.snapshot() if min(learning_rates) < largest else None
    for group in optimizer.param_groups:
        group["lr"] = largest
    optimizer.step()
    with torch.no_grad():
        if begun is not None:
            share_B = torch.tensor(learning_rates, device=begun[0].device).div_(largest).view(-1, 1, 1)
            for weight, old in zip(weights, begun, strict=True):
                weight.copy_(old.lerp(weight, share_B.to(old.dtype)))
        if held is not None:
            for tensor, saved in zip(
                _by_stream(optimizer, weights), held, strict=False
            ):  # moments may be new, and zero
                tensor[stopped_B] = saved
            for tensor in _by_stream(optimizer, weights)[len(held) :]:
                tensor[stopped_B] = 0


def _by_stream(optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    """Everything that has a row for each stream: the weights, and the optimizer's moments of them."""
    moments = [value for weight in weights for value in optimizer.state.get(weight, {}).values()]
    return [*weights, *(value for value in moments if isinstance(value, Tensor) and value.dim() == 3)]


def clip(adapter: Adapter, norm: float | None) -> None:
    """Scale each stream's gradients down to a norm that they exceed, in place; without a norm do nothing."""
    gradients = [weight.grad for weight in adapter.parameters() if weight.grad is not None]
    if norm is None or not gradients:
        return
    if adapter.num_streams == 1:  # in a few launches for all of them
        factor = (norm / torch.stack(torch._foreach_norm(gradients)).float().norm().clamp_min(1e-12)).clamp_max(1.0)
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        return
    # Of rows first: to sum up a whole weight of each stream keeps few processors busy.
    norms = torch.cat([torch.linalg.vector_norm(gradient.float(), dim=2) for gradient in gradients], dim=1)
    factor_B11 = (norm / norms.norm(dim=1).clamp_min(1e-12)).clamp_max(1.0).view(-1, 1, 1)
    for gradient in gradients:
        gradient.mul_(factor_B11.to(gradient.dtype))
