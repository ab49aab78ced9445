"""What of a context is studied, where it is kept, and that a memory learns it."""

import copy

import pytest
import torch

import absorber
from absorber.adapter import Adapter
from absorber.backbone import inspect, sentence_breaks, sink_token, untouched, vocabulary
from absorber.config import AbsorbConfig, StreamConfig
from absorber.errors import ConfigError
from absorber.notes import Notes, ask_about, choose_passages, given, make_guide, readable, take_notes
from absorber.stream import Stream
from absorber.study import begin, learn, rows_of_steps, study_loss
from absorber.text import as_turn

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


def some_notes(num_streams=1, *, num_questions=0, seed=0):
    """Two passages of six tokens, of which two are a cue, and questions of eight, half of them answer."""
    passages = some_tokens(num_streams, 2, 6, seed=seed)
    questions = some_tokens(num_streams, num_questions, 8, seed=seed + 100)
    return Notes(
        torch.cat([given(passages[..., :2]), passages[..., 2:]], dim=-1),
        torch.cat([given(questions[..., :4]), questions[..., 4:]], dim=-1),
    )


def breaks_of(tokenizer, model):
    return sentence_breaks(vocabulary(tokenizer, model), 257)


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
    breaks_V = breaks_of(tokenizer, double) if with_breaks else None
    texts = ("One. Two came. Three 4711 left!\nFour", "It was. A dog, 23 cats.\nAll of them")
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:35] for text in texts]
    ours = choose_passages(backbone, torch.tensor(rows), config, sink_id=sink_id, breaks_V=breaks_V)
    assert ours.shape == (2, config.study_passages, config.study_tokens)
    for row, passages in zip(rows, ours.tolist(), strict=True):
        expected = slowly_chosen(double, row, config, sink_id, breaks_V)
        assert len(expected) >= min(2, config.study_passages)
        found = [[code for code in passage if code != -1] for passage in passages if passage[0] != -1]
        cue = config.study_cue
        assert found == [[-2 - token for token in passage[:cue]] + passage[cue:] for passage in expected]


def test_a_text_shorter_than_a_passage_can_be_is_not_studied(backbone):
    chosen = choose_passages(backbone, torch.full((2, 3), 70), CONFIG, sink_id=0, breaks_V=None)
    assert (chosen == -1).all()


def test_sentences_begin_after_their_end_and_after_lines(model, tokenizer):
    breaks_V = breaks_of(tokenizer, model)
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


def test_codes_are_read_as_what_they_stand_for():
    token_ids = torch.tensor([0, 1, 256])
    assert torch.equal(readable(given(token_ids)), token_ids)
    assert torch.equal(given(given(token_ids)), given(token_ids))
    assert (given(token_ids) < -1).all()
    assert given(torch.tensor(-1)) == -1
    assert readable(torch.tensor(-1)) == 0


