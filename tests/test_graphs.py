"""Recorded steps: none without a GPU; with one, a round takes the same way as without them."""

import pytest
import torch

import absorber.student
import absorber.study
from absorber.absorption import Earlier, absorb_context
from absorber.adapter import Adapter
from absorber.backbone import inspect
from absorber.config import AbsorbConfig
from absorber.graphs import graphs_of, without_masks
from absorber.lessons import Past
from absorber.notes import Notes, given
from absorber.study import begin
from architectures import build

CONFIG = AbsorbConfig(
    cuda_graphs=True, rank=4, max_steps=12, learning_rate=1e-3, study="light", study_tokens=8, rollback="nonfinite"
)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_a_cpu_records_nothing(backbone):
    assert graphs_of(backbone, Adapter.fresh(backbone, CONFIG)) is None


def test_without_masks_the_model_reads_the_same_and_is_put_back(backbone):
    token_ids = torch.arange(40).reshape(2, 20)
    config = backbone.model.config
    before, expected = config._attn_implementation, backbone.model(token_ids).logits
    with without_masks(backbone):
        found = backbone.model(token_ids).logits
        assert config._attn_implementation != before
    assert config._attn_implementation == before
    torch.testing.assert_close(found, expected)


def rounds(backbone):
    adapter, losses = Adapter.fresh(backbone, CONFIG, num_streams=3), []
    past, studied = [], []
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 4):
        draw = lambda length: torch.randint(0, 90, (3, length), generator=generator).to(backbone.device)  # noqa: E731
        context, subsequent = draw(32), draw(48)
        anchors = draw(16)
        passages = context[:, :16].reshape(3, 2, 8).cpu()
        passages[:, :, :2] = given(passages[:, :, :2])
        notes = Notes(passages, passages[:, :0])
        begin(backbone, adapter, context, anchors, CONFIG, sink_id=0)
        results = absorb_context(
            backbone,
            adapter,
            context,
            subsequent,
            CONFIG,
            sink_id=0,
            notes=notes,
            studied=studied,
            earlier=Earlier(past, anchors, number),
        )
        past.append(Past(context.cpu(), subsequent.cpu()))
        studied.append(notes)
        losses.append(torch.tensor([result.losses for result in results]))
    return losses


@on_gpu
def test_a_recorded_round_goes_as_a_usual_one(monkeypatch):
    backbone = inspect(build("llama").to("cuda"))
    recorded = rounds(backbone)
    for module in (absorber.student, absorber.study):
        monkeypatch.setattr(module, "graphs_of", lambda *args: None)
    for ours, usual in zip(recorded, rounds(backbone), strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-3, atol=1e-3)
