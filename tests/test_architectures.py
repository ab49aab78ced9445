"""Every family of causal language models passes the same table: its own logits, learning, batches, PEFT, streams."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from absorber import AbsorbConfig, ConfigError, Memory, ModelError, Session, StreamConfig
from absorber.absorption import absorb_context
from absorber.adapter import Adapter, load_peft
from absorber.backbone import forward_states, inspect
from absorber.generation import Decoder
from architectures import ARCHITECTURES, SLIDING, build

CONFIG = AbsorbConfig(rank=3, alpha=6.0, max_steps=3, learning_rate=3e-3, warmup_steps=0, hidden_weight=0.5)
STREAM = StreamConfig(context_tokens=8, sync_tokens=2 * SLIDING, read_tokens=7, max_new_tokens=5)
FAMILIES = pytest.mark.parametrize("name", ARCHITECTURES)


def tokens(rows, length, seed=0):
    return torch.randint(1, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, input_ids):
    return model(input_ids=input_ids, use_cache=False).logits


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.fixture(params=ARCHITECTURES)
def family(request):
    """A model that must be bit for bit the same afterwards."""
    model = build(request.param)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    logits, modules = logits_of(model, tokens(2, 20)), [id(module) for module in model.modules()]
    model.train()
    yield model
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [id(module) for module in model.modules()] == modules
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(logits_of(model.eval(), tokens(2, 20)), logits)


def learned(model, num_streams=1):
    """An adapter of this model after one round, and what the round did."""
    backbone = inspect(model)
    adapter = Adapter.fresh(backbone, CONFIG, num_streams=num_streams)
    input_ids = tokens(num_streams, 24, seed=1)
    results = absorb_context(backbone, adapter, input_ids[:, :8], input_ids[:, 8:], CONFIG, sink_id=0)
    return adapter, results


@FAMILIES
def test_states_and_logits_are_the_models_own(name):
    model = build(name)
    backbone, input_ids = inspect(model), tokens(2, 20)
    with torch.no_grad():
        states = forward_states(backbone, input_ids, layers=(-1, 0, 1, 2, 3))
        output = model(input_ids, output_hidden_states=True, use_cache=False)
    assert torch.equal(backbone.logits(states.final_BTD), output.logits)
    assert torch.equal(states.layers[4], states.final_BTD)
    if name != "mamba":  # whose output_hidden_states are taken at other places
        ours = [*states.layers[:3], states.layers[4]]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, output.hidden_states, strict=True))


def test_a_round_lowers_the_loss(family):
    _, (result,) = learned(family)
    assert result.outcome == "absorbed"
    assert result.losses == sorted(result.losses, reverse=True)
    assert result.losses[-1] < result.losses[0] - 1e-3


@FAMILIES
def test_a_batch_is_as_many_single_streams(name):
    # In float64: where a sliding layer gives teacher and student the same states, the sign of their L1 distance is
    # that of rounding errors, and Adam makes a whole step of it.
    model = build(name).double()
    backbone = inspect(model)
    batch, results = learned(model, num_streams=3)
    input_ids = tokens(3, 24, seed=1)
    for row in range(3):
        single = Adapter.fresh(backbone, CONFIG)
        ids = input_ids[row : row + 1]
        (result,) = absorb_context(backbone, single, ids[:, :8], ids[:, 8:], CONFIG, sink_id=0)
        assert results[row].losses == pytest.approx(result.losses, rel=1e-5)
        for ours, alone in zip(batch.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(ours[row], alone[0], rtol=1e-3, atol=1e-5)


def test_peft_reads_what_we_save(family, tmp_path):
    memory = Memory.fresh(family, sink_id=0, config=CONFIG, stream=STREAM)
    memory.adapter, _ = learned(family)
    memory.save(tmp_path / "memory")
    with memory.applied_to(family):
        ours = logits_of(family, tokens(2, 20))
    assert not torch.equal(ours, logits_of(family.eval(), tokens(2, 20)))
    twin = build(next(name for name, known in ARCHITECTURES.items() if known.config == type(family.config).__name__))
    theirs = logits_of(PeftModel.from_pretrained(twin, tmp_path / "memory").eval(), tokens(2, 20))
    close(ours, theirs)
    again = Memory.load(tmp_path / "memory", family)
    assert all(map(torch.equal, again.adapter.parameters(), memory.adapter.parameters()))
    family.train()


@FAMILIES
def test_we_read_what_peft_saves(name, tmp_path):
    model = build(name)
    backbone = inspect(model)
    suffixes = sorted({projection.rsplit(".", 1)[-1] for projection in backbone.projections})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        theirs = get_peft_model(
            build(name),
            LoraConfig(
                r=3,
                lora_alpha=5,
                target_modules=suffixes,
                init_lora_weights=False,
                use_rslora=True,
                fan_in_fan_out=name == "gpt2",
                task_type="CAUSAL_LM",
            ),
        ).eval()
    theirs.save_pretrained(tmp_path)
    adapter = load_peft(backbone, tmp_path)
    with adapter.attached(backbone):
        close(logits_of(model, tokens(2, 20)), logits_of(theirs, tokens(2, 20)))


def test_a_session_streams_and_generates(family, tokenizer):
    """Long enough for several rounds, with windows longer than what sliding layers see."""
    name = next(key for key, known in ARCHITECTURES.items() if known.config == type(family.config).__name__)
    session = Session(family, tokenizer, CONFIG, STREAM)
    session.append("".join(chr(97 + index % 26) for index in range(45)))
    assert session.memory.num_rounds == 4
    if not ARCHITECTURES[name].keeps_cache:
        with pytest.raises(ModelError, match="keeps no key-value cache"):
            list(session.generate())
        return
    window = list(session.window_ids)
    assert len(window) + 5 < STREAM.window_tokens
    list(session.generate(max_new_tokens=5))
    written = session.window_ids[len(window) :]
    assert written
    for token in written:  # greedily, one whole pass per token
        with session.memory.applied_to(family):
            assert int(logits_of(family, torch.tensor([[0, *window]]))[0, -1].argmax()) == token
        window.append(token)


@FAMILIES
def test_positions_of_the_teacher(name):
    model = build(name)
    backbone, config = inspect(model), CONFIG.replace(positions="teacher")
    adapter = Adapter.fresh(backbone, config)
    input_ids = tokens(1, 24, seed=1)
    arguments = (backbone, adapter, input_ids[:, :8], input_ids[:, 8:])
    if not ARCHITECTURES[name].takes_positions:
        with pytest.raises(ConfigError, match="takes no position ids"):
            absorb_context(*arguments, config, sink_id=5)
        return
    # Some families read the token 0 as nothing, which is nothing from everywhere.
    (moved,) = absorb_context(*arguments, config, sink_id=5)
    (own,) = absorb_context(backbone, Adapter.fresh(backbone, CONFIG), *arguments[2:], CONFIG, sink_id=5)
    assert moved.losses[0] != own.losses[0]


def test_what_cannot_work_says_what_is_missing():
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        inspect(t5)
    with pytest.raises(ModelError, match="lm_head"):
        inspect(build("llama").model)
    with pytest.raises(ModelError, match="a Hugging Face model is needed; got Linear"):
        inspect(nn.Linear(2, 2))
    bare = build("llama")
    bare.model.layers = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(ModelError, match="no linear projections"):
        inspect(bare)
    bare.model.layers = nn.Sequential()
    with pytest.raises(ModelError, match="no list of 3 blocks"):
        inspect(bare)


@FAMILIES
def test_reading_in_pieces_is_reading_at_once(name):
    """Also by models whose state takes in several tokens rightly only at the beginning (Mamba in transformers 5.24)."""
    model = build(name)
    decoder, input_ids = Decoder(inspect(model), read_tokens=5), tokens(1, 23, seed=2)
    if not ARCHITECTURES[name].keeps_cache:
        return
    decoder.read(input_ids[0, :9].tolist())
    decoder.read(input_ids[0, 9:].tolist())
    torch.testing.assert_close(decoder.logits_V, logits_of(model, input_ids)[0, -1], rtol=1e-4, atol=1e-4)
