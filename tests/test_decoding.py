"""The quick decoder against its slow twin: the same tokens and logits, whatever was read, forgotten or learned."""

import pytest
import torch

import absorber.decoding
from absorber import ContextError, Session, StreamConfig, kernels
from absorber.adapter import Adapter
from absorber.backbone import inspect
from absorber.config import AbsorbConfig
from absorber.decoding import StaticDecoder, new_decoder, usable
from absorber.errors import ConfigError
from absorber.generation import Decoder
from absorber.merging import merge
from absorber.one_token import attend_one, one_token
from architectures import ARCHITECTURES, build

QUICK = ("llama", "qwen2", "qwen3")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def tokens(length, seed=0, rows=1):
    return torch.randint(1, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


def learned(backbone, num_streams=1, seed=0):
    """An adapter that changes something."""
    adapter = Adapter.fresh(backbone, AbsorbConfig(rank=3, alpha=6.0), num_streams=num_streams)
    change(adapter, seed)
    return adapter


def change(adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for up in adapter.up.values():  # drawn on the CPU, the same for every device
            up.copy_(0.05 * torch.randn(up.shape, generator=generator))


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_which_models_it_decodes(name):
    backbone = inspect(build(name))
    assert usable(backbone) == (name in QUICK)
    decoder = new_decoder(backbone, read_tokens=7, capacity=40)
    assert isinstance(decoder, StaticDecoder if name in QUICK else Decoder)


@pytest.mark.parametrize("way", ["beside", "merged"])
@pytest.mark.parametrize("name", QUICK)
def test_tokens_and_logits_are_those_of_the_twin(name, way):
    backbone = inspect(build(name))
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    adapter = learned(backbone)
    quick = StaticDecoder(backbone, read_tokens=7, capacity=32, adapter=adapter, way=way)
    slow = Decoder(backbone, read_tokens=7, adapter=adapter)
    ids = tokens(20)[0].tolist()
    for decoder in (quick, slow):
        decoder.read(ids)
    close(quick.logits_V, slow.logits_V)
    for count in (1, 5, 20):  # the last makes the cache grow
        assert quick.write(count) == slow.write(count)
        close(quick.logits_V, slow.logits_V)
    for decoder in (quick, slow):
        decoder.read([5])
        decoder.read([6, 7, 8])
    close(quick.logits_V, slow.logits_V)
    assert quick.num_tokens == slow.num_tokens == 50
    assert quick.cache_bytes == slow.cache_bytes <= quick.allocated_bytes
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.model.state_dict().items())


def test_rows_with_memories_of_their_own():
    backbone = inspect(build("llama"))
    adapter = learned(backbone, num_streams=3)
    ids = tokens(12, rows=3)
    quick = StaticDecoder(backbone, read_tokens=5, capacity=24, adapter=adapter, num_rows=3)
    quick.read_rows(ids)
    written = quick.write_rows(6)
    for row in range(3):
        slow = Decoder(backbone, read_tokens=5, adapter=adapter.stream(row))
        slow.read(ids[row].tolist())
        assert written[row].tolist() == slow.write(6)
        close(quick.logits_BV[row], slow.logits_V)
    with pytest.raises(ConfigError, match="not 3"):
        StaticDecoder(backbone, read_tokens=5, capacity=24, adapter=adapter, num_rows=3, way="merged")


@pytest.mark.parametrize("way", ["beside", "merged"])
def test_a_memory_that_learned_speaks_from_the_same_tensors(way):
    backbone = inspect(build("llama"))
    adapter = learned(backbone)
    quick = StaticDecoder(backbone, read_tokens=8, capacity=32, adapter=adapter, way=way)
    quick.read(tokens(9)[0].tolist())
    held = quick._beside.parameters() if way == "beside" else list(quick._merged.values())
    addresses = [tensor.data_ptr() for tensor in [*held, quick._layers[0].keys, quick._logits_BV]]
    change(adapter, seed=1)
    quick.reset()
    quick.read(tokens(9)[0].tolist())
    assert addresses == [tensor.data_ptr() for tensor in [*held, quick._layers[0].keys, quick._logits_BV]]
    slow = Decoder(backbone, read_tokens=8, adapter=adapter)
    slow.read(tokens(9)[0].tolist())
    close(quick.logits_V, slow.logits_V)


@pytest.mark.parametrize("kind", [StaticDecoder, Decoder])
def test_what_is_read_aside_is_forgotten(kind):
    backbone = inspect(build("llama"))
    more = {"capacity": 16} if kind is StaticDecoder else {}
    decoder = kind(backbone, read_tokens=8, **more)
    with decoder.aside():
        decoder.read([1, 2])
    with pytest.raises(ContextError, match="nothing to continue"):
        _ = decoder.logits_V
    decoder.read([3, 4, 5])
    logits = decoder.logits_V.clone()
    with decoder.aside():
        decoder.read([6, 7])
        decoder.write(20)
    assert decoder.num_tokens == 3
    assert torch.equal(decoder.logits_V, logits)
    expected = decoder.write(4)
    decoder.read_all([3, 4, 5, 9])
    decoder.read_all([3, 4, 5])
    close(decoder.logits_V, logits)
    assert decoder.write(4) == expected


def test_only_what_differs_is_read_again(monkeypatch):
    backbone = inspect(build("llama"))
    decoder = StaticDecoder(backbone, read_tokens=8, capacity=32)
    decoder.read_all([1, 2, 3, 4])
    decoder.write(3)
    pieces = []
    usual = StaticDecoder._read_piece
    monkeypatch.setattr(StaticDecoder, "_read_piece", lambda self, ids: (pieces.append(ids.tolist()), usual(self, ids)))
    decoder.read_all([1, 2, 3, 4, 9, 8, 7])
    assert pieces == [[[9, 8, 7]]]


def test_an_error_in_the_model_leaves_nothing_half_read(monkeypatch):
    backbone = inspect(build("llama"))
    decoder = StaticDecoder(backbone, read_tokens=8, capacity=32)
    decoder.read([1, 2, 3])
    expected = decoder.logits_V.clone()

    def fail(*args):
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(StaticDecoder, "_run", fail)
        with pytest.raises(RuntimeError), decoder.aside():
            decoder.write(1)
    assert decoder.num_tokens == 0
    decoder.read([1, 2, 3])
    close(decoder.logits_V, expected)
    with pytest.raises(ContextError, match="positions"):
        decoder.read(tokens(200)[0].tolist())


def test_the_model_is_put_back_after_a_step():
    backbone = inspect(build("llama"))
    backbone.model.train()
    decoder = StaticDecoder(backbone, read_tokens=8, capacity=32, adapter=learned(backbone))
    decoder.read([1, 2])
    decoder.write(2)
    config = backbone.model.config
    assert config._attn_implementation == "sdpa"
    assert all(module.training and not module._forward_hooks for module in backbone.model.modules())
    assert all(parameter.requires_grad for parameter in backbone.model.parameters())
    assert all("forward" not in vars(module) for module in backbone.model.modules())


@pytest.mark.parametrize(("heads", "key_heads", "place"), [(4, 4, 0), (4, 4, 63), (4, 2, 64), (8, 2, 150), (2, 1, 199)])
def test_the_kernel_attends_as_its_twin(heads, key_heads, place):
    pytest.importorskip("triton")
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, 16, generator=draw)
    keys, values = (torch.randn(2, key_heads, 200, 16, generator=draw) for _ in range(2))
    keys[:, :, place + 1 :] = torch.nan  # the kernel does not read them
    if not kernels.usable(query) and torch.cuda.is_available():
        query, keys, values = query.cuda(), keys.cuda(), values.cuda()
    at = torch.tensor([place], device=query.device)
    ours = kernels.attend_one(query, keys, values, at, 0.3)
    close(ours, attend_one(query, keys.nan_to_num(), values, at, 0.3))


