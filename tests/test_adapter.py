"""The adapter: which projections get one, its stream axis, attaching and detaching."""

import pytest
import torch

from absorber import AbsorbConfig, ConfigError, ModelError
from absorber.adapter import Adapter
from absorber.low_rank import add_low_rank

CONFIG = AbsorbConfig(rank=3)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_a_fresh_adapter_changes_nothing(model, backbone):
    adapter = Adapter.fresh(backbone, CONFIG, num_streams=2)
    ids = torch.arange(1, 21).reshape(2, 10)
    with torch.no_grad():
        plain = model(ids).logits
        with adapter.attached(backbone):
            assert torch.equal(model(ids).logits, plain)
    assert (adapter.rank, adapter.num_streams, adapter.scale) == (3, 2, 1.0)
    assert adapter.num_bytes == 4 * sum(weight.numel() for weight in adapter.parameters())
    for weight in adapter.down.values():
        assert torch.equal(weight[0], weight[1])
        assert 0.5 < weight.abs().max() * weight.shape[-1] ** 0.5 <= 1


def test_by_default_every_linear_of_every_block_has_one(backbone):
    names = list(Adapter.fresh(backbone, CONFIG).down)
    assert sorted(names) == sorted(
        f"model.layers.{layer}.{'self_attn' if suffix[0] in 'qkvo' else 'mlp'}.{suffix}"
        for layer in (0, 1)
        for suffix in LINEARS
    )


def test_a_choice_of_projections_and_layers(backbone):
    config = CONFIG.replace(target_modules=("down_proj", "q_proj"), adapted_layers=(1,))
    adapter = Adapter.fresh(backbone, config)
    assert sorted(adapter.down) == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    with pytest.raises(ConfigError, match="target_modules has nose; this model has down_proj, gate_proj"):
        Adapter.fresh(backbone, CONFIG.replace(target_modules=("q_proj", "nose")))
    with pytest.raises(ConfigError, match="adapted_layers has 2; this model has layers 0 to 1"):
        Adapter.fresh(backbone, CONFIG.replace(adapted_layers=(0, 2)))


def test_alpha_scales(backbone):
    assert Adapter.fresh(backbone, CONFIG.replace(alpha=12.0)).scale == 4.0


@pytest.mark.parametrize("shape", [(3, 5, 4), (15, 4), (3, 2, 5, 4)])
def test_add_low_rank(shape):
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(shape, generator=generator), torch.randn(*shape[:-1], 6, generator=generator)
    down_BRI, up_BOR = torch.randn(3, 2, 4, generator=generator), torch.randn(3, 6, 2, generator=generator)
    given_output = output.clone()
    for scale in (1.0, 2.5):
        added = add_low_rank(output, x, down_BRI, up_BOR, scale=scale)
        assert added.shape == output.shape
        rows = zip(added.reshape(3, -1, 6), output.reshape(3, -1, 6), x.reshape(3, -1, 4), strict=True)
        for b, (ours, plain, inputs) in enumerate(rows):
            torch.testing.assert_close(ours, plain + scale * inputs @ (up_BOR[b] @ down_BRI[b]).T)
        one = add_low_rank(output, x, down_BRI[:1], up_BOR[:1], scale=scale)
        torch.testing.assert_close(one, output + scale * x @ (up_BOR[0] @ down_BRI[0]).T)
    assert torch.equal(output, given_output)
    with torch.no_grad():
        over = add_low_rank(output, x, down_BRI, up_BOR, scale=2.5, over=True)
    torch.testing.assert_close(over, added)
    assert over.data_ptr() == output.data_ptr()
    with pytest.raises(
        ModelError, match="the adapter has 2 streams, so the batch needs as many rows, or a multiple; got"
    ):
        add_low_rank(output, x, down_BRI[:2], up_BOR[:2], scale=1.0)


def test_snapshots_of_some_streams(backbone):
    adapter = Adapter.fresh(backbone, CONFIG, num_streams=3)
    some = torch.tensor([True, False, True])
    saved = adapter.snapshot(some)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.fill_(7.0)
    adapter.restore(saved, some)
    for weight, old in zip(adapter.parameters(), saved, strict=True):
        assert torch.equal(weight[some], old)
        assert (weight[1] == 7).all()
    alone = adapter.stream(1)
    assert (alone.num_streams, alone.alpha) == (1, adapter.alpha)
    with torch.no_grad():
        alone.parameters()[0].zero_()
    assert (adapter.parameters()[0][1] == 7).all()


def test_one_adapter_at_a_time(backbone):
    first, second = (Adapter.fresh(backbone, CONFIG) for _ in range(2))
    with first.attached(backbone), pytest.raises(ModelError, match="already applied"), second.attached(backbone):
        pass
    with second.attached(backbone):
        pass
    second.down["model.layers.9.nose"] = second.parameters()[0]
    with pytest.raises(ModelError, match=r"no projection model\.layers\.9\.nose"), second.attached(backbone):
        pass
    with first.attached(backbone):
        pass


def test_disabled_the_base_speaks(model, backbone):
    adapter, ids = Adapter.fresh(backbone, CONFIG), torch.arange(1, 21)[None]
    with torch.no_grad():
        for weight in adapter.up.values():
            weight.fill_(0.1)
        plain = model(ids).logits
        with adapter.attached(backbone):
            own = model(ids).logits
            with adapter.disabled():
                assert torch.equal(model(ids).logits, plain)
            with pytest.raises(ZeroDivisionError), adapter.disabled():
                raise ZeroDivisionError
            assert torch.equal(model(ids).logits, own)
    assert not torch.equal(own, plain)
