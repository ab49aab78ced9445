"""The losses equal their twins in plain loops, values and gradients; large vocabularies are worked off in pieces."""

import pytest
import torch

from absorber import ContextError, synchronization
from absorber.synchronization import Target, distribution_loss, hidden_distance
from reference import losses as twin

B, T, D, V, LAYERS = 3, 7, 5, 11, 2


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_hidden_distance(norm, normalized):
    student = [random(B, T, D, seed=layer).requires_grad_() for layer in range(LAYERS)]
    teacher = [random(B, T, D, seed=9 + layer) * (layer + 1) for layer in range(LAYERS)]
    ours_B = hidden_distance(student, teacher, norm=norm, normalized=normalized)
    ours_gradients = torch.autograd.grad(ours_B.sum(), student)
    for b in range(B):
        theirs = twin.hidden_distance(
            [layer[b] for layer in student], [layer[b] for layer in teacher], norm=norm, normalized=normalized
        )
        close(ours_B[b], theirs)
        for ours, gradient in zip(ours_gradients, torch.autograd.grad(theirs, student), strict=True):
            close(ours[b], gradient[b])


def test_hidden_distance_of_nothing_is_refused():
    with pytest.raises(ContextError, match="no hidden states"):
        hidden_distance([], [])
    with pytest.raises(ContextError, match="no hidden states"):
        hidden_distance([torch.zeros(1, 0, D)], [torch.zeros(1, 0, D)])


def problem(shares):
    weight_VD = random(V, D, seed=1)
    student_BTD = random(B, T, D, seed=2).requires_grad_()
    finals = tuple((share, random(B, T, D, seed=3 + index)) for index, share in enumerate(shares))
    token_ids_BT = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(5))
    return (lambda hidden: hidden @ weight_VD.T), student_BTD, Target(layers=(), finals=finals), token_ids_BT


@pytest.mark.parametrize("num_generated", [0, 2, T])
@pytest.mark.parametrize("shares", [(1.0,), (0.25, 0.75)])
def test_distribution_loss(shares, num_generated):
    logits, student_BTD, target, token_ids_BT = problem(shares)
    kl_B, nll_B = (
        distribution_loss(
            student_BTD,
            target,
            token_ids_BT,
            logits,
            kl_weight=kl_weight,
            next_token_weight=1 - kl_weight,
            num_generated=num_generated,
        )
        for kl_weight in (1.0, 0.0)
    )
    (ours_kl,) = torch.autograd.grad(kl_B.sum(), student_BTD, retain_graph=True)
    (ours_nll,) = torch.autograd.grad(nll_B.sum(), student_BTD)
    for b in range(B):
        student_TD = student_BTD[b].detach().requires_grad_()
        kl = twin.kl(logits(student_TD), [(logits(final[b]), share) for share, final in target.finals])
        close(kl_B[b], kl)
        close(ours_kl[b], torch.autograd.grad(kl, student_TD)[0])
        nll = twin.next_token(logits(student_TD), token_ids_BT[b].tolist(), num_generated=num_generated)
        close(nll_B[b], nll)
        if num_generated < T - 1:
            close(ours_nll[b], torch.autograd.grad(nll, student_TD)[0])


@pytest.mark.parametrize(("kl_weight", "next_token_weight"), [(0.3, 1.0), (0.7, 0.0), (0.0, 0.7), (0.0, 0.0)])
def test_the_losses_are_added_with_their_weights(kl_weight, next_token_weight):
    logits, student_BTD, target, token_ids_BT = problem((1.0,))

    def loss(kl_weight, next_token_weight):
        return distribution_loss(
            student_BTD, target, token_ids_BT, logits, kl_weight=kl_weight, next_token_weight=next_token_weight
        )

    close(loss(kl_weight, next_token_weight), kl_weight * loss(1.0, 0.0) + next_token_weight * loss(0.0, 1.0))


@pytest.mark.parametrize("at_once", [1, 2 * B * V, 3 * B * V])
def test_pieces_change_nothing(monkeypatch, at_once):
    logits, student_BTD, target, token_ids_BT = problem((0.5, 0.5))
    largest = 0

    def watched(hidden_BTD):
        nonlocal largest
        logits_BTV = logits(hidden_BTD)
        largest = max(largest, logits_BTV.numel())
        return logits_BTV

    def both():
        loss_B = distribution_loss(
            student_BTD, target, token_ids_BT, watched, kl_weight=1.0, next_token_weight=3.0, num_generated=2
        )
        return [loss_B, *torch.autograd.grad(loss_B.sum(), student_BTD)]

    whole = both()
    assert largest == B * T * V
    monkeypatch.setitem(synchronization.LOGITS_AT_ONCE, "cpu", at_once)
    largest = 0
    for piecewise, once in zip(both(), whole, strict=True):
        close(piecewise, once)
    assert largest == max(at_once, B * V)
