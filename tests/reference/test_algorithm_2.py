"""Algorithm 2 equals its twin: rounds over input and generated text, end-of-sequence, the window, the weights."""

import copy

import pytest
import torch

import absorber.stream
from absorber import PRESETS, AbsorbConfig, Session, StreamConfig
from reference import algorithms as twin
from reference.lora import PlainLora

N, M = 8, 12
DEFAULT = AbsorbConfig(
    rank=2, max_steps=2, learning_rate=2e-3, warmup_steps=0, segments=(1,), replay_rounds=0, anchor_share=0.0
)
PAPER = PRESETS["paper"].absorb.replace(rank=2, max_steps=2, threshold=0.01)


@pytest.fixture
def double(_tiny):
    return copy.deepcopy(_tiny[0]).double()


@pytest.fixture
def rounds(monkeypatch):
    """The (X, Y) of every round of the library."""
    seen = []
    absorb_context = absorber.stream.absorb_context

    def recorded(backbone, adapter, context_BN, subsequent_BM, *args, **kwargs):
        seen.append((context_BN[0].tolist(), subsequent_BM[0].tolist()))
        return absorb_context(backbone, adapter, context_BN, subsequent_BM, *args, **kwargs)

    monkeypatch.setattr(absorber.stream, "absorb_context", recorded)
    return seen


def deduced(model, lora, token_ids, config, *, eos_ids, max_new_tokens):
    """The twin's rounds, text and window."""
    sink, rounds = [0] if config.sink == "shared" else [], []

    def next_token(window):
        with torch.no_grad():
            return int(lora.run(model, input_ids=torch.tensor([sink + window])).logits[0, -1].argmax())

    def absorb(context, subsequent):
        rounds.append((context, subsequent))
        twin.absorb_context(model, lora, context, subsequent, config, sink_id=0, number=len(rounds))

    written, window = twin.deduce(
        next_token,
        absorb,
        token_ids,
        context_tokens=N,
        sync_tokens=M,
        eos_ids=eos_ids,
        max_new_tokens=max_new_tokens,
    )
    return rounds, written, window


