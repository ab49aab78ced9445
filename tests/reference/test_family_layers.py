"""The layers of the families equal their slow twins, and transformers' own, in values and gradients."""

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from absorber.bench.families.delta_layer import DeltaMixer
from absorber.bench.families.mamba_scan import quicken
from absorber.bench.families.ttt_layer import TTTMixer
from absorber.errors import ModelError
from reference import family_layers

HIDDEN, HEADS = 12, 2


def made(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = DeltaMixer(HIDDEN, HEADS) if kind == "delta" else TTTMixer(HIDDEN, HEADS, inner=kind, batch_tokens=4)
        for weight in mixer.parameters():  # away from zeros and ones, which hide mistakes
            weight.data += 0.3 * torch.randn_like(weight)
    return mixer


def inputs(rows, length):
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(1))


def compare(mixer, slow, states_BTD, **tolerance):
    probe = torch.randn(states_BTD.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for run in (mixer, lambda states: torch.stack([slow(mixer, row) for row in states])):
        mixer.zero_grad()
        given = states_BTD.clone().requires_grad_()
        found = run(given)
        (found * probe).sum().backward()
        slopes = {name: weight.grad.clone() for name, weight in mixer.named_parameters()}
        results.append((found.detach(), given.grad, slopes))
    (fast, fast_slope, fast_slopes), (twin, twin_slope, twin_slopes) = results
    assert torch.allclose(fast, twin, **tolerance)
    assert torch.allclose(fast_slope, twin_slope, **tolerance)
    for name, slope in twin_slopes.items():
        assert slope.abs().max() > 0, name
        assert torch.allclose(fast_slopes[name], slope, rtol=1e-3, atol=1e-3 * float(slope.abs().max())), name


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("length", [3, 4, 14])
def test_ttt_equals_its_twin(kind, length):
    compare(made(kind), family_layers.ttt, inputs(2, length), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_token_at_a_time_is_the_same(kind):
    mixer, states_BTD = made(kind), inputs(2, 11)
    with torch.no_grad():
        whole = mixer(states_BTD)
        state = mixer.fresh(2)
        shapes = [part.shape for part in state]
        steps = torch.stack([mixer.step(token_BD, state) for token_BD in states_BTD.unbind(1)], dim=1)
    assert torch.allclose(whole, steps, atol=1e-4)
    assert [part.shape for part in state] == shapes


@pytest.mark.parametrize("length", [2, 64, 150])
def test_delta_equals_its_twin(length):
    compare(made("delta"), family_layers.delta, inputs(2, length), rtol=1e-3, atol=1e-3)


def test_mamba_is_that_of_transformers():
    config = Mamba2Config(
        hidden_size=32, num_hidden_layers=2, state_size=8, head_dim=16, num_heads=4, n_groups=1, vocab_size=40
    )
    config.chunk_size = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mamba2ForCausalLM(config).train()
    ids_BT = torch.randint(0, 40, (2, 100), generator=torch.Generator().manual_seed(0))
    results = []
    for step in (lambda: None, lambda: quicken(model)):
        step()
        model.zero_grad()
        found = model(ids_BT, use_cache=False).logits
        found.pow(2).mean().backward()
        results.append((found.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}))
    (theirs, slopes), (ours, own_slopes) = results
    assert torch.allclose(ours, theirs, atol=1e-5)
    for name, slope in slopes.items():
        assert torch.allclose(own_slopes[name], slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max())), name


def test_groups_of_states_are_refused():
    config = Mamba2Config(
        hidden_size=32, num_hidden_layers=1, state_size=8, head_dim=16, num_heads=4, n_groups=2, vocab_size=40
    )
    with pytest.raises(ModelError, match="one group"):
        quicken(Mamba2ForCausalLM(config))
