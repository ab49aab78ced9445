"""Each kernel equals its plain twin; without a GPU they run in Triton's interpreter (tests/conftest.py)."""

import pytest
import torch

from absorber import kernels, synchronization
from absorber.low_rank import add_low_rank
from absorber.synchronization import weighted_losses

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5, 2048, 5000])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_weighted_losses(with_teacher, vocabulary, dtype):
    student, teacher = (random(6, vocabulary, seed=seed).to(dtype) for seed in (1, 2))
    next_ids = torch.tensor([0, vocabulary - 1, 1, 2, 3, 4], device=DEVICE)
    weights = [torch.tensor([0.3, 0.0, 0.3, 0.1, 0.2, 0.5]), torch.tensor([1.0, 1.0, 0.0, 0.2, 0.5, 0.1])]
    weights = [weight.to(DEVICE) for weight in weights]
    loss, slope = weighted_losses(student.clone(), [(1.0, teacher)] if with_teacher else [], next_ids, *weights)
    overwritten = student.clone()
    ours = kernels.weighted_losses(overwritten, teacher if with_teacher else None, next_ids, *weights)
    torch.testing.assert_close(ours, loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(overwritten, slope, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def test_losses_of_many_rows_do_not_see_their_own_slopes():
    """A GPU runs the warps of a program in any order; only many rows at once show it."""
    num_rows = 4096 if DEVICE == "cuda" else 8
    student = random(num_rows, 49152 if DEVICE == "cuda" else 5000, seed=8).to(torch.bfloat16)
    next_ids = torch.arange(num_rows, device=DEVICE)
    weight = torch.ones(num_rows, device=DEVICE)
    loss, _ = weighted_losses(student.clone(), [], next_ids, weight, weight)
    for _ in range(5):
        ours = kernels.weighted_losses(student.clone(), None, next_ids, weight, weight)
        torch.testing.assert_close(ours, loss, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_tokens", [5, 8])
def test_pieces_of_a_text_may_be_one_token_long(monkeypatch, num_tokens):
    """Slices of one token are views with strides of their own, which the kernel once read as if they had none."""
    num_streams, vocabulary = 3, 40
    head = random(vocabulary, 16, seed=9)
    student, teacher = (random(num_streams, num_tokens, 16, seed=seed) for seed in (10, 11))
    token_ids = torch.arange(num_streams * num_tokens, device=DEVICE).reshape(num_streams, num_tokens)
    monkeypatch.setitem(synchronization.LOGITS_AT_ONCE, DEVICE, 4 * vocabulary * num_streams)  # 4 tokens at once

    def run():
        hidden = student.clone().requires_grad_()
        loss = synchronization.distribution_loss(
            hidden,
            synchronization.Target(layers=(), finals=((1.0, teacher),)),
            token_ids,
            lambda states: states @ head.T,
            kl_weight=0.3,
            next_token_weight=1.0,
        )
        return [loss, *torch.autograd.grad(loss.sum(), hidden)]

    monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
    plain = run()
    monkeypatch.setattr(kernels, "usable", lambda *tensors: True)
    for ours, twin in zip(run(), plain, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(8, 200), (200, 8), (64, 64)])
@pytest.mark.parametrize("num_tokens", [1, 64, 130])
def test_outer_products(num_tokens, rows, columns):
    wide = random(3, num_tokens, rows + 7, seed=3)
    p, q = wide[..., :rows], random(3, columns, num_tokens, seed=4).mT  # strides of their own
    torch.testing.assert_close(kernels.outer_products(p, q), p.mT @ q, rtol=1e-2, atol=1e-2)


def test_gradients_of_many_adapters(monkeypatch):
    def run():
        x, output = (random(4, 10, size, seed=5).requires_grad_() for size in (16, 24))
        down, up = random(2, 8, 16, seed=6).requires_grad_(), random(2, 24, 8, seed=7).requires_grad_()
        result = add_low_rank(output, x, down, up, scale=0.5)
        return [result, *torch.autograd.grad(result.square().sum(), (output, x, down, up))]

    monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
    plain = run()
    monkeypatch.setattr(kernels, "usable", lambda *tensors: True)
    for ours, twin in zip(run(), plain, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-3, atol=1e-1 if DEVICE == "cuda" else 1e-3)


def test_a_cpu_runs_the_twins():
    assert not kernels.usable(torch.zeros(1))


@pytest.mark.parametrize("strength", [1e-3, 1.0], ids=["below a step", "of many steps"])
@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(70, 130, 5), (64, 128, 64), (5, 300, 33)])
def test_merge_rounded(outputs, inputs, rank, strength):
    weight = random(outputs, inputs, seed=1).bfloat16()
    up, down = random(outputs, rank, seed=2, scale=strength), random(rank, inputs, seed=3, scale=1)
    exact = weight.float().addmm(up, down, alpha=0.5)
    merged, again, other = (torch.empty_like(weight) for _ in range(3))
    for target, seed in ((merged, 3), (again, 3), (other, 4)):
        kernels.merge_rounded(weight, up, down, 0.5, target, seed=seed)
    below = exact.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)
    above = exact.view(torch.int32).bitwise_and(-(2**16)).add(2**16).view(torch.float32)
    assert torch.equal(again, merged)
    assert not torch.equal(other, merged)
    # The sum in float32 may be the last bit away from ours, just across a number of bfloat16.
    assert float(((merged == below) | (merged == above)).float().mean()) > 0.999
    share = (exact.view(torch.int32) % 2**16).float().mean() / 2**16
    assert float((merged == above).float().mean()) == pytest.approx(float(share), abs=3 / (outputs * inputs) ** 0.5)
    # A sum near zero is exact to its terms, not to itself.
    error = ((merged.float() - exact) / (above - below)).clamp(-1, 1)
    assert float(error.mean()) == pytest.approx(0, abs=3 / (outputs * inputs) ** 0.5)


def test_merging_rounds_no_two_weights_and_no_two_places_alike():
    weight = torch.ones(64, 128, device=DEVICE).bfloat16()
    up, down = torch.full((64, 1), 2**-8, device=DEVICE), torch.ones(1, 128, device=DEVICE)  # half way to the next
    rounded = []
    for seed in range(2):
        merged = torch.empty_like(weight)
        kernels.merge_rounded(weight, up, down, 1.0, merged, seed=seed)
        rounded.append((merged != weight).float())
    for pair in ((rounded[0], rounded[1]), (rounded[0][1:], rounded[0][:-1]), (rounded[0][:, 1:], rounded[0][:, :-1])):
        alike = float((pair[0] == pair[1]).float().mean())
        assert alike == pytest.approx(0.5, abs=0.03)