@pytest.mark.parametrize("config", [DEFAULT, PAPER], ids=["default", "paper"])
@pytest.mark.parametrize("length", [3, N + M - 1, N + M, 53])
def test_input_and_generated_text(double, tokenizer, rounds, config, length):
    token_ids = torch.randint(1, 257, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    stream = StreamConfig(context_tokens=N, sync_tokens=M, max_new_tokens=26, read_tokens=5)
    session = Session(double, tokenizer, config, stream)
    lora = PlainLora(session.memory.adapter)
    session.append_ids(token_ids)
    pieces = list(session.generate())

    theirs, written, window = deduced(double, lora, token_ids, config, eos_ids={0}, max_new_tokens=26)
    assert len(written) == 26
    assert rounds == theirs
    assert len(rounds) == (length + 26 - M) // N
    assert session.window_ids == window
    assert session.window_ids[-min(26, len(window)) :] == written[-len(window) :]
    assert "".join(pieces) == tokenizer.decode(written)
    for ours, leaf in zip(session.memory.adapter.parameters(), lora.leaves(), strict=True):
        torch.testing.assert_close(ours[0].detach(), leaf.detach(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("stop", [0, 4, 15])
def test_end_of_sequence_stops(double, tokenizer, rounds, stop):
    """The token that the model writes at this place is declared the end: once before, once after a round."""
    token_ids = torch.randint(1, 257, (10,), generator=torch.Generator().manual_seed(1)).tolist()
    stream = StreamConfig(context_tokens=N, sync_tokens=M, max_new_tokens=26)
    lora = PlainLora(Session(double, tokenizer, DEFAULT, stream).memory.adapter)
    _, free, _ = deduced(double, lora, token_ids, DEFAULT, eos_ids=set(), max_new_tokens=26)
    end = free[stop]
    double.config.eos_token_id = end
    session = Session(double, tokenizer, DEFAULT, stream)
    lora = PlainLora(session.memory.adapter)
    session.append_ids(token_ids)
    list(session.generate())
    theirs, written, window = deduced(double, lora, token_ids, DEFAULT, eos_ids={0, end}, max_new_tokens=26)
    assert written == free[: free.index(end) + 1]
    assert rounds == theirs
    assert session.window_ids == window
    assert window[-1] == end


def test_the_window_keeps_exactly_the_subsequent_text(model, tokenizer, rounds):
    windows = []
    stream = StreamConfig(context_tokens=N, sync_tokens=M)
    session = Session(model, tokenizer, DEFAULT, stream, progress=lambda now: now.finished and windows.append(1))
    for token in range(1, 60):
        known = len(rounds)
        session.append_ids([token])
        if len(rounds) > known:
            assert session.window_ids == rounds[-1][1]
    assert len(rounds) == len(windows) == (59 - M) // N


def test_the_paper_preset_is_the_papers():
    """Section 4.1 and Algorithms 1 and 2, line by line; what it runs like is compared with the twins above."""
    absorb, stream = PRESETS["paper"].absorb, PRESETS["paper"].stream
    assert (stream.context_tokens, stream.sync_tokens) == (1024, 2048)
    assert stream.flush == "generate"
    assert (absorb.learning_rate, absorb.schedule, absorb.warmup_steps) == (5e-4, "constant", 0)
    assert (absorb.weight_decay, absorb.gradient_clip, absorb.rank) == (0.01, None, 64)
    assert (absorb.hidden_weight, absorb.kl_weight, absorb.next_token_weight) == (1.0, 0.0, 0.0)
    assert (absorb.norm, absorb.normalization, absorb.threshold) == ("l1", "none", 2.0)
    assert absorb.hidden_layers is None
    assert absorb.include_embedding
    assert not absorb.include_final_norm
    assert (absorb.sink, absorb.positions, absorb.teacher) == ("none", "own", "memory")
    assert (absorb.segments, absorb.replay_rounds, absorb.anchor_share) == ((1,), 0, 0.0)
    assert (absorb.rollback, absorb.update_penalty, absorb.optimizer_state) == ("nonfinite", "none", "reset")


def test_the_papers_loss_is_the_mean_over_all_hidden_states(double, tokenizer):
    """h^0 .. h^L by a plain Hugging Face model, as equation (6) has them: L + 1 states, one mean."""
    stream = StreamConfig(context_tokens=N, sync_tokens=M)
    token_ids = torch.arange(1, N + M + 1)
    session = Session(double, tokenizer, PAPER.replace(threshold=None), stream)
    blocks = []
    hooks = [block.register_forward_hook(lambda *args: blocks.append(args[-1])) for block in double.model.layers]
    with torch.no_grad():
        teacher = double(token_ids[None], output_hidden_states=True)
        student = double(token_ids[None, N:], output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    num_layers = len(hooks)
    teacher_states = [teacher.hidden_states[0], *blocks[:num_layers]]
    student_states = [student.hidden_states[0], *blocks[num_layers:]]
    distances = [(s - t[:, N:]).abs().mean() for s, t in zip(student_states, teacher_states, strict=True)]
    session.append_ids(token_ids.tolist())
    assert len(distances) == num_layers + 1
    assert distances[0] == 0
    assert session.memory.ledger[0].loss_before == pytest.approx(float(sum(distances) / len(distances)), rel=1e-5)


@pytest.mark.parametrize(("threshold", "steps"), [(0.0, 2), (1e6, 0)])
def test_the_threshold_is_tested_before_each_step(model, tokenizer, threshold, steps):
    session = Session(
        model, tokenizer, PAPER.replace(threshold=threshold), StreamConfig(context_tokens=N, sync_tokens=M)
    )
    before = session.memory.adapter.snapshot()
    session.append_ids(list(range(1, N + M + 1)))
    (line,) = session.memory.ledger
    assert line.num_steps == steps
    assert all(map(torch.equal, before, session.memory.adapter.snapshot())) == (steps == 0)
    assert line.outcome == ("absorbed" if steps else "below_threshold")