def test_a_question_is_read_and_its_answer_learned_in_two_forms(monkeypatch, backbone, model, tokenizer):
    """An answer that is empty or has too little of the passage is put aside for the passage itself."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    config = CONFIG.replace(study="full", study_tokens=20, study_cue=4, study_written_tokens=80)
    said = {"The key is 40316.": "It is 40316.", "The box is empty.": "I do not know!", "He left at noon.": ""}
    passages = torch.full((1, 4, 20), -1)
    for place, sentence in zip((0, 2, 3), said, strict=True):
        passages[0, place, : len(sentence)] = torch.tensor(ids(sentence))
    monkeypatch.setattr(
        "absorber.notes.write_questions",
        lambda backbone, sentences, *args, **sizes: [
            (ids(" What?"), ids(f" {said[tokenizer.decode(sentence)]}" if said[tokenizer.decode(sentence)] else ""))
            for sentence in sentences
        ],
    )
    questions = ask_about(backbone, passages, make_guide(tokenizer, model), config, sink_id=0)[0]
    assert questions.shape == (8, 80)
    assert (questions[[1, 5]] == -1).all()
    answers = ("It is 40316.", "The box is empty.", "He left at noon.")
    for place, answer in zip((0, 2, 3), answers, strict=True):
        forms = (("\nQuestion: What?\nAnswer:", f" {answer}"), (as_turn(tokenizer, "What?"), answer))
        for row, (read, learned) in zip((place, place + 4), forms, strict=True):
            codes = [-2 - token_id for token_id in ids(read)] + ids(learned)
            assert questions[row].tolist() == [*codes, *[-1] * (80 - len(codes))][:80]


def test_a_context_is_asked_about_if_study_is_full(backbone, model, tokenizer):
    config, guide = CONFIG.replace(study_written_tokens=200), make_guide(tokenizer, model)
    context = torch.tensor([tokenizer("One came. Two left at noon.\nThree stayed there. So it was.")["input_ids"]])
    light = take_notes(backbone, context, config, sink_id=0, guide=guide)
    full = take_notes(backbone, context, config.replace(study="full"), sink_id=0, guide=guide)
    assert torch.equal(light.passages_BPS, full.passages_BPS)
    assert (light.questions_BQT.shape, full.questions_BQT.shape) == ((1, 0, 200), (1, 6, 200))
    assert (full.questions_BQT >= 0).any(dim=2).all()
    again = Notes.of(full.passages_BPS[0].tolist(), full.questions_BQT[0].tolist(), config=config)
    assert all(map(torch.equal, again, full))
    again = Notes.of(light.passages_BPS[0].tolist(), light.questions_BQT[0].tolist(), config=config)
    assert all(map(torch.equal, again, light))


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
        learn(backbone, adapter, some_notes(), [], some_tokens(1, 9), CONFIG, sink_id=0, round_number=1)
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


def test_only_what_is_learned_is_scored(model, backbone):
    rows = some_notes().passages_BPS
    rows[0, 0, 5] = -1  # the first passage has five tokens
    with torch.no_grad():
        loss = study_loss(backbone, rows, sink_id=0)
        picked = []
        for row, places in zip(readable(rows)[0].tolist(), ((2, 3, 4), (2, 3, 4, 5)), strict=True):
            log_q = model(torch.tensor([[0, *row]])).logits[0].log_softmax(dim=-1)
            picked += [log_q[place, row[place]] for place in places]
    torch.testing.assert_close(loss, -torch.stack(picked).mean()[None])


def test_light_study_reads_every_passage_of_the_round_and_of_some_earlier_ones():
    own, past = some_notes(), [some_notes(seed=seed) for seed in range(1, 6)]
    steps = list(rows_of_steps(own, past, some_tokens(1, 9), CONFIG, round_number=3))
    assert len(steps) == CONFIG.study_steps
    drawn = set()
    for rows in steps:
        assert rows.shape == (1, 2 * (1 + CONFIG.study_past), 6)
        assert torch.equal(rows[:, :2], own.passages_BPS)
        for pair in rows[:, 2:].split(2, dim=1):
            drawn.add(next(place for place, notes in enumerate(past) if torch.equal(notes.passages_BPS, pair)))
    assert drawn == set(range(5))
    again = rows_of_steps(own, past, some_tokens(1, 9), CONFIG, round_number=3)
    assert all(map(torch.equal, steps, again))
    first = rows_of_steps(own, [], some_tokens(1, 9), CONFIG, round_number=1)
    assert all(torch.equal(rows, own.passages_BPS) for rows in first)


def test_full_study_takes_its_three_forms_in_turn():
    config, text = CONFIG.replace(study="full", study_written_tokens=8), some_tokens(1, 50, seed=9)
    own, past = some_notes(num_questions=4), [some_notes(num_questions=4, seed=seed) for seed in range(1, 6)]
    steps = list(rows_of_steps(own, past, text, config, round_number=3))
    assert len(steps) == 3 * config.study_steps
    known = [row.tolist() for notes in (own, *past) for part in notes for row in part[0]]
    pieces = {tuple(given(text[0, start : start + 32]).tolist()) for start in range(19)}
    forms = [set(), set()]
    for alone, asked, among in zip(steps[::3], steps[1::3], steps[2::3], strict=True):
        assert torch.equal(alone[:, :2], own.passages_BPS)
        assert asked.shape == (1, 4, 8)
        for index, row in enumerate(asked[0, :2].tolist()):  # about each passage of the round, in either form
            found = own.questions_BQT[0].tolist().index(row)
            assert found % 2 == index
            forms[index].add(found)
        assert all(row in known for row in asked[0].tolist())
        assert among.shape == (1, 1, 2 * (32 + 8))
        codes = [code for code in among[0, 0].tolist() if code != -1]
        assert among[0, 0, len(codes) :].eq(-1).all()  # nothing but at the end
        for _ in range(2):
            assert tuple(codes[:32]) in pieces
            codes = codes[32:]
            row = next(row for row in known if codes[: len(row)] == row)
            codes = codes[len(row) :]
        assert not codes
    assert forms == [{0, 2}, {1, 3}]


@pytest.mark.parametrize("study", ["light", "full"])
def test_what_is_studied_is_learned(backbone, model, tokenizer, study):
    """The same rounds with and without: the passages of the first context become likelier by far."""
    token_ids, guide = some_tokens(2, 60, seed=1), make_guide(tokenizer, model)
    losses = {}
    for kind in ("off", study):
        config = CONFIG.replace(study=kind, study_learning_rate=2e-2, rollback="nonfinite", max_steps=4)
        config = config.replace(study_written_tokens=200, study_steps=16)
        adapter = Adapter.fresh(backbone, config, num_streams=2)
        sizes = StreamConfig(context_tokens=20, sync_tokens=20)
        stream = Stream(backbone, adapter, config, sizes, sink_id=0, guide=guide)
        stream.append(token_ids)
        notes = take_notes(backbone, token_ids[:, :20], config.replace(study=study), sink_id=0, guide=guide)
        with torch.no_grad(), adapter.attached(backbone):
            rows = (notes.passages_BPS, notes.questions_BQT) if study == "full" else (notes.passages_BPS,)
            losses[kind] = [study_loss(backbone, part, sink_id=0) for part in rows]
        assert len(stream.studied.items) == (0 if kind == "off" else 2)
    for studied, off in zip(losses[study], losses["off"], strict=True):
        assert (studied < off - 0.5).all()


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
        learn(backbone, adapter, some_notes(), [], some_tokens(1, 9), config, sink_id=0, round_number=1)
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
    config = CONFIG.replace(study=study, max_steps=2, study_steps=3, study_written_tokens=30)
    stream = StreamConfig(context_tokens=32, sync_tokens=32)
    with absorber.Session(model, tokenizer, config, stream) as session:
        session.append("Nobody came. The pass key is 40316. They left at noon, and took all they had with them.\n" * 2)
        studied = session._stream.studied.items
        changed = any(up[:, :, 4:].any() for up in session.memory.adapter.up.values())
    assert studied
    assert changed
    for notes in studied:
        assert notes.passages_BPS.shape == (1, 3, 6)
        assert notes.questions_BQT.shape == (1, 6 if study == "full" else 0, 30)
        assert (notes.passages_BPS >= 0).any()
