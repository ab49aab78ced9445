"""The adapter's hooks equal merged weights, and its stream axis equals one model per stream."""

import pytest
import torch

from absorber import AbsorbConfig
from absorber.adapter import Adapter, mean_update
from absorber.backbone import forward_states
from reference.lora import PlainLora
from reference.losses import update_size


def random_adapter(backbone, num_streams, *, alpha=3.0):
    adapter = Adapter.fresh(backbone, AbsorbConfig(rank=3, alpha=alpha), num_streams=num_streams)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return adapter


def test_every_row_has_its_own_weights(model, backbone):
    adapter = random_adapter(backbone, 3)
    token_ids_BT = torch.randint(0, 257, (3, 9), generator=torch.Generator().manual_seed(0))
    with adapter.attached(backbone):
        ours_BTV = backbone.logits(forward_states(backbone, token_ids_BT).final_BTD)
    gradients = torch.autograd.grad(ours_BTV.square().sum(), adapter.parameters())
    for b in range(3):
        twin = PlainLora(adapter, b)
        theirs_TV = twin.run(model, input_ids=token_ids_BT[b : b + 1]).logits[0]
        torch.testing.assert_close(ours_BTV[b], theirs_TV, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(gradients, torch.autograd.grad(theirs_TV.square().sum(), twin.leaves()), strict=True):
            torch.testing.assert_close(ours[b], theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_mean_update(backbone, norm):
    adapter = random_adapter(backbone, 2)
    before, twins_before = adapter.snapshot(), [PlainLora(adapter, b).products() for b in range(2)]
    with torch.no_grad():
        for index, weight in enumerate(adapter.parameters()):
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)) * 0.05
    ours_B = mean_update(adapter, before, norm)
    gradients = torch.autograd.grad(ours_B.sum(), adapter.parameters())
    for b in range(2):
        twin = PlainLora(adapter, b)
        theirs = update_size(twin.products(), [product.detach() for product in twins_before[b]], norm=norm)
        torch.testing.assert_close(ours_B[b], theirs, rtol=1e-4, atol=1e-8)
        for ours, gradient in zip(gradients, torch.autograd.grad(theirs, twin.leaves()), strict=True):
            torch.testing.assert_close(ours[b], gradient, rtol=1e-3, atol=1e-7)
