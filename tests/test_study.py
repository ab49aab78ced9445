"""What of a context is studied, where it is kept, and that a memory learns it."""

import copy

import pytest
import torch

import absorber
from absorber.adapter import Adapter
from absorber.backbone import inspect, sentence_breaks, sink_token, untouched
from absorber.config import AbsorbConfig, StreamConfig
from absorber.errors import ConfigError
from absorber.stream import Stream
from absorber.study import begin, choose_passages, learn, make_guide, passages_of_steps, study_loss

CONFIG = AbsorbConfig(
    rank=4,
    study="light",
    study_rank=4,
    study_passages=3,
    study_tokens=6,
    study_cue=2,
    anchor_texts=2,
    anchor_tokens=8,
)


@pytest.fixture
def double(model):
    """In float64, so that no two surprises are equal but for rounding."""
    return copy.deepcopy(model).double()


def some_tokens(*shape, seed=0):
    return torch.randint(40, 90, shape, generator=torch.Generator().manual_seed(seed))


# --- What is studied


def slowly_chosen(model, row, config, sink_id, breaks):
    """The twin: one stream, plain loops. The most surprising sentences that do not overlap, filled up with -1."""
    with torch.no_grad():
        logits = model(torch.tensor([[sink_id, *row]])).logits[0].float()
    surprise = [-float(logits[place].log_softmax(dim=-1)[token]) for place, token in enumerate(row)]
    starts = [place for place in range(len(row)) if place == 0 or (breaks is not None and bool(breaks[row[place - 1]]))]
    candidates = []
    for start in starts:
        end = start
        while end < len(row) and (end not in starts or end < start + config.study_cue + 2):
            end += 1
        for cut in range(start, end, config.study_tokens):
            piece = range(cut, min(cut + config.study_tokens, end))
            if len(piece) >= config.study_cue + 2:
                candidates.append((-sum(surprise[place] for place in piece) / len(piece), piece))
    chosen, taken = [], set()
    for _, piece in sorted(candidates, key=lambda pair: pair[0]):
        if len(chosen) < config.study_passages and not taken & set(piece):
            chosen.append([row[place] for place in piece])
            taken |= set(piece)
    return chosen


@pytest.mark.parametrize("with_breaks", [True, False])
@pytest.mark.parametrize("changes", [{}, {"study_passages": 1}, {"study_tokens": 13}, {"study_passages": 99}])
def test_choosing_equals_its_twin_stream_by_stream(double, tokenizer, changes, with_breaks):
    config, backbone = CONFIG.replace(**changes), inspect(double)
    sink_id = sink_token(double, tokenizer)
    breaks_V = sentence_breaks(tokenizer, double) if with_breaks else None
    texts = ("One. Two came. Three 4711 left!\nFour", "It was. A dog, 23 cats.\nAll of them")
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:35] for text in texts]
    ours = choose_passages(backbone, torch.tensor(rows), config, sink_id=sink_id, breaks_V=breaks_V)
    assert ours.shape == (2, config.study_passages * config.study_tokens)
    for row, passages in zip(rows, ours.reshape(2, -1, config.study_tokens).tolist(), strict=True):
        expected = slowly_chosen(double, row, config, sink_id, breaks_V)
        assert len(expected) >= min(2, config.study_passages)
        assert [[token for token in passage if token >= 0] for passage in passages if passage[0] >= 0] == expected


def test_a_text_shorter_than_a_passage_can_be_is_not_studied(backbone):
    chosen = choose_passages(backbone, torch.full((2, 3), 70), CONFIG, sink_id=0, breaks_V=None)
    assert (chosen == -1).all()


def test_sentences_begin_after_their_end_and_after_lines(model, tokenizer):
    breaks_V = sentence_breaks(tokenizer, model)
    assert breaks_V.shape == (model.get_input_embeddings().num_embeddings,)
    ends = {tokenizer.decode([token_id]) for token_id in breaks_V.nonzero().flatten().tolist()}
    assert {".", "!", "?", "\n"} <= ends
    assert not {"a", " ", ","} & ends


def test_the_base_is_not_touched_by_choosing(model, backbone):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    flags = [weight.requires_grad for weight in model.parameters()]
    choose_passages(backbone, torch.full((1, 20), 70), CONFIG, sink_id=0, breaks_V=None)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [weight.requires_grad for weight in model.parameters()] == flags


def test_the_guide_has_prompts_in_tokens_of_the_model(model, tokenizer):
    guide = make_guide(tokenizer, model)
    assert torch.equal(guide.breaks_V, sentence_breaks(tokenizer, model))
    assert tokenizer.decode(guide.prompts[0]) == "\n\nQuestion:"
    assert len(set(guide.prompts)) == len(guide.prompts) == 5


# --- Where it is kept


