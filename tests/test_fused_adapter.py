"""Projections that are computed together equal those with hooks; without a GPU in Triton's interpreter."""

import contextlib
import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM, Qwen2Config, Qwen2ForCausalLM

from absorber.adapter import Adapter
from absorber.backbone import (
    altered_by_others,
    checkpointed,
    families,
    forward_states,
    inspect,
    lay_together,
    lying_together,
    untouched,
)
from absorber.config import AbsorbConfig
from absorber.errors import ModelError
from absorber.fused_adapter import together
from absorber.fused_text import fused
from architectures import ARCHITECTURES, SIZES, build

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(kind="llama", *, laid=False):
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen2, which has biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    }[kind]()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model = model.to(DEVICE).eval()
    if laid:
        lay_together(model)
    return inspect(model)


def fresh(backbone, num_streams=1, **settings):
    adapter = Adapter.fresh(backbone, AbsorbConfig(rank=4, **settings), num_streams=num_streams)
    for index, weight in enumerate(adapter.parameters()):
        generator = torch.Generator().manual_seed(index)
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator).to(DEVICE)
    return adapter


def states_and_gradients(backbone, adapter, *, active, rows=None, checkpointing=False, enabled=True):
    """Final states of a pass with a memory, and the gradients of its weights."""
    num_rows = adapter.num_streams if rows is None else len(rows)
    input_ids = torch.arange(num_rows * 12, device=DEVICE).reshape(num_rows, 12) % 50
    adapter.enabled = enabled
    for weight in adapter.parameters():
        weight.grad = None
    by_families = together(backbone, adapter) if active else contextlib.nullcontext()
    with untouched(backbone.model), adapter.attached(backbone), adapter.only(rows), by_families:
        with checkpointed(backbone, active=checkpointing and active):
            final = forward_states(backbone, input_ids).final_BTD
        if enabled:
            final.sin().sum().backward()
    return [final.detach(), *(weight.grad for weight in adapter.parameters() if enabled)]


def assert_equal(backbone, adapter, **how):
    plain = states_and_gradients(backbone, adapter, active=False, **how)
    for ours, twin in zip(states_and_gradients(backbone, adapter, active=True, **how), plain, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("laid", [False, True])
@pytest.mark.parametrize("num_streams", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "qwen2, which has biases"])
def test_families_equal_hooks(kernels_run, kind, num_streams, laid):
    backbone = make(kind, laid=laid)
    before = {name: set(vars(module)) for name, module in backbone.model.named_modules()}
    adapter = fresh(backbone, num_streams, alpha=2.0)
    assert_equal(backbone, adapter)
    assert_equal(backbone, adapter, enabled=False)
    assert {name: set(vars(module)) for name, module in backbone.model.named_modules()} == before
    assert not adapter.elsewhere
    assert not backbone.decoder._forward_pre_hooks


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(kernels_run, name):
    model = build(name).to(DEVICE)
    lay_together(model)
    backbone = inspect(model)
    assert_equal(backbone, fresh(backbone, 2))


@pytest.mark.parametrize("laid", [False, True])
@pytest.mark.parametrize("modules", [None, ("q_proj", "v_proj")])
def test_a_model_that_changes_q_k_and_v_in_place(kernels_run, modules, laid):
    torch.manual_seed(0)
    model = OlmoForCausalLM(OlmoConfig(**SIZES, clip_qkv=0.05)).to(DEVICE).eval()
    if laid:
        lay_together(model)
    backbone = inspect(model)
    assert_equal(backbone, fresh(backbone, target_modules=modules))


@pytest.mark.parametrize("alter", ["hook", "forward"])
def test_what_others_did_to_a_projection_goes_on(kernels_run, alter):
    """A hook that triples what k gives, before the memory is added to it, as outside a round."""
    backbone = make(laid=True)
    projection = backbone.blocks[0].self_attn.k_proj
    if alter == "hook":
        projection.register_forward_hook(lambda module, args, output: 3 * output)
    else:
        usual = projection.forward
        projection.forward = lambda x: 3 * usual(x)
    adapter = fresh(backbone)
    assert_equal(backbone, adapter)
    with untouched(backbone.model), adapter.attached(backbone), together(backbone, adapter):
        assert not any("layers.0.self_attn.q" in name for name in adapter.elsewhere)
        assert any("layers.1.self_attn.q" in name for name in adapter.elsewhere)


def test_siblings_of_other_widths_are_no_family(kernels_run):
    backbone = make()
    attention = backbone.blocks[0].self_attn
    attention.v_proj = torch.nn.Linear(24, 16, bias=False).to(DEVICE)
    lay_together(backbone.model)
    backbone = inspect(backbone.model)
    names = [[name.rpartition(".")[2] for name in family] for family in families(backbone)[:2]]
    assert names == [["q_proj", "k_proj"], ["v_proj"]]
    assert lying_together([torch.ones(8)[:4].view(2, 2), torch.ones(8)[4:].view(1, 4)]) is None
    whole = torch.ones(8)
    assert lying_together([whole[:4].view(2, 2), whole[4:].view(1, 4)]) is None
    assert lying_together([whole[:4].view(2, 2), whole[4:].view(2, 2)]).shape == (4, 2)


