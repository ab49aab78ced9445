"""Optimizers equal their plain twins, stream by stream; clipping and stopped streams."""

import math

import pytest
import torch

from absorber.adapter import Adapter
from absorber.config import AbsorbConfig
from absorber.errors import ConfigError
from absorber.optimizer import clip, new_optimizer, orthogonal, scheduled, take_step

CONFIG = AbsorbConfig(rank=3, gradient_clip=None)


def singular_values_near_one(matrix):
    """Newton-Schulz by its polynomial on the singular values: s becomes a s + b s^3 + c s^5, five times."""
    u, s, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (4, 4)])
def test_a_matrix_is_made_orthogonal(shape):
    matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrices)
    for ours, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(ours, singular_values_near_one(matrix), rtol=1e-4, atol=1e-4)
        assert ((torch.linalg.svdvals(ours) - 1).abs() < 0.4).all()
    assert (orthogonal(torch.zeros(1, *shape)) == 0).all()


def slow_step(name, weight, gradient, state, rate, decay, step):
    """One step of one stream's matrix."""
    if name == "sgd":  # decay goes into the gradient
        gradient = gradient + decay * weight
        state["m"] = gradient if step == 0 else 0.9 * state["m"] + gradient
        return weight - rate * state["m"]
    weight = weight * (1 - rate * decay)
    before = state.get("m", torch.zeros_like(weight))
    if name == "adamw":
        state["m"] = 0.9 * before + 0.1 * gradient
        state["v"] = 0.999 * state.get("v", 0) + 0.001 * gradient**2
        first, second = state["m"] / (1 - 0.9 ** (step + 1)), state["v"] / (1 - 0.999 ** (step + 1))
        return weight - rate * first / (second.sqrt() + CONFIG.adam_epsilon)
    if name == "lion":
        state["m"] = 0.99 * before + 0.01 * gradient
        return weight - rate * torch.sign(0.9 * before + 0.1 * gradient)
    state["m"] = 0.95 * before + gradient
    rows, columns = weight.shape
    return weight - rate * math.sqrt(max(1, rows / columns)) * singular_values_near_one(gradient + 0.95 * state["m"])


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
def test_four_steps_equal_the_twin(backbone, name):
    config = CONFIG.replace(optimizer=name, weight_decay=0.1)
    adapter = Adapter.fresh(backbone, config, num_streams=2)
    optimizer = new_optimizer(adapter.parameters(), config)
    plain = [[weight[b].detach().clone() for weight in adapter.parameters()] for b in range(2)]
    states = [[{} for _ in adapter.parameters()] for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        rate = 0.01 * (step + 1)
        for index, weight in enumerate(adapter.parameters()):
            weight.grad = torch.randn(weight.shape, generator=generator)
            for b in range(2):
                plain[b][index] = slow_step(name, plain[b][index], weight.grad[b], states[b][index], rate, 0.1, step)
        take_step(optimizer, adapter, torch.tensor([True, True]), rate)
    for b in range(2):
        for ours, theirs in zip(adapter.parameters(), plain[b], strict=True):
            torch.testing.assert_close(ours[b].detach(), theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
def test_a_stopped_stream_stays_and_each_stream_is_clipped_by_itself(backbone, name):
    config = CONFIG.replace(optimizer=name, weight_decay=0.1, gradient_clip=1.0)
    adapter = Adapter.fresh(backbone, config, num_streams=3)
    optimizer = new_optimizer(adapter.parameters(), config)
    for running in ([True, True, True], [True, False, True]):
        before = adapter.snapshot()
        for weight in adapter.parameters():
            weight.grad = torch.ones_like(weight)
            weight.grad[2] *= 1e-6
        clip(adapter, config.gradient_clip)
        take_step(optimizer, adapter, torch.tensor(running), 0.01)
        norms = torch.stack([weight.grad.flatten(1).norm(dim=1) for weight in adapter.parameters()]).norm(dim=0)
        assert norms[0] == pytest.approx(1.0)
        assert norms[2] < 1e-3
        for ours, old in zip(adapter.parameters(), before, strict=True):
            assert torch.equal(ours[1], old[1]) == (not running[1])
            assert not torch.equal(ours[0], old[0])


def test_a_single_stream_is_clipped_as_one_of_many(backbone):
    adapters = [Adapter.fresh(backbone, CONFIG, num_streams=count) for count in (1, 2)]
    for adapter in adapters:
        for index, weight in enumerate(adapter.parameters()):
            weight.grad = torch.randn(weight.shape[1:], generator=torch.Generator().manual_seed(index)).expand_as(
                weight
            )
            weight.grad = weight.grad.clone()
        clip(adapter, 0.5)
    for one, many in zip(*(adapter.parameters() for adapter in adapters), strict=True):
        torch.testing.assert_close(one.grad[0], many.grad[1])
    clip(adapters[0], None)
    assert torch.stack([weight.grad.norm() for weight in adapters[0].parameters()]).norm() == pytest.approx(0.5)


def test_the_schedule():
    config = CONFIG.replace(warmup_steps=3)
    rates = [scheduled(1.0, step, 10, config) for step in range(10)]
    assert rates[:3] == [0.25, 0.5, 0.75]
    assert rates[3] == 1.0
    assert rates[-1] == pytest.approx(1 / 7)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert scheduled(2.0, 9, 10, config.replace(schedule="constant")) == 2.0


def test_a_strange_optimizer_is_named():
    with pytest.raises(ConfigError, match="'adamw' or 'sgd' or 'lion' or 'muon'"):
        CONFIG.replace(optimizer="adagrad")