def inputs_of(model, name, texts):
    """What a projection reads on texts, without the sink: [tokens, I]."""
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0][:, 1:]))
    with torch.no_grad():
        model(torch.cat([torch.zeros(len(texts), 1, dtype=torch.long), texts], dim=1))
    hook.remove()
    return found[0].flatten(0, 1)


@pytest.mark.parametrize("anchors", [None, some_tokens(2, 8, seed=5)])
def test_rows_are_made_quiet_as_by_the_formula(double, anchors):
    """Random rows times (C + c I)^-1, in float64 and with a plain inverse, stream by stream."""
    backbone = inspect(double)
    window = some_tokens(2, 24)
    adapter = Adapter.fresh(backbone, CONFIG, num_streams=2)
    random = Adapter.fresh(backbone, CONFIG, num_streams=2)
    begin(backbone, adapter, window, anchors, CONFIG, sink_id=0)
    flat = Adapter.fresh(backbone, CONFIG, num_streams=2)  # so large a floor leaves the random rows
    begin(backbone, flat, window, anchors, CONFIG.replace(study_floor=1e9), sink_id=0)
    for name, down in adapter.down.items():
        assert torch.equal(down[:, :4], random.down[name][:, :4])
        assert (adapter.up[name] == 0).all()
        for stream in range(2):
            covariances = []
            for texts in (window[stream].reshape(-1, 8), anchors):
                if texts is not None:
                    x = inputs_of(double, name, texts)
                    covariances.append(x.T @ x / (x.T @ x).diagonal().mean())
            mean = sum(covariances) / len(covariances)
            rows = flat.down[name][stream, 4:].double()
            expected = rows @ torch.linalg.inv(mean + CONFIG.study_floor * torch.eye(len(mean)))
            expected *= (rows.norm(dim=1) / expected.norm(dim=1))[:, None]
            torch.testing.assert_close(down[stream, 4:].double(), expected, rtol=1e-2, atol=1e-4)


def test_ordinary_text_hardly_reaches_the_part_that_studies(model, backbone, tokenizer):
    text = (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
    )
    window, other = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:104]]).split(52, dim=1)
    adapter, loud = (Adapter.fresh(backbone, CONFIG.replace(seed=1)) for _ in range(2))
    begin(backbone, adapter, window, None, CONFIG, sink_id=0)
    begin(backbone, loud, window, None, CONFIG.replace(study_floor=1e9), sink_id=0)
    for name, down in adapter.down.items():
        x = inputs_of(model, name, other)  # text of the same kind that it has not seen
        assert (x @ down[0, 4:].T).norm() < 0.85 * (x @ loud.down[name][0, 4:].T).norm()


def test_to_begin_again_changes_nothing_before_study_and_after(backbone):
    adapter = Adapter.fresh(backbone, CONFIG)
    begin(backbone, adapter, some_tokens(1, 24), None, CONFIG, sink_id=0)
    first = adapter.snapshot()
    begin(backbone, adapter, some_tokens(1, 24), None, CONFIG, sink_id=0)
    assert all(torch.equal(ours, before) for ours, before in zip(adapter.parameters(), first, strict=True))
    with untouched(backbone.model), adapter.attached(backbone):
        learn(backbone, adapter, some_tokens(1, 12), [], CONFIG, sink_id=0, round_number=1)
    later = adapter.snapshot()
    begin(backbone, adapter, some_tokens(1, 24, seed=8), None, CONFIG, sink_id=0)
    assert all(torch.equal(ours, before) for ours, before in zip(adapter.parameters(), later, strict=True))


def test_without_study_an_adapter_has_no_such_part(backbone):
    off = Adapter.fresh(backbone, CONFIG.replace(study="off"))
    light = Adapter.fresh(backbone, CONFIG)
    assert (off.rank, light.rank) == (4, 8)
    assert all(torch.equal(off.down[name], light.down[name][:, :4]) for name in off.down)
    with pytest.raises(ConfigError, match="study needs a memory of rank 4 \\+ 4"):
        Stream(backbone, off, CONFIG, StreamConfig(context_tokens=20, sync_tokens=20), sink_id=0)


# --- How it is learned


@pytest.mark.parametrize("together", [False, True])
def test_only_what_follows_the_cue_is_scored(model, backbone, together):
    passages = some_tokens(1, 12)
    short = passages.clone()
    short[0, 5] = -1  # the first passage has five tokens
    rows = [[0, *passages[0, :5].tolist(), *passages[0, 6:].tolist()]]
    places = [3, 4, 5, 8, 9, 10, 11]
    if not together:
        rows = [[0, *passages[0, :5].tolist()], [0, *passages[0, 6:].tolist()]]
    with torch.no_grad():
        loss = study_loss(backbone, short, CONFIG, sink_id=0, together=together)
        log_q = [model(torch.tensor([row])).logits[0].log_softmax(dim=-1) for row in rows]
    if together:
        picked = [log_q[0][place - 1, rows[0][place]] for place in places]
    else:
        picked = [log_q[0][place - 1, rows[0][place]] for place in (3, 4, 5)]
        picked += [log_q[1][place - 1, rows[1][place]] for place in (3, 4, 5, 6)]
    torch.testing.assert_close(loss, -torch.stack(picked).mean()[None])