def test_the_kernel_rotates_as_the_model_does():
    pytest.importorskip("triton")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    place = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 1, 24, generator=draw).to(place) for heads in (4, 2))
    cos, sin = (torch.randn(1, 1, 24, generator=draw).to(place) for _ in range(2))
    for ours, theirs in zip(
        kernels.rotate_one(query, key, cos, sin), apply_rotary_pos_emb(query, key, cos, sin), strict=True
    ):
        close(ours, theirs)


def test_a_model_reads_several_tokens_as_usual_among_the_quick_parts():
    backbone = inspect(build("qwen3"))
    expected = backbone.model(tokens(9)).logits
    module = __import__("sys").modules[type(backbone.blocks[0]).__module__]
    before = module.apply_rotary_pos_emb
    with one_token(backbone, torch.zeros(1, dtype=torch.long)):
        assert module.apply_rotary_pos_emb is not before
        backbone.model.config._attn_implementation = "sdpa"
        close(backbone.model(tokens(9)).logits, expected)
    assert module.apply_rotary_pos_emb is before


@pytest.mark.parametrize("by_kernel", [False, True])
def test_merging_in_bfloat16_keeps_small_changes_in_the_mean(by_kernel, monkeypatch):
    merged_by_kernel = []
    if by_kernel:
        pytest.importorskip("triton")
        kernel = kernels.merge_rounded
        monkeypatch.setattr(kernels, "usable", lambda *tensors: True)
        monkeypatch.setattr(
            kernels, "merge_rounded", lambda *given, seed: merged_by_kernel.append(seed) or kernel(*given, seed=seed)
        )
    place = "cuda" if by_kernel and torch.cuda.is_available() else "cpu"
    backbone = inspect(build("llama").bfloat16().to(place))
    adapter = learned(backbone)
    with torch.no_grad():
        for up in adapter.up.values():
            up.mul_(1e-3)  # far below half a step of most weights
    merged = {}
    merge(backbone, adapter, merged)
    along = wanted = nearest = 0.0
    for name in adapter.down:
        weight = backbone.projections[name].weight.detach().float()
        change = (adapter.up[name][0] @ adapter.down[name][0]).detach() * adapter.scale
        got = merged[f"{name.removeprefix('model.')}.weight"].float() - weight
        along += float((got * change).sum())
        nearest += float((((weight + change).bfloat16().float() - weight) * change).sum())
        wanted += float((change * change).sum())
    assert merged_by_kernel == (list(range(len(adapter.down))) if by_kernel else [])
    assert along / wanted == pytest.approx(1, abs=0.3)
    assert nearest / wanted < 0.3  # what rounding to the nearest leaves of them


