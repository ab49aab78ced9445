"""Blocks computed again in the backward pass: the same gradients, less that is kept, nothing left on the model."""

import pytest
import torch

from absorber.absorption import absorb_context
from absorber.adapter import Adapter
from absorber.backbone import checkpointed, inspect
from absorber.config import AbsorbConfig
from absorber.lessons import Lesson, Part
from absorber.student import gradients
from absorber.teacher import teach
from architectures import ARCHITECTURES, build

CONFIG = AbsorbConfig(rank=3, max_steps=2, learning_rate=1e-3, warmup_steps=0, hidden_weight=0.5)


def tokens(length, seed, rows=2):
    return torch.randint(1, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


def step(backbone, *, checkpointing):
    """The losses and gradients of one step, and the bytes that its forward pass keeps, weights left out."""
    config = CONFIG.replace(checkpointing=checkpointing)
    adapter = Adapter.fresh(backbone, config, num_streams=2)
    with torch.no_grad():
        for up in adapter.up.values():
            up.fill_(0.01)
    lesson = Lesson(tokens(8, 0), tokens(40, 1), 0, (1,))
    weights = {weight.data_ptr() for weight in [*backbone.model.parameters(), *adapter.parameters()]}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    backbone.model.requires_grad_(False)
    with adapter.attached(backbone):
        lesson.target = teach(backbone, adapter, lesson.context_BN, lesson.subsequent_BM, config, sink_id=0)
        parts = [Part(lesson, None, own=True)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = gradients(backbone, adapter, adapter.snapshot(), parts, config, sink_id=0, step=0)
    return losses, [weight.grad for weight in adapter.parameters()], sum(kept.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_the_same(name):
    backbone = inspect(build(name).eval())
    losses, slopes, everything = step(backbone, checkpointing=False)
    again, same, kept = step(backbone, checkpointing=True)
    assert kept < everything / 2
    torch.testing.assert_close(again, losses)
    for ours, theirs in zip(same, slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_round_is_the_same_and_leaves_nothing():
    backbone = inspect(build("llama").train())
    weights = []
    for checkpointing in (False, True):
        config = CONFIG.replace(checkpointing=checkpointing)
        adapter = Adapter.fresh(backbone, config)
        absorb_context(backbone, adapter, tokens(8, 0, 1), tokens(16, 1, 1), config, sink_id=0)
        weights.append(adapter.parameters())
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert all("forward" not in vars(block) for block in backbone.blocks)
    assert all(module.training for module in backbone.model.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_recorded_round_is_the_same():
    backbone = inspect(build("llama").to("cuda"))
    losses = []
    for checkpointing in (False, True):
        config = CONFIG.replace(checkpointing=checkpointing, cuda_graphs=True, max_steps=6, rollback="nonfinite")
        adapter, texts = Adapter.fresh(backbone, config), (tokens(32, 0, 1).cuda(), tokens(48, 1, 1).cuda())
        (result,) = absorb_context(backbone, adapter, *texts, config, sink_id=0)
        losses.append(torch.tensor(result.losses))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_an_error_leaves_nothing_either():
    backbone = inspect(build("llama"))
    with pytest.raises(RuntimeError, match="stop"), checkpointed(backbone):
        raise RuntimeError("stop")
    assert all("forward" not in vars(block) for block in backbone.blocks)
