"""Recorded steps: none without a GPU; with one, a round takes the same way as without them."""

import pytest
import torch

import absorber.absorption
import absorber.study
from absorber.absorption import Earlier, absorb_context
from absorber.adapter import Adapter
from absorber.backbone import altered_by_others, forward_states, inspect, lay_together
from absorber.config import AbsorbConfig
from absorber.graphs import StepGraphs, graphs_of, is_plain, without_masks
from absorber.lessons import Anchors, Past
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


def spoil_what_is_free(device):
    """What a recorded pass reads must be its own, or the model's: what was freed may be given to others."""
    taken = [torch.full((2**size,), torch.nan, device=device) for size in range(5, 16) for _ in range(40)]
    assert len(taken) == 440


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
            earlier=Earlier(past, Anchors(anchors), number),
        )
        spoil_what_is_free(backbone.device)
        past.append(Past(context.cpu(), subsequent.cpu()))
        studied.append(notes)
        losses.append(torch.tensor([result.losses for result in results]))
    return losses


@on_gpu
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_recorded_round_goes_as_a_usual_one(monkeypatch, name):
    model = build(name).to("cuda")
    for weight in model.parameters():
        if weight.dim() == 1:  # biases of q, k and v
            torch.nn.init.normal_(weight)
    lay_together(model)
    backbone = inspect(model)
    recorded = rounds(backbone)
    for module in (absorber.absorption, absorber.study):
        monkeypatch.setattr(module, "graphs_of", lambda *args: None)
    for ours, usual in zip(recorded, rounds(backbone), strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_moved_positions_hide_nothing(name):
    """The sink is seen from positions that jump, recorded or not."""
    backbone = inspect(build(name))
    ids, other = torch.arange(10).repeat(2, 1) + 20, torch.arange(10).repeat(2, 1) + 20
    other[:, 0] = 7
    positions = torch.tensor([[0, *range(9, 18)]] * 2)
    with torch.no_grad():
        states, changed = (forward_states(backbone, one, position_ids_BT=positions).final_BTD for one in (ids, other))
        with without_masks(backbone):
            recorded = forward_states(backbone, ids, position_ids_BT=positions).final_BTD
    assert (states - changed)[:, 1:].abs().max() > 1e-4
    torch.testing.assert_close(recorded, states)


def test_models_that_cannot_be_recorded():
    assert is_plain(inspect(build("llama")))
    config = build("llama").config
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not is_plain(inspect(type(build("llama"))(config)))
    backbone = inspect(build("llama"))
    with Adapter.fresh(backbone, CONFIG).attached(backbone):
        assert not altered_by_others(*backbone.decoder.modules())
        handle = backbone.blocks[0].register_forward_hook(lambda *args: None)
        assert altered_by_others(*backbone.decoder.modules())
        handle.remove()
        assert not altered_by_others(*backbone.decoder.modules())


def test_what_cannot_be_recorded_runs_as_usual_and_few_are_kept(monkeypatch):
    graphs = StepGraphs([torch.zeros(1)], places=())

    def fails(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(graphs, "_record", fails)
    assert graphs.run("a", torch.sum, [torch.ones(2)], None) is None
    with pytest.warns(UserWarning, match="no room"):
        assert graphs.run("a", torch.sum, [torch.ones(2)], None) is None
    for key in range(100):
        graphs.run(key, torch.sum, [torch.ones(2)], None)
    assert len(graphs._recorded) < 20
