"""The user's model is bit for bit what it was after every exit: success, failure, interruption, abandonment."""

import copy
from types import SimpleNamespace

import pytest
import torch

import absorber
from absorber.backbone import inspect

CONFIG = absorber.AbsorbConfig(rank=2, max_steps=2, learning_rate=2e-3, warmup_steps=0, hidden_weight=1.0)
STREAM = absorber.StreamConfig(context_tokens=8, sync_tokens=12, max_new_tokens=6)
TEXT = "the quick brown fox jumps over the lazy dog"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@pytest.fixture
def mixed(_tiny):
    """A model with some weights frozen, some gradients there, and one block in training mode."""
    model = copy.deepcopy(_tiny[0])
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    model.model.layers[0].train()
    return model


def state_of(model):
    training = [module.training for module in model.modules()]
    with torch.no_grad():
        logits = model(torch.arange(1, 30)[None], use_cache=False).logits
    return SimpleNamespace(
        weights={name: weight.clone() for name, weight in model.state_dict().items()},
        logits=logits,
        tree=[(name, id(module), type(module)) for name, module in model.named_modules()],
        parameters=[(name, id(weight), weight.requires_grad) for name, weight in model.named_parameters()],
        gradients=[None if weight.grad is None else weight.grad.clone() for weight in model.parameters()],
        training=training,
        hooks=[len(getattr(module, hooks)) for module in model.modules() for hooks in HOOKS],
        forwards=["forward" in vars(module) for module in model.modules()],
    )


def check(model, before):
    after = state_of(model)
    assert torch.equal(after.logits, before.logits)
    assert all(torch.equal(weight, before.weights[name]) for name, weight in after.weights.items())
    assert not any(before.hooks)
    for part in ("tree", "parameters", "training", "hooks", "forwards"):
        assert getattr(after, part) == getattr(before, part), part
    for ours, old in zip(after.gradients, before.gradients, strict=True):
        assert (ours is None and old is None) or torch.equal(ours, old)


def begin(model, tokenizer, **more):
    session = absorber.Session(model, tokenizer, CONFIG, STREAM, **more)
    session.append(TEXT)
    return session


def absorbs(model, tokenizer):
    absorber.absorb(model, tokenizer, TEXT, CONFIG, STREAM)


def asks(model, tokenizer):
    begin(model, tokenizer).ask("who?")


def generates(model, tokenizer):
    list(begin(model, tokenizer).generate("and then?", max_new_tokens=30))


def abandons(model, tokenizer):
    pieces = begin(model, tokenizer).generate()
    next(pieces)
    before = state_of(model)
    next(pieces)
    check(model, before)  # also between two pieces
    pieces.close()


def applies(model, tokenizer):
    memory = absorber.absorb(model, tokenizer, TEXT, CONFIG, STREAM)
    plain = state_of(model).logits
    with memory.applied_to(model):
        assert not any(module.training for module in model.modules())
        assert not torch.equal(state_of(model).logits, plain)
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0)


def applies_and_fails(model, tokenizer):
    memory = absorber.absorb(model, tokenizer, TEXT, CONFIG, STREAM)
    with pytest.raises(ZeroDivisionError), memory.applied_to(model):
        raise ZeroDivisionError


def applies_twice(model, tokenizer):
    memory = absorber.absorb(model, tokenizer, TEXT, CONFIG, STREAM)
    with (
        memory.applied_to(model),
        pytest.raises(absorber.ModelError, match="already applied"),
        memory.applied_to(model),
    ):
        pass


def interrupted(error):
    def run(model, tokenizer):
        def progress(now):
            if now.num_rounds == 1 and now.step == 1:
                raise error

        with pytest.raises(error):
            begin(model, tokenizer, progress=progress)

    return run


def fails_in_a_forward_pass(model, tokenizer):
    """The model itself raises in the middle of the student's pass, with all hooks on."""
    calls = []

    def raising(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.norm.register_forward_pre_hook(raising)
    with pytest.raises(KeyboardInterrupt):
        begin(model, tokenizer)
    hook.remove()


USES = {
    "absorb": absorbs,
    "ask": asks,
    "generate": generates,
    "abandoned": abandons,
    "applied": applies,
    "applied_and_failed": applies_and_fails,
    "applied_twice": applies_twice,
    "exception": interrupted(RuntimeError),
    "ctrl_c": interrupted(KeyboardInterrupt),
    "ctrl_c_in_a_pass": fails_in_a_forward_pass,
}


@pytest.mark.parametrize("name", USES)
def test_the_model_is_untouched(mixed, tokenizer, name):
    before = state_of(mixed)
    USES[name](mixed, tokenizer)
    check(mixed, before)


def test_the_global_random_state_is_untouched(tokenizer):
    before = torch.get_rng_state()
    model, _ = absorber.load("tiny", dtype="float32")
    memory = absorber.absorb(model, tokenizer, TEXT, CONFIG, STREAM)
    session = absorber.Session(model, tokenizer, memory=memory)
    session.ask("who?", temperature=1.0)
    list(session.generate("who?", temperature=1.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_session_is_not_disturbed_by_an_interruption(mixed, tokenizer):
    """What an interruption of a pass leaves in the cache must not be read as the window's."""
    session, twin = begin(mixed, tokenizer), begin(mixed, tokenizer)
    hook = inspect(mixed).blocks[1].register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        session.ask("who?")
    hook.remove()
    assert session.ask("who?") == twin.ask("who?")
    assert session.cache_bytes == twin.cache_bytes