def test_merging_rounds_to_a_neighbour_and_to_the_same_one_each_time():
    backbone = inspect(build("llama").bfloat16())
    adapter, merged, again = learned(backbone), {}, {}
    for target in (merged, again):
        merge(backbone, adapter, target)
    places = {name: weight.data_ptr() for name, weight in again.items()}
    merge(backbone, adapter, again)
    generator = torch.Generator().manual_seed(0)
    for name in adapter.down:
        key = f"{name.removeprefix('model.')}.weight"
        assert torch.equal(again[key], merged[key])
        assert again[key].data_ptr() == places[key]
        weight = backbone.projections[name].weight.detach().float()
        exact = weight.addmm(adapter.up[name][0], adapter.down[name][0], alpha=adapter.scale).detach()
        noise = torch.randint(0, 2**16, exact.shape, dtype=torch.int32, generator=generator)
        rounded = exact.view(torch.int32).add(noise).bitwise_and(-(2**16)).view(torch.float32)
        assert torch.equal(merged[key].float(), rounded)
        assert bool(((merged[key].float() - exact).abs() <= exact.abs() * 2**-7).all())


def test_a_fresh_memory_merges_to_the_base():
    backbone = inspect(build("llama").bfloat16())
    merged = {}
    merge(backbone, Adapter.fresh(backbone, AbsorbConfig(rank=3)), merged)
    state = backbone.decoder.state_dict()
    assert merged
    assert all(torch.equal(weight, state[name]) for name, weight in merged.items())


def test_other_devices_have_the_twin(backbone, monkeypatch):
    assert usable(backbone)
    monkeypatch.setattr(type(backbone), "device", property(lambda self: torch.device("mps")))
    assert not usable(backbone)


