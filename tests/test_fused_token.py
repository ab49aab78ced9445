"""A token through the whole model by few kernels: each equals its twin, and a step equals the model's own."""

import pytest
import torch

from absorber import kernels, kernels_token
from absorber.backbone import inspect
from absorber.decoding import StaticDecoder
from absorber.fused_token import FusedStep, fusable, hooked, plain_attend_new, plain_project, plain_project_gated
from absorber.generation import Decoder
from absorber.kernels_token import Launch, Norm, Products
from absorber.merging import merge
from architectures import build
from test_decoding import QUICK, change, close, learned, on_gpu, tokens

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without a GPU the kernels run in Triton's interpreter, which takes about 10 ms a program: few and large ones."""
    monkeypatch.setattr(kernels, "usable", lambda *tensors: True)
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels_token, "launch_for", lambda inputs, outputs: Launch(128, 32, 4))


def draw(*shape, seed, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def products(inputs, outputs, *, biases=False, rank=0, kind=torch.float32):
    return Products(
        weights=tuple(draw(size, inputs, seed=i, scale=inputs**-0.5).to(kind) for i, size in enumerate(outputs)),
        biases=tuple(draw(size, seed=10 + i).to(kind) for i, size in enumerate(outputs)) if biases else (),
        down_RI=draw(len(outputs) * rank, inputs, seed=20, scale=inputs**-0.5).to(kind) if rank else None,
        ups=tuple(draw(size, rank, seed=30 + i).to(kind) for i, size in enumerate(outputs)) if rank else (),
        scale=0.7,
    )


def norm_of(size, kind, seed=40):
    return Norm((1 + 0.1 * draw(size, seed=seed)).to(kind), 1e-5)


@pytest.mark.parametrize(("kind", "tolerance"), KINDS)
@pytest.mark.parametrize("launch", [Launch(4, 64, 4), Launch(8, 256, 1)])  # several tiles of a row, and one
@pytest.mark.parametrize(
    ("outputs", "more"), [((9,), {}), ((8, 5), {"rank": 3}), ((8, 3, 6), {"biases": True, "rank": 4})]
)
@pytest.mark.parametrize("normed", [True, False])
def test_products_are_those_of_the_twin(monkeypatch, kind, tolerance, launch, outputs, more, normed):
    monkeypatch.setattr(kernels_token, "launch_for", lambda inputs, outputs: launch)
    given, x = products(200, outputs, kind=kind, **more), draw(200, seed=50, scale=3.0).to(kind)
    options = {
        "norm": norm_of(200, kind) if normed else None,
        "residual_O": None if normed else draw(sum(outputs), seed=51).to(kind),
        "dtype": torch.float32 if normed else None,
    }
    ours, theirs = kernels_token.project(x, given, **options), plain_project(x, given, **options)
    assert ours.dtype == theirs.dtype
    close(ours, theirs, 3 * tolerance)


@pytest.mark.parametrize(("kind", "tolerance"), KINDS)
@pytest.mark.parametrize("more", [{}, {"rank": 3, "biases": True}])
@pytest.mark.parametrize("inputs", [64, 200])
def test_gated_products_are_those_of_the_twin(monkeypatch, kind, tolerance, more, inputs):
    monkeypatch.setattr(kernels_token, "launch_for", lambda inputs, outputs: Launch(4, 64, 4))
    given, x = products(inputs, (10, 10), kind=kind, **more), draw(inputs, seed=50).to(kind)
    norm = norm_of(inputs, kind)
    close(kernels_token.project_gated(x, given, norm), plain_project_gated(x, given, norm), 3 * tolerance)


@pytest.mark.parametrize(("kind", "tolerance"), KINDS)
@pytest.mark.parametrize(("heads", "key_heads", "place"), [(4, 4, 0), (4, 2, 63), (4, 2, 64), (2, 1, 130), (2, 2, 199)])
@pytest.mark.parametrize("normed", [True, False])
def test_a_new_token_attends_as_with_the_twin(kind, tolerance, heads, key_heads, place, normed):
    qkv = draw((heads + 2 * key_heads) * 16, seed=1).to(kind)
    angle = draw(8, seed=2).repeat(2)
    keys, values = (draw(key_heads, 200, 16, seed=seed).to(kind) for seed in (3, 4))
    keys[:, place:] = torch.nan  # neither what is written now nor what is behind it is read
    at = torch.tensor([place], device=DEVICE)
    norms = (norm_of(16, kind, seed=5), norm_of(16, kind, seed=6)) if normed else None
    results = []
    for attend, filled in ((kernels_token.attend_new, keys), (plain_attend_new, keys.nan_to_num())):
        own, written = filled.clone(), values.clone()
        out = attend(qkv, angle.cos(), angle.sin(), own, written, at, scale=0.3, norms=norms)
        results.append((out, own[:, : place + 1], written))
        assert torch.equal(own[:, place + 1 :].isnan(), filled[:, place + 1 :].isnan())
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, tolerance)


@pytest.mark.parametrize("way", ["none", "beside", "merged"])
@pytest.mark.parametrize("name", QUICK)
def test_a_step_is_that_of_the_model(name, way):
    backbone = inspect(build(name).to(DEVICE))
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    adapter = None if way == "none" else learned(backbone)
    quick = StaticDecoder(
        backbone, read_tokens=7, capacity=32, adapter=adapter, way="merged" if way == "merged" else "beside"
    )
    slow = Decoder(backbone, read_tokens=7, adapter=adapter)
    for seed in range(2):  # the second time with a memory that has learned more, in the same tensors
        ids = tokens(14, seed)[0].tolist()
        for decoder in (quick, slow):
            decoder.reset()
            decoder.read(ids)
        assert quick.write(3) == slow.write(3)
        close(quick.logits_V, slow.logits_V, 1e-4)
        if adapter is not None:
            change(adapter, seed=7)
    assert quick._fused is not None
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.model.state_dict().items())
    assert all("forward" not in vars(module) and not module._forward_hooks for module in backbone.model.modules())


