"""The gate: its signals equal plain loops, and a closed one gives the base model's own answer."""

import pytest
import torch

from absorber import ConfigError, Session
from absorber.backbone import forward_states
from absorber.gate import Signals, opens, signals
from absorber.text import as_turn


def test_signals_equal_a_loop_over_the_models_own_logits(model, backbone):
    question = torch.randint(1, 250, (2, 5), generator=torch.Generator().manual_seed(0))
    whole = torch.cat([torch.zeros(2, 1, dtype=torch.long), question], dim=1)
    with torch.no_grad():
        found = signals(backbone, forward_states(backbone, whole).final_BTD, question)
        logits = model(whole).logits.float()
    for row in range(2):
        losses = [-logits[row, place].log_softmax(dim=-1)[question[row, place]] for place in range(5)]
        assert found.nll_B[row].item() == pytest.approx(sum(losses).item() / 5, abs=1e-5)
        last = torch.distributions.Categorical(logits=logits[row, -1])
        assert found.entropy_B[row].item() == pytest.approx(last.entropy().item(), abs=1e-4)


def test_each_rule_looks_at_its_signal():
    with_memory = Signals(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 3.0, 1.0]))
    without = Signals(torch.full((3,), 2.5), torch.full((3,), 2.0))
    assert opens(with_memory, without, "likelihood").tolist() == [True, True, False]
    assert opens(with_memory, without, "entropy").tolist() == [False, False, True]
    assert opens(with_memory, without, "off").tolist() == [True, True, True]


@pytest.fixture
def session(model, tokenizer, config, stream, text):
    """With a memory that says other things than the base, and says them with less doubt."""
    session = Session(model, tokenizer, config, stream)
    session.append(text)
    with torch.no_grad():
        for weight in session.memory.adapter.up.values():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    return session


@pytest.mark.parametrize("rule", ["entropy", "likelihood"])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_closed_gate_gives_the_answer_of_the_base(monkeypatch, session, model, tokenizer, rule, is_open):
    seen = []

    def decide(with_memory, without, asked):
        seen.append((with_memory, without, asked))
        return torch.tensor([is_open])

    monkeypatch.setattr("absorber.gate.opens", decide)
    window, before = session.window_ids, session.memory.adapter.snapshot()
    plain = Session(model, tokenizer, session.memory.config, session.memory.stream)
    plain._stream.window_BT = torch.tensor([window])
    with_memory, without = session.ask("It was the"), plain.ask("It was the")
    assert with_memory != without
    assert not seen
    assert session.ask("It was the", gate=rule) == (with_memory if is_open else without)
    assert session.ask("It was the") == with_memory
    ((own, base, asked),) = seen
    assert asked == rule
    assert not torch.equal(own.nll_B, base.nll_B)
    # The base's reading is that of a session without memory; the adapter was off.
    question = session.tokenize(as_turn(tokenizer, "It was the"))
    ids = torch.tensor([[session.memory.sink_id, *window, *question]])
    with torch.no_grad():
        logits = model(ids).logits[0].log_softmax(dim=-1)
    length = len(question)
    expected = -logits[-length - 1 : -1].gather(1, ids[0, -length:, None]).mean()
    torch.testing.assert_close(base.nll_B[0], expected, rtol=1e-4, atol=1e-4)
    assert session.window_ids == window
    assert all(map(torch.equal, session.memory.adapter.snapshot(), before))


def test_the_setting_of_the_stream_is_the_default(monkeypatch, session):
    asked = []
    monkeypatch.setattr("absorber.gate.opens", lambda own, base, rule: asked.append(rule) or torch.tensor([True]))
    session.memory.stream = session.memory.stream.replace(gate="entropy")
    session.ask("It was the")
    session.ask("It was the", gate="likelihood")
    session.ask("It was the", gate="off")
    assert asked == ["entropy", "likelihood"]


def test_an_empty_memory_changes_nothing_whatever_the_gate(model, tokenizer, config, stream):
    session = Session(model, tokenizer, config, stream)
    answers = {session.ask("It was", gate=rule) for rule in ("off", "entropy", "likelihood")}
    assert len(answers) == 1


def test_a_strange_gate_is_named(session):
    with pytest.raises(ConfigError, match="gate must be one of off, entropy, likelihood; got 'open'"):
        session.ask("It was the", gate="open")