def test_some_streams_alone(kernels_run):
    backbone = make()
    assert_equal(backbone, fresh(backbone, 3), rows=torch.tensor([0, 2]))


@pytest.mark.parametrize("rows", [None, torch.tensor([1])])
def test_blocks_that_are_computed_again(kernels_run, rows):
    backbone = make(laid=True)
    assert_equal(backbone, fresh(backbone, 2), rows=rows, checkpointing=True)


def test_projections_without_siblings_in_the_adapter_keep_their_hooks(kernels_run):
    backbone = make()
    adapter = fresh(backbone, target_modules=("q_proj", "o_proj"))
    assert_equal(backbone, adapter)
    with untouched(backbone.model), adapter.attached(backbone), together(backbone, adapter):
        assert {name.rpartition(".")[2] for name in adapter.elsewhere} == {"o_proj"}


def test_a_batch_that_does_not_fit_the_streams_is_refused(kernels_run):
    backbone = make()
    adapter = fresh(backbone, 2)
    three = torch.zeros(3, 4, dtype=torch.long, device=DEVICE)
    refused = pytest.raises(ModelError, match="2 streams, so the batch needs as many rows")
    with untouched(backbone.model), adapter.attached(backbone), together(backbone, adapter), refused:
        forward_states(backbone, three)


def test_it_is_used(kernels_run):
    """As many products of A as there are different inputs."""
    backbone = make(laid=True)
    adapter = fresh(backbone)
    shapes = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default or func is torch.ops.aten.addmm.default:
                shapes.append(tuple(args[-1].shape))
            if func is torch.ops.aten.bmm.default:
                shapes.append(tuple(args[1].shape[1:]))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        states_and_gradients(backbone, adapter, active=True, enabled=False)
    assert shapes.count((32, 64)) == 2 * (1 + 2)  # q, k and v as one, gate, up
    shapes.clear()
    with Count():
        states_and_gradients(backbone, adapter, active=True)
    assert shapes.count((32, 12)) == 2  # A of q, k and v, forward, in each of two blocks


def test_another_input_than_the_siblings_is_not_mistaken(kernels_run):
    backbone = make()
    adapter = fresh(backbone)
    attention = backbone.blocks[0].self_attn
    x, y = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with untouched(backbone.model), adapter.attached(backbone):
        plain = [attention.q_proj(x), attention.k_proj(y), attention.q_proj(y), attention.v_proj(x)]
        with together(backbone, adapter):
            forward_states(backbone, torch.zeros(1, 3, dtype=torch.long, device=DEVICE))  # takes the factors
            ours = [attention.q_proj(x), attention.k_proj(y), attention.q_proj(y), attention.v_proj(x)]
    for mine, twin in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-4, atol=1e-5)


def test_steps_with_it_can_be_recorded(kernels_run):
    backbone = make()
    adapter = fresh(backbone)
    with untouched(backbone.model), adapter.attached(backbone), fused(backbone), together(backbone, adapter):
        assert not altered_by_others(*backbone.decoder.modules())


def test_laying_together_keeps_the_model():
    backbone = make("qwen2, which has biases")
    before = {name: weight.clone() for name, weight in backbone.model.named_parameters()}
    objects = {name: id(weight) for name, weight in backbone.model.named_parameters()}
    ids = torch.arange(12, device=DEVICE)[None]
    logits = backbone.model(ids).logits
    attention = backbone.blocks[1].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert lying_together(weights) is None
    lay_together(backbone.model)
    joint = lying_together(weights)
    assert torch.equal(joint, torch.cat(weights))
    assert joint.data_ptr() == weights[0].data_ptr()
    assert lying_together(weights[1:]) is not None
    assert lying_together(weights[::2]) is None
    assert lying_together(weights[:1]) is None
    for name, weight in backbone.model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.is_contiguous()
        assert id(weight) == objects[name]
    assert torch.equal(backbone.model(ids).logits, logits)
    twin = copy.deepcopy(backbone.model)
    assert torch.equal(twin(ids).logits, logits)


def test_families_are_named_in_order():
    names = [[name.removeprefix("model.layers.1.") for name in family] for family in families(make())[4:]]
    assert names == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_without_kernels_hooks_run():
    if DEVICE == "cpu":
        backbone = make()
        adapter = fresh(backbone)
        with adapter.attached(backbone), together(backbone, adapter):
            assert not adapter.elsewhere
