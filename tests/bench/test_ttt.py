"""Fast weights as a method: nothing at scale zero, constant in memory, no trace in the model, on many families."""

import pytest
import torch

from absorber.backbone import inspect, sink_token
from absorber.bench.methods import TTT, Setting, method
from absorber.bench.retention import Retention
from absorber.config import StreamConfig
from absorber.errors import ConfigError, ModelError
from architectures import build

TASK = Retention(num_rounds=2, num_streams=2, context_tokens=16, sync_tokens=32, passage_tokens=16)


def reader_of(model, way, *, num_streams=2):
    stream = StreamConfig(context_tokens=16, sync_tokens=32)
    where = Setting(backbone=inspect(model), stream=stream, sink_id=0, num_streams=num_streams, seed=0)
    return way.begin(where)


def some_text(num_tokens, *, num_streams=2):
    return torch.randint(1, 256, (num_streams, num_tokens), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def texts(model, tokenizer, tmp_path):
    for book in range(4):
        lines = [f"Book {book}, line {line}: the {line * 7 % 13} ships sailed.\n" for line in range(60)]
        (tmp_path / f"book{book}.txt").write_text("".join(lines))
    return TASK.prepare(model, tokenizer, tmp_path, drift_kinds=("code",))


def test_at_scale_zero_it_is_truncation_and_otherwise_not(model, tokenizer, texts):
    found = {}
    for name, way in {"none": method("truncation"), "zero": TTT(scale=0.0), "own": TTT(scale=0.5)}.items():
        measured = TASK.measure(way, inspect(model), texts, sink_id=sink_token(model, tokenizer))
        found[name] = [checkpoint.metrics for checkpoint in measured]
    assert found["zero"] == found["none"]
    for own, none in zip(found["own"], found["none"], strict=True):
        assert own["full_nll"] == none["full_nll"]
        for metric in ("windowed_nll", "contextless_nll", "drift_nll/code"):
            assert all(a != b for a, b in zip(own[metric], none[metric], strict=True))


def test_what_is_in_the_window_is_not_learned(model):
    reader = reader_of(model, TTT())
    reader.read(some_text(32))
    assert not any(weight.any() for weight in reader.weights)


def test_it_learns_to_reconstruct(model):
    """Read with the keys of a text it has learned, a fast weight gives that text's values, better than zero does."""
    reader, text_BT = reader_of(model, TTT(batch_tokens=1)), some_text(6)
    layer = inspect(model).blocks[0].self_attn
    seen = {}
    handles = [
        projection.register_forward_hook(lambda module, args, output, name=name: seen.setdefault(name, output))
        for name, projection in (("key", layer.k_proj), ("value", layer.v_proj))
    ]
    for _ in range(30):
        reader._learn(text_BT)
    for handle in handles:
        handle.remove()
    weight_BGEK = reader.weights[0]
    keys, values = (seen[name][:, 1:].unflatten(2, (weight_BGEK.shape[1], -1)) for name in ("key", "value"))
    found = torch.einsum("bgek,btgk->btge", weight_BGEK, torch.nn.functional.normalize(keys, dim=-1))
    assert (found - values).pow(2).sum() < 0.1 * values.pow(2).sum()


def test_memory_does_not_grow_and_streams_do_not_mix(model):
    text_BT = some_text(32 + 16 * 6)
    both, other = reader_of(model, TTT()), reader_of(model, TTT())
    changed_BT = text_BT.clone()
    changed_BT[1] = changed_BT[1].flip(0)
    sizes = set()
    for start, end in ((0, 32), *((32 + 16 * n, 48 + 16 * n) for n in range(6))):
        both.read(text_BT[:, start:end])
        other.read(changed_BT[:, start:end])
        sizes.add((sum(weight.numel() for weight in both.weights), both.recent_BT.shape))
    assert len(sizes) == 1
    for one, two in zip(both.weights, other.weights, strict=True):
        assert torch.allclose(one[0], two[0], atol=1e-6)
        assert not torch.allclose(one[1], two[1], atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "granite"])
def test_families_with_projections_of_their_own(family):
    model = build(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids_BT = some_text(12)
    with torch.no_grad():
        plain = model(ids_BT).logits
        for scale in (0.0, 0.5):
            reader = reader_of(model, TTT(scale=scale))
            reader.read(some_text(64))
            with reader.speaking():
                assert torch.equal(model(ids_BT).logits, plain) == (scale == 0)
        assert torch.equal(model(ids_BT).logits, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "mamba"])
def test_other_families_are_refused(family):
    with pytest.raises(ModelError, match="q_proj, k_proj, v_proj and o_proj"):
        reader_of(build(family), TTT())


@pytest.mark.parametrize(
    "values", [{"learning_rate": 2.0}, {"learning_rate": 0.0}, {"scale": -1.0}, {"batch_tokens": 0}]
)
def test_bad_settings_are_errors(values):
    with pytest.raises(ConfigError, match="learning_rate is above 0 and below 2"):
        TTT(**values)