def test_mistral_without_windows_is_fused():
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, sliding_window=None, vocab_size=257,
    )  # fmt: skip
    backbone = inspect(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(DEVICE))
    quick, slow = (
        kind(backbone, read_tokens=9, **more) for kind, more in ((StaticDecoder, {"capacity": 32}), (Decoder, {}))
    )
    for decoder in (quick, slow):
        decoder.read(tokens(9)[0].tolist())
    assert quick.write(3) == slow.write(3)
    assert quick._fused is not None


def test_in_bfloat16_a_step_is_near_that_of_the_model_in_float32():
    exact, rounded = inspect(build("llama").to(DEVICE)), inspect(build("llama").to(DEVICE).bfloat16())
    logits = []
    for backbone in (exact, rounded):
        decoder = StaticDecoder(backbone, read_tokens=20, capacity=32)
        decoder.read(tokens(20)[0].tolist())
        decoder.read([5])
        logits.append(decoder.logits_V)
    assert (logits[0] - logits[1]).abs().max() < 0.03 * logits[0].abs().max()


def test_a_memory_of_some_projections_and_layers():
    from absorber.adapter import Adapter
    from absorber.config import AbsorbConfig

    backbone = inspect(build("llama").to(DEVICE))
    config = AbsorbConfig(rank=3, target_modules=("v_proj", "down_proj"), adapted_layers=(1,))
    adapter = Adapter.fresh(backbone, config)
    change(adapter, seed=0)
    quick = StaticDecoder(backbone, read_tokens=9, capacity=32, adapter=adapter)
    slow = Decoder(backbone, read_tokens=9, adapter=adapter)
    for decoder in (quick, slow):
        decoder.read(tokens(9)[0].tolist())
    assert quick.write(4) == slow.write(4)
    close(quick.logits_V, slow.logits_V, 1e-4)


def test_hooks_of_others_are_obeyed():
    backbone = inspect(build("llama").to(DEVICE))
    decoder = StaticDecoder(backbone, read_tokens=9, capacity=32)
    decoder.read([1, 2, 3])
    called = []
    handle = backbone.blocks[1].mlp.register_forward_hook(lambda *args: called.append(1))
    assert hooked(backbone)
    decoder.read([4])
    assert called
    handle.remove()
    assert not hooked(backbone)
    decoder.read([5])
    assert len(called) == 1
    backbone.model(tokens(3).to(DEVICE), output_hidden_states=True)  # after which transformers leaves hooks of its own
    assert not hooked(backbone)


@pytest.mark.parametrize("way", ["beside", "merged"])
def test_a_step_by_twins_is_that_of_kernels(monkeypatch, way):
    backbone = inspect(build("qwen3").to(DEVICE))
    adapter, merged = learned(backbone), {}
    if way == "merged":
        merge(backbone, adapter, merged)
    results = []
    for usable in (True, False):
        monkeypatch.setattr(kernels, "usable", lambda *tensors, usable=usable: usable)
        step = FusedStep(backbone, merged, adapter if way == "beside" else None)
        place = "cuda" if DEVICE == "cuda" else "cpu"
        layers = [type("Layer", (), {})() for _ in backbone.blocks]
        for layer in layers:
            layer.keys, layer.values = (torch.zeros(1, 2, 64, 8, device=place) for _ in range(2))
        with torch.no_grad():
            for at in range(3):
                logits = step(torch.tensor([[at + 5]], device=place), torch.tensor([at], device=place), layers)
        results.append(logits)
    close(*results, 1e-4)


def test_what_is_not_fused(monkeypatch):
    assert fusable(inspect(build("llama")))
    other = build("llama")
    other.config.hidden_act = "gelu"
    assert not fusable(inspect(other))
    other = build("llama")
    other.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))
    assert not fusable(inspect(other))
    monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
    assert not fusable(inspect(build("llama")))


@on_gpu
@pytest.mark.parametrize("way", ["beside", "merged"])
def test_a_recorded_step_gives_the_same_bits_each_time(way):
    backbone = inspect(build("llama").to("cuda"))
    adapter = learned(backbone)
    quick = StaticDecoder(backbone, read_tokens=8, capacity=64, adapter=adapter, way=way)
    slow = Decoder(backbone, read_tokens=8, adapter=adapter)
    slow.read(tokens(20)[0].tolist())
    expected, logits = slow.write(12), []
    for _ in range(3):
        quick.reset()
        quick.read(tokens(20)[0].tolist())
        assert quick.write(12) == expected
        logits.append(quick.logits_V.clone())
    close(logits[0], slow.logits_V, 1e-3)
    assert torch.equal(logits[1], logits[2])
    assert quick._graph is not None


@on_gpu
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, (4096, 1024, 1024)), (11008, (4096,)), (4096, (64,))])
def test_products_at_full_size(inputs, outputs):
    given = products(inputs, outputs, rank=64, kind=torch.bfloat16)
    x, norm = draw(inputs, seed=50).bfloat16(), norm_of(inputs, torch.bfloat16)
    close(kernels_token.project(x, given, norm=norm), plain_project(x, given, norm=norm), 3e-2)