def test_every_step_is_on_the_round_and_on_some_earlier_ones():
    own, past = torch.full((1, 12), 50), [torch.full((1, 12), 60 + number) for number in range(5)]
    steps = [passages[0].tolist() for passages in passages_of_steps(own, past, CONFIG, round_number=3)]
    assert len(steps) == CONFIG.study_steps
    for passages in steps:
        assert len(passages) == 12 * (1 + CONFIG.study_past)
        assert passages.count(50) == 12
        assert len(set(passages)) == 1 + CONFIG.study_past
    assert {token for passages in steps for token in passages} == {50, 60, 61, 62, 63, 64}
    assert len({tuple(passages) for passages in steps}) > CONFIG.study_steps // 2
    again = [passages[0].tolist() for passages in passages_of_steps(own, past, CONFIG, round_number=3)]
    assert steps == again
    assert all(passages.shape == (1, 12) for passages in passages_of_steps(own, past[:0], CONFIG, round_number=1))


def test_what_is_studied_is_learned_alone_and_after_other_text(backbone):
    """The same rounds with and without: the passages of the first context become likelier by far."""
    token_ids = some_tokens(2, 60, seed=1)
    losses, adapters = {}, {}
    for study in ("off", "light"):
        config = CONFIG.replace(study=study, study_learning_rate=2e-2, rollback="nonfinite", max_steps=4)
        adapters[study] = adapter = Adapter.fresh(backbone, config, num_streams=2)
        stream = Stream(backbone, adapter, config, StreamConfig(context_tokens=20, sync_tokens=20), sink_id=0)
        stream.append(token_ids)
        passages = choose_passages(backbone, token_ids[:, :20], CONFIG, sink_id=0, breaks_V=None)
        with torch.no_grad(), adapter.attached(backbone):
            losses[study] = [
                study_loss(backbone, passages, CONFIG, sink_id=0, together=together) for together in (False, True)
            ]
        assert [kept.shape for kept in stream.studied.items] == ([(2, 18)] * 2 if study == "light" else [])
    for light, off in zip(losses["light"], losses["off"], strict=True):
        assert (light < off - 0.5).all()


def test_each_part_is_trained_by_its_own_text(backbone):
    """Study leaves A of both parts and the text's B; the text leaves the part that studies."""
    config = CONFIG.replace(rollback="nonfinite", learning_rate=1e-2, max_steps=4)
    adapter = Adapter.fresh(backbone, config)
    begin(backbone, adapter, some_tokens(1, 24), None, config, sink_id=0)
    with torch.no_grad():
        for weight in adapter.up.values():
            weight[:, :, :4] = 0.01
    before = adapter.snapshot()
    with untouched(backbone.model), adapter.attached(backbone):
        learn(backbone, adapter, some_tokens(1, 12), [], config, sink_id=0, round_number=1)
    after = adapter.snapshot()
    for index in range(0, len(before), 2):
        assert torch.equal(before[index], after[index])
        assert torch.equal(before[index + 1][:, :, :4], after[index + 1][:, :, :4])
        assert not torch.equal(before[index + 1][:, :, 4:], after[index + 1][:, :, 4:])
    absorber.absorption.absorb_context(
        backbone, adapter, some_tokens(1, 10), some_tokens(1, 12, seed=2), config, sink_id=0
    )
    for index in range(0, len(before), 2):
        assert torch.equal(adapter.parameters()[index][:, 4:], after[index][:, 4:])
        assert torch.equal(adapter.parameters()[index + 1][:, :, 4:], after[index + 1][:, :, 4:])
        assert not torch.equal(adapter.parameters()[index + 1][:, :, :4], after[index + 1][:, :, :4])


@pytest.mark.parametrize("study", ["light", "full"])
def test_a_session_studies(model, tokenizer, study):
    config = CONFIG.replace(study=study, max_steps=2, study_steps=3, study_written_tokens=16)
    stream = StreamConfig(context_tokens=32, sync_tokens=32)
    with absorber.Session(model, tokenizer, config, stream) as session:
        session.append("Nobody came. The pass key is 40316. They left at noon, and took all they had with them.\n" * 2)
        studied = session._stream.studied.items
        changed = any(up[:, :, 4:].any() for up in session.memory.adapter.up.values())
    assert studied
    assert changed
    for kept in studied:
        assert kept.shape == (1, 18)
        assert (kept >= 0).any()
