"""Algorithm 1 equals its twin over the grid of options: losses, gradients, weights after each of several rounds."""

import copy

import pytest
import torch

from absorber import PRESETS, AbsorbConfig
from absorber.absorption import absorb_context, new_optimizer, synchronization_loss
from absorber.adapter import Adapter
from absorber.backbone import inspect
from absorber.teacher import teach
from reference import algorithms as twin
from reference.lora import PlainLora

SINK = 0
HIDDEN = {"hidden_weight": 1.0, "kl_weight": 0.0, "next_token_weight": 0.0}

OPTIONS = {
    "default": {},
    "hidden": HIDDEN,
    "hidden_l2": HIDDEN | {"norm": "l2"},
    "hidden_plain": HIDDEN | {"normalization": "none"},
    "hidden_plain_l2": HIDDEN | {"normalization": "none", "norm": "l2"},
    "subset": HIDDEN | {"hidden_layers": (0,)},
    "final_norm_alone": HIDDEN | {"hidden_layers": (2,)},
    "embedding": HIDDEN | {"include_embedding": True, "normalization": "none"},
    "no_final_norm": HIDDEN | {"include_final_norm": False},
    "kl": {"next_token_weight": 0.0},
    "next_token": {"kl_weight": 0.0, "next_token_weight": 1.0},
    "all_terms": {"hidden_weight": 0.5, "kl_weight": 2.0, "next_token_weight": 0.3},
    "no_sink": {"sink": "none", "hidden_weight": 1.0},
    "teacher_positions": {"positions": "teacher", "hidden_weight": 1.0},
    "teacher_positions_no_sink": {"positions": "teacher", "sink": "none"},
    "own_memory": {"teacher": "memory", "hidden_weight": 1.0},
    "mixture": {"teacher": "mixture", "teacher_mixture": 0.3, "hidden_weight": 1.0},
    "penalty_l1": {"update_penalty": "l1", "update_penalty_weight": 5.0},
    "penalty_l2": {"update_penalty": "l2", "update_penalty_weight": 500.0},
    "carry": {"optimizer_state": "carry", "weight_decay": 0.1},
    "constant": {"schedule": "constant", "warmup_steps": 0, "gradient_clip": None},
    "clipped": {"gradient_clip": 0.01},
    "threshold": {"threshold": 5.36},
    "paper": {
        key: value
        for key, value in PRESETS["paper"].absorb.to_dict().items()
        if key not in ("rank", "max_steps", "threshold")
    }
    | {"threshold": 0.1},
}


@pytest.fixture(scope="module")
def double(_tiny):
    """In float64, so that the order of the additions does not matter; the RMS norms have a scale that does."""
    model = copy.deepcopy(_tiny[0]).double()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    return model


def settings(name):
    return AbsorbConfig(**{"rank": 3, "max_steps": 4, "learning_rate": 3e-3, "alpha": 5.0} | OPTIONS[name])


def begun(backbone, config, num_streams=1):
    """An adapter with a past, so that base and own teacher differ."""
    adapter = Adapter.fresh(backbone, config, num_streams=num_streams)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in adapter.up.values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return adapter


def rounds(number):
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(1, 257, (1, 22), generator=generator).split([9, 13], dim=1) for _ in range(number)]


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient(double, name):
    config, backbone = settings(name), inspect(double)
    adapter = begun(backbone, config)
    ((context_BN, subsequent_BM),) = rounds(1)
    sink = SINK if config.sink == "shared" else None
    before, past = adapter.snapshot(), PlainLora(adapter)
    with adapter.attached(backbone):
        target = teach(backbone, adapter, context_BN, subsequent_BM, config, sink_id=sink)
        with torch.no_grad():
            for weight in adapter.parameters():  # as after some steps, so that the update penalty is not zero
                weight += 0.01
        loss_B = synchronization_loss(
            backbone, adapter, before, target, context_BN, subsequent_BM, config, sink_id=sink, num_generated=4
        )
    gradients = torch.autograd.grad(loss_B.sum(), adapter.parameters(), materialize_grads=True)

    lora, sinks = PlainLora(adapter), [] if sink is None else [sink]
    context, subsequent = context_BN[0].tolist(), subsequent_BM[0].tolist()
    products = [product.detach() for product in past.products()]
    theirs = twin.student_loss(
        double,
        lora,
        context,
        subsequent,
        twin.teacher_pass(double, past, context, subsequent, config, sinks),
        products,
        config,
        sinks,
        4,
    )
    torch.testing.assert_close(loss_B[0].double(), theirs.double(), rtol=1e-5, atol=1e-7)
    for ours, gradient in zip(
        gradients, torch.autograd.grad(theirs, lora.leaves(), materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(ours[0], gradient, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_three_rounds(double, name):
    config, backbone = settings(name), inspect(double)
    adapter = begun(backbone, config)
    lora = PlainLora(adapter)
    carry = config.optimizer_state == "carry"
    ours_optimizer = new_optimizer(adapter, config) if carry else None
    twin_optimizer = twin.new_optimizer(lora, config) if carry else None
    stops = []
    for context_BN, subsequent_BM in rounds(3):
        (result,) = absorb_context(
            backbone,
            adapter,
            context_BN,
            subsequent_BM,
            config,
            sink_id=SINK,
            num_generated=3,
            optimizer=ours_optimizer,
        )
        losses, undone = twin.absorb_context(
            double,
            lora,
            context_BN[0].tolist(),
            subsequent_BM[0].tolist(),
            config,
            sink_id=SINK,
            num_generated=3,
            optimizer=twin_optimizer,
        )
        assert result.losses == pytest.approx(losses, rel=1e-4)
        assert result.rolled_back == undone
        stops.append(result.num_steps)
        for ours, theirs in zip(adapter.parameters(), lora.leaves(), strict=True):
            torch.testing.assert_close(ours[0].detach(), theirs.detach(), rtol=1e-3, atol=2e-5)
    assert (min(stops) < config.max_steps) == (name == "threshold")


def test_a_batch_equals_single_streams(double):
    config, backbone = settings("all_terms"), inspect(double)
    adapter = begun(backbone, config, num_streams=3)
    loras = [PlainLora(adapter, b) for b in range(3)]
    for contexts, subsequents in [tuple(torch.cat(parts) for parts in zip(*rounds(3), strict=True))] * 2:
        results = absorb_context(backbone, adapter, contexts, subsequents, config, sink_id=SINK)
        for b, lora in enumerate(loras):
            losses, _ = twin.absorb_context(
                double, lora, contexts[b].tolist(), subsequents[b].tolist(), config, sink_id=SINK
            )
            assert results[b].losses == pytest.approx(losses, rel=1e-4)
            for ours, theirs in zip(adapter.parameters(), lora.leaves(), strict=True):
                torch.testing.assert_close(ours[b].detach(), theirs.detach(), rtol=1e-3, atol=2e-5)