def test_without_triton_the_twins_run(backbone, monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    assert not kernels.usable_on("cuda")
    assert not kernels.usable(torch.zeros(1))
    quick, slow = StaticDecoder(backbone, read_tokens=8, capacity=32), Decoder(backbone, read_tokens=8)
    for decoder in (quick, slow):
        decoder.read([1, 2, 3])
    assert quick.write(5) == slow.write(5)


# --- In a session


STREAM = StreamConfig(context_tokens=8, sync_tokens=12, max_new_tokens=40, read_tokens=16)


@pytest.mark.parametrize(("ahead", "merged"), [(1, False), (16, False), (16, True)])
def test_a_session_writes_as_with_the_twin(model, tokenizer, config, text, monkeypatch, ahead, merged):
    def run(temperature):
        with Session(model, tokenizer, config, STREAM, merged=merged) as session:
            if hasattr(session._decoder, "allocated_bytes"):
                session._decoder.ahead = ahead
            session.append(text)
            answer = session.ask("who?", temperature=temperature)
            written = []
            for piece in session.generate(temperature=temperature):
                written.append(piece)
                if len(written) == 5:
                    session.append("!")  # what was written ahead does not follow it
            unfinished = session.generate(temperature=temperature)
            written += [next(unfinished), next(unfinished)]
            return answer, written, session.ask("who?"), session.window_ids, session.memory.num_rounds

    for temperature in (0.0, 1.0):
        quick = run(temperature)
        with monkeypatch.context() as patch:
            patch.setattr(absorber.decoding, "usable", lambda backbone: False)
            assert run(temperature) == quick


def test_a_closed_gate_lets_the_base_answer(model, tokenizer, config, text, monkeypatch):
    monkeypatch.setattr(Session, "_memory_helps", lambda self, question, rule: False)

    def run():
        with Session(model, tokenizer, config, STREAM) as session:
            session.append(text)
            answers = [session.ask("who?") for _ in range(2)]
            change(session.memory.adapter, seed=3)
            assert session.ask("who?") == answers[0] == answers[1]
            session.append(text)
            return [*answers, session.ask("who?")]

    quick = run()
    monkeypatch.setattr(absorber.decoding, "usable", lambda backbone: False)
    assert run() == quick


@on_gpu
@pytest.mark.parametrize("place", [0, 63, 64, 1500, 4095])
def test_the_kernel_at_full_size(place):
    draw = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(8, 32, 128, generator=draw, device="cuda").bfloat16()
    keys, values = (torch.randn(8, 8, 4096, 128, generator=draw, device="cuda").bfloat16() for _ in range(2))
    at = torch.tensor([place], device="cuda")
    expected = attend_one(query.float(), keys.float(), values.float(), at, 0.1)
    close(kernels.attend_one(query, keys, values, at, 0.1).float(), expected, 2e-2)


@on_gpu
def test_recorded_rows_have_memories_of_their_own():
    backbone = inspect(build("qwen2").to("cuda"))
    adapter = learned(backbone, num_streams=3)
    quick = StaticDecoder(backbone, read_tokens=8, capacity=64, adapter=adapter, num_rows=3)
    quick.read_rows(tokens(12, rows=3))
    written = quick.write_rows(20)
    assert quick._graph is not None
    for row in range(3):
        slow = Decoder(backbone, read_tokens=8, adapter=adapter.stream(row))
        slow.read(tokens(12, rows=3)[row].tolist())
        assert written[row].tolist() == slow.write(20)


@on_gpu
@pytest.mark.parametrize("way", ["beside", "merged"])
def test_a_recorded_step_says_what_a_usual_one_says(way):
    backbone = inspect(build("llama").to("cuda"))
    adapter = learned(backbone)
    quick = StaticDecoder(backbone, read_tokens=8, capacity=64, adapter=adapter, way=way)
    slow = Decoder(backbone, read_tokens=8, adapter=adapter)
    for seed in range(3):  # the second and third with the graph of the first
        change(adapter, seed)
        for decoder in (quick, slow):
            decoder.reset()
            decoder.read(tokens(20, seed)[0].tolist())
        assert quick.write(12) == slow.write(12)
        close(quick.logits_V, slow.logits_V, 1e-3)
        with quick.aside():
            quick.read([1, 2, 3])
            quick.write(5)
        assert quick.write(4) == slow.write(4)
    assert quick._graph is not None
    assert quick._window.graph is not None  # the first eight tokens, read for the second time
