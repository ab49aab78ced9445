"""Which passages of a context are studied, and that a memory learns them."""

import copy

import pytest
import torch

import absorber
from absorber.adapter import Adapter
from absorber.backbone import inspect, sentence_breaks, sink_token
from absorber.config import AbsorbConfig, StreamConfig
from absorber.stream import Stream
from absorber.student import study_loss
from absorber.subsequent import choose_passages

CONFIG = AbsorbConfig(rank=4, study="light", study_passages=3, study_tokens=6, study_cue=2)


@pytest.fixture
def double(model):
    """In float64, so that no two surprises are equal but for rounding."""
    return copy.deepcopy(model).double()


def slowly_chosen(model, row, config, sink_id, breaks):
    """The twin: one stream, plain loops. Starts of sentences first, then the most surprising, never near another."""
    size = config.study_tokens
    with torch.no_grad():
        logits = model(torch.tensor([[sink_id, *row]])).logits[0].float()
    surprise = [-float(logits[place].log_softmax(dim=-1)[token]) for place, token in enumerate(row)]
    candidates = []
    for start in range(len(row) - size + 1):
        begins = breaks is None or start == 0 or bool(breaks[row[start - 1]])
        candidates.append((not begins, -sum(surprise[start : start + size]) / size, start))
    chosen = []
    for _, _, start in sorted(candidates):
        if len(chosen) < config.study_passages and all(abs(start - other) >= size // 2 for other in chosen):
            chosen.append(start)
    return [row[start : start + size] for start in chosen]


@pytest.mark.parametrize("with_breaks", [True, False])
@pytest.mark.parametrize("changes", [{}, {"study_passages": 1}, {"study_tokens": 9}, {"study_passages": 99}])
def test_choosing_equals_its_twin_stream_by_stream(double, tokenizer, changes, with_breaks):
    config, backbone = CONFIG.replace(**changes), inspect(double)
    sink_id = sink_token(double, tokenizer)
    breaks_V = sentence_breaks(tokenizer, double) if with_breaks else None
    texts = ("One. Two came. Three 4711 left!\nFour", "It was. A dog, 23 cats.\nAll of them")
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:35] for text in texts]
    ours = choose_passages(backbone, torch.tensor(rows), config, sink_id=sink_id, breaks_V=breaks_V)
    expected = [slowly_chosen(double, row, config, sink_id, breaks_V) for row in rows]
    count = min(map(len, expected))
    assert ours.tolist() == [[token for passage in passages[:count] for token in passage] for passages in expected]


def test_a_text_shorter_than_a_passage_is_not_studied(backbone):
    chosen = choose_passages(backbone, torch.full((2, 5), 70), CONFIG, sink_id=0, breaks_V=None)
    assert chosen.shape == (2, 0)


def test_sentences_begin_after_their_end_and_after_lines(model, tokenizer):
    breaks_V = sentence_breaks(tokenizer, model)
    assert breaks_V.shape == (model.get_input_embeddings().num_embeddings,)
    ends = {tokenizer.decode([token_id]) for token_id in breaks_V.nonzero().flatten().tolist()}
    assert {".", "!", "?", "\n"} <= ends
    assert not {"a", " ", ","} & ends


def test_only_what_follows_the_cue_is_scored(model, backbone):
    """Another cue or another first passage changes what is predicted, but is not itself predicted."""
    passages = torch.randint(40, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = study_loss(backbone, passages, CONFIG, sink_id=0)
        logits = model(torch.cat([torch.zeros(2, 1, dtype=torch.long), passages.view(2, 6)], dim=1)).logits
    log_q = logits[:, 2:6].log_softmax(dim=-1).gather(-1, passages.view(2, 6)[:, 2:, None])
    torch.testing.assert_close(loss, -log_q.mean()[None])


def test_what_is_studied_is_learned(model, tokenizer, backbone):
    """The same rounds with and without: the passages of the last context become likelier by far."""
    token_ids = torch.randint(40, 90, (2, 60), generator=torch.Generator().manual_seed(1))
    losses = {}
    for study in ("off", "light"):
        config = CONFIG.replace(study=study, max_steps=40, learning_rate=1e-2, rollback="nonfinite")
        adapter = Adapter.fresh(backbone, config, num_streams=2)
        stream = Stream(backbone, adapter, config, StreamConfig(context_tokens=20, sync_tokens=20), sink_id=0)
        stream.append(token_ids)
        passages = choose_passages(backbone, token_ids[:, 20:40], CONFIG, sink_id=0, breaks_V=None)
        with torch.no_grad(), adapter.attached(backbone):
            losses[study] = study_loss(backbone, passages, CONFIG, sink_id=0)
        kept = [past.study_BS.shape[1] for past in stream.reservoir.rounds]
        assert all(size == (18 if study == "light" else 0) for size in kept)
    assert (losses["light"] < losses["off"] - 0.5).all()


def test_the_base_is_not_touched_by_choosing(model, backbone):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    flags = [weight.requires_grad for weight in model.parameters()]
    choose_passages(backbone, torch.full((1, 20), 70), CONFIG, sink_id=0, breaks_V=None)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [weight.requires_grad for weight in model.parameters()] == flags


def test_a_session_studies(model, tokenizer):
    config = CONFIG.replace(max_steps=2, anchor_texts=2, anchor_tokens=8)
    stream = StreamConfig(context_tokens=32, sync_tokens=32)
    with absorber.Session(model, tokenizer, config, stream) as session:
        session.append("Nobody came. The pass key is 40316. They left at noon, and took all they had with them.\n" * 2)
        past = session._stream.reservoir.rounds
    assert past
    for kept in past:
        assert kept.study_BS.shape == (1, 18)
