"""The quicker parts of a pass equal the model's own, in values and gradients; without a GPU in Triton's interpreter."""

import contextlib

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from absorber import kernels_text
from absorber.adapter import Adapter
from absorber.backbone import checkpointed, forward_states, inspect, untouched
from absorber.config import AbsorbConfig
from absorber.fused_text import fused, gated, rotate
from architectures import SIZES

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()


def close(ours, plain):
    tolerance = 2e-2 if plain.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1, 2048), (3, 700)])
def test_gated(shape, dtype):
    gate, up = (random(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
    slope = random(*shape, seed=3, dtype=dtype).detach()
    plain = nn.functional.silu(gate) * up
    ours = gated(gate, up)
    close(ours, plain)
    for mine, theirs in zip(*(torch.autograd.grad(y, (gate, up), slope) for y in (ours, plain)), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "angle_rows", "heads"), [(2, 1, 3), (2, 2, 4), (1, 1, 9)])
def test_rotate(rows, angle_rows, heads, dtype):
    x_BTHE = random(rows, 6, heads, 8, dtype=dtype)
    angles = random(angle_rows, 6, 4, seed=1).detach().repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slope = random(rows, heads, 6, 8, seed=2, dtype=dtype).detach()
    x = x_BTHE.transpose(1, 2)  # as a projection gives it
    plain, _ = apply_rotary_pos_emb(x, x, cos, sin)
    ours = rotate(x, cos, sin)
    close(ours, plain)
    close(*(torch.autograd.grad(y, x_BTHE, slope)[0] for y in (ours, plain)))


def test_the_gradient_of_rotate_takes_any_strides():
    x = random(1, 3, 6, 8)
    angles = random(1, 6, 4, seed=1).detach().repeat(1, 1, 2)
    turned = kernels_text.rotate(x.detach().mT.contiguous().mT, angles.cos(), angles.sin())
    close(turned, apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())[0].detach())


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
        "gelu": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")),
    }[kind]()
    return inspect(model.to(DEVICE, dtype).eval())


def states_and_gradients(backbone, num_streams, *, active, checkpointing=False):
    """Final states of a pass with a memory, and the gradients of its weights."""
    adapter = Adapter.fresh(backbone, AbsorbConfig(rank=4), num_streams=num_streams)
    for index, up in enumerate(adapter.up.values()):
        up.data += 0.1 * random(*up.shape, seed=index).detach()
    input_ids = torch.arange(num_streams * 12, device=DEVICE).reshape(num_streams, 12) % 50
    with (
        untouched(backbone.model),
        adapter.attached(backbone),
        fused(backbone) if active else contextlib.nullcontext(),
    ):
        with checkpointed(backbone, active=checkpointing):
            final = forward_states(backbone, input_ids).final_BTD
        (final.float().sin().sum()).backward()
    return [final.detach(), *(weight.grad for weight in adapter.parameters())]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gelu"])
@pytest.mark.parametrize("num_streams", [1, 2])
def test_a_model_with_quicker_parts_is_the_same_model(request, kind, num_streams):
    backbone = make(kind)
    plain = states_and_gradients(backbone, num_streams, active=False)
    request.getfixturevalue("kernels_run")
    before = {name: set(vars(module)) for name, module in backbone.model.named_modules()}
    for ours, twin in zip(states_and_gradients(backbone, num_streams, active=True), plain, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-5)
    assert {name: set(vars(module)) for name, module in backbone.model.named_modules()} == before


def test_blocks_that_are_computed_again_use_the_same_parts(kernels_run):
    backbone = make("llama")
    kept, again = (states_and_gradients(backbone, 1, active=True, checkpointing=on) for on in (False, True))
    assert all(torch.equal(one, two) for one, two in zip(kept, again, strict=True))


def test_the_parts_are_used(kernels_run, monkeypatch):
    used = []
    for name in ("gated", "rotate"):
        run = getattr(kernels_text, name)
        monkeypatch.setattr(
            kernels_text, name, lambda *args, run=run, name=name, **more: used.append(name) or run(*args, **more)
        )
    states_and_gradients(make("llama"), 1, active=True)
    assert used.count("gated") == 2
    assert used.count("rotate") == 8  # queries and keys of two blocks, there and back
    used.clear()
    states_and_gradients(make("gelu"), 1, active=True)
    assert "gated" not in used


def test_without_kernels_nothing_is_replaced():
    backbone = make("llama")
    before = [module.forward for module in backbone.model.modules()]
    if DEVICE == "cpu":
        with fused(backbone):
            assert [module.forward for module in backbone.model.modules()] == before
