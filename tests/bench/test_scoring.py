"""Scores of a passage against plain loops over the model's own logits."""

import math

import pytest
import torch

from absorber.backbone import inspect
from absorber.bench.scoring import gap_closed, passage_kl, passage_nll, predict_passage

SINK = 0


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(3)
    return (torch.randint(1, 250, (2, length), generator=generator) for length in (7, 5))


def log_probabilities(model, prefix, passage):
    """Of every token of the passage, one by one."""
    found = []
    for place in range(len(passage)):
        ids = torch.tensor([[SINK, *prefix, *passage[:place]]])
        with torch.no_grad():
            found.append(model(ids).logits[0, -1].float().log_softmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize("with_prefix", [True, False])
def test_nll_and_kl(model, texts, with_prefix):
    prefix_BT, passage_BP = texts
    if not with_prefix:
        prefix_BT = prefix_BT[:, :0]
    backbone = inspect(model)
    final = predict_passage(backbone, prefix_BT, passage_BP, sink_id=SINK)
    other = predict_passage(backbone, prefix_BT[:, 4:], passage_BP, sink_id=SINK)
    nll_B, kl_B = passage_nll(backbone, final, passage_BP), passage_kl(backbone, final, other)
    for row in range(2):
        prefix, passage = prefix_BT[row].tolist(), passage_BP[row].tolist()
        log_p, log_q = (log_probabilities(model, part, passage) for part in (prefix, prefix[4:]))
        assert nll_B[row].item() == pytest.approx(-sum(log_p[i, t] for i, t in enumerate(passage)).item() / 5, abs=1e-4)
        assert kl_B[row].item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), abs=1e-4)


def test_gap_closed():
    assert gap_closed(3.0, 2.5, 2.0) == 0.5
    assert gap_closed(3.0, 3.5, 2.0) == -0.5
    assert math.isnan(gap_closed(2.0, 1.5, 2.0))
