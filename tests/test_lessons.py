"""What the steps of a round train on: the plan, the pieces, the reservoir of earlier rounds, the anchors."""

import random
from collections import Counter

import pytest
import torch

from absorber import PRESETS, AbsorbConfig, DivergedError
from absorber.backbone import eos_tokens, inspect, vocabulary
from absorber.lessons import Anchors, Lesson, Lessons, Past, Reservoir
from absorber.subsequent import make_asking, write_from_nothing, write_questions
from absorber.synchronization import Target
from architectures import ARCHITECTURES, build

CONFIG = AbsorbConfig(rank=2, max_steps=16, replay_share=0.5, anchor_share=0.2, anchor_texts=6, anchor_tokens=10)
PAIRS = [Past(torch.full((1, 4), number), torch.full((1, 6), number)) for number in range(5)]
ANCHORS = torch.arange(60).reshape(6, 10)


def lessons(config=CONFIG, *, replayed=PAIRS, anchors=ANCHORS, round_number=1, length=24):
    own = Lesson(torch.ones(1, 8, dtype=torch.long), torch.arange(length)[None], 0, config.segments)
    return Lessons(
        own,
        past=replayed,
        anchors=None if anchors is None else Anchors(anchors),
        config=config,
        round_number=round_number,
    )


def plan(config=CONFIG, **more):
    """One entry a step, and one for the look after the last."""
    drawn, kinds = lessons(config, **more), []
    for step in range(config.max_steps + 1):
        lesson = drawn.of_step(step)
        kinds.append("own" if lesson is drawn.own else "anchor" if lesson.is_anchor else int(lesson.context_BN[0, 0]))
    return kinds


def test_the_plan_follows_seed_and_round():
    assert plan() == plan()
    plans = [plan(CONFIG.replace(seed=seed), round_number=number) for seed in range(3) for number in range(1, 4)]
    assert len(set(map(tuple, plans))) == 9


def test_the_first_step_and_the_last_look_are_on_the_rounds_own_text():
    greedy = CONFIG.replace(anchor_share=1.0)
    for number in range(1, 30):
        for config in (CONFIG, greedy):
            assert plan(config, round_number=number)[0] == plan(config, round_number=number)[-1] == "own"
    assert plan(greedy)[1:-1] == ["anchor"] * 15
    assert plan(CONFIG.replace(max_steps=1)) == ["own", "own"]


def test_the_shares():
    counts = Counter(kind for number in range(1, 401) for kind in plan(round_number=number)[1:-1])
    total = sum(counts.values())
    assert counts["anchor"] / total == pytest.approx(0.2, abs=0.02)
    assert counts["own"] / total == pytest.approx(0.8 * 0.5, abs=0.03)
    for number in range(5):
        assert counts[number] / total == pytest.approx(0.8 * 0.5 / 5, abs=0.02)


@pytest.mark.parametrize(
    ("config", "replayed", "anchors"),
    [
        (CONFIG.replace(anchor_share=0.0, replay_rounds=0), [], ANCHORS),
        (CONFIG.replace(anchor_share=0.0, replay_share=0.0), PAIRS, ANCHORS),
        (CONFIG, [], None),
        (CONFIG.replace(kl_weight=0.0), [], ANCHORS),  # of which nothing would be learned
        (PRESETS["paper"].absorb, [], None),
    ],
)
def test_without_replay_and_anchors_every_step_is_on_the_rounds_own_text(config, replayed, anchors):
    for number in range(1, 20):
        assert set(plan(config, replayed=replayed, anchors=anchors, round_number=number)) == {"own"}


def test_the_paper_preset_uses_none_of_it():
    paper = PRESETS["paper"].absorb
    assert (paper.segments, paper.replay_rounds, paper.anchor_share) == ((1,), 0, 0.0)


@pytest.mark.parametrize("segments", [(1,), (4,), (1, 1, 1, 4), (7, 100)])
def test_pieces_divide_the_text_and_have_two_tokens_or_more(segments):
    for length in range(2, 60):
        lesson = Lesson(torch.ones(1, 1), torch.ones(1, length), 0, segments)
        for step in range(9):
            pieces, wanted = lesson.pieces(step), segments[step % len(segments)]
            assert 1 <= pieces <= wanted
            assert length % pieces == 0
            assert length // pieces >= 2
            if length % wanted == 0 and length >= 2 * wanted:
                assert pieces == wanted


@pytest.mark.parametrize(("length", "expected"), [(24, 2), (9, 1), (1000, 6)])
def test_anchors_are_different_texts_about_as_long_as_the_rounds(length, expected):
    config, chosen = CONFIG.replace(anchor_share=1.0), set()
    for number in range(1, 30):
        lesson = lessons(config, round_number=number, length=length).of_step(1)
        texts = lesson.subsequent_BM[0].reshape(-1, 10).tolist()
        assert lesson.pieces(0) == lesson.pieces(3) == len(texts) == expected
        assert len({tuple(text) for text in texts}) == expected
        assert all(text in ANCHORS.tolist() for text in texts)
        assert lesson.context_BN.shape == (1, 0)
        assert lesson.num_generated == lesson.subsequent_BM.shape[1]
        chosen |= {text[0] for text in texts}
    assert len(chosen) == 6


# --- The reservoir


def fill(size, rounds, *, seed=0, start=None, since=1):
    reservoir = Reservoir(size, seed=seed)
    reservoir.items = list(start or [])
    for number in range(since, rounds + 1):
        reservoir.add(number, round_number=number)
        assert len(reservoir.items) <= size
    return reservoir.items


@pytest.mark.parametrize("size", [0, 1, 3, 20])
def test_a_reservoir_is_never_larger_than_its_size(size):
    pairs = fill(size, 12)
    assert len(pairs) == min(size, 12)
    assert len(set(pairs)) == len(pairs)
    assert pairs == fill(size, 12)


def test_every_round_is_as_likely_as_any_other():
    size, rounds, seeds = 3, 12, 2000
    counts = Counter(number for seed in range(seeds) for number in fill(size, rounds, seed=seed))
    for number in range(1, rounds + 1):
        assert counts[number] / seeds == pytest.approx(size / rounds, abs=0.04)  # four standard deviations


@pytest.mark.parametrize("stopped", [1, 2, 7])
def test_a_reservoir_that_goes_on_from_its_pairs_is_the_same(stopped):
    assert fill(3, 30, start=fill(3, stopped), since=stopped + 1) == fill(3, 30)


def test_the_base_is_asked_once_about_an_earlier_round():
    past = Past(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 6, dtype=torch.long))
    target = Target(layers=(), finals=((1.0, torch.rand(1, 6, 3)),))
    for by_base, layers, kept in ((False, (), False), (True, (torch.rand(1, 6, 3),), False), (True, (), True)):
        said = Target(layers=layers, finals=target.finals)
        lesson = Lesson.again(past, (1,), torch.device("cpu"))
        assert lesson.target is None
        lesson.taught(said, by_base=by_base)
        assert lesson.target is said
        assert (past.target is not None) == kept
    later = Lesson.again(past, (1,), torch.device("cpu"))
    assert torch.equal(later.target.finals[0][1], target.finals[0][1])


# --- Anchors


def test_the_base_is_asked_once_about_an_anchor():
    anchors, own = Anchors(ANCHORS), Lesson(torch.ones(2, 8, dtype=torch.long), torch.zeros(2, 24).long(), 0, (1,))
    said = {}
    for number in range(30):
        lesson = anchors.draw(own, random.Random(number))
        texts = lesson.subsequent_BM[0].reshape(2, 10)
        known = [int(text[0]) // 10 in said for text in texts]
        assert (lesson.target is not None) == all(known)
        if lesson.target is None:
            # What it says of a text is made of its first token.
            states = texts[:, :, None].repeat(1, 1, 3).flatten(0, 1)[None].repeat(2, 1, 1).float()
            lesson.taught(Target(layers=(), finals=((1.0, states),)), by_base=False)
            said |= {int(text[0]) // 10: True for text in texts}
        ((share, final_BMD),) = lesson.target.finals
        assert share == 1
        assert torch.equal(final_BMD[:, :, 0].long(), lesson.subsequent_BM)
    assert len(said) == len(anchors.said) == 6


def test_anchors_are_the_same_for_a_seed_and_leave_no_trace(model, backbone):
    state, training = torch.get_rng_state(), model.training
    texts = write_from_nothing(backbone, CONFIG, sink_id=0)
    assert texts.shape == (6, 10)
    assert torch.equal(texts, write_from_nothing(backbone, CONFIG, sink_id=0))
    assert not torch.equal(texts, write_from_nothing(backbone, CONFIG.replace(seed=1), sink_id=0))
    assert len({tuple(text) for text in texts.tolist()}) == 6
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training
    assert all(weight.grad is None for weight in model.parameters())


def test_anchors_hold_no_end_of_sequence(model, backbone, tokenizer, monkeypatch):
    config = CONFIG.replace(anchor_texts=64, anchor_tokens=40)
    end = int(write_from_nothing(backbone, config, sink_id=0)[0, 0])  # which it writes unless told that it ends a text
    monkeypatch.setattr(model.config, "eos_token_id", end)
    banned = eos_tokens(model, tokenizer)
    assert {0, end} <= banned
    assert not banned & set(write_from_nothing(backbone, config, sink_id=0).flatten().tolist())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_token_is_drawn_after_all_before_it(name):
    """Also where a model keeps no key-value cache: the same tokens as from a whole pass for each."""
    model, config = build(name), CONFIG.replace(anchor_tokens=6, anchor_texts=3)
    backbone, generator = inspect(model), torch.Generator().manual_seed(config.seed)
    whole = torch.zeros(3, 1, dtype=torch.long)
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=whole, use_cache=False).logits[:, -1].float()
        logits[:, 0] = -torch.inf
        whole = torch.cat([whole, torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)], dim=1)
    assert torch.equal(write_from_nothing(backbone, config, sink_id=0), whole[:, 1:])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_questions_and_answers_are_what_the_base_says_next(name, tokenizer):
    """Also where a model keeps no key-value cache, and each sentence as if it were alone but for blanks before it."""
    model = build(name)
    backbone, sentences = inspect(model), ([70, 71, 72], [90], [80, 81])
    asking = make_asking(tokenizer, vocabulary(tokenizer, model), 257)._replace(
        examples=(60, 61, 62), question=(63,), answer=(64, 65), blank=66
    )
    asking.line_ends_V[::3] = True
    banned = sorted({0} | eos_tokens(model))

    def next_line(beginning, longest, num_tokens):
        row = [0, *[66] * (longest - len(beginning)), 60, 61, 62, *beginning]
        line = []
        for _ in range(num_tokens):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row + line]), use_cache=False).logits[0, -1]
            logits[banned] = -torch.inf
            line.append(int(logits.argmax()))
            if asking.line_ends_V[line[-1]]:
                return line[:-1], True
        return line, False

    questions = [next_line([*sentence, 63], 7 + 1, 5)[0] for sentence in sentences]
    whole = [[*sentence, 63, *asked, 64, 65] for sentence, asked in zip(sentences, questions, strict=True)]
    lines = [next_line(row, 7 + 1 + 5 + 2, 4) for row in whole]
    expected = [(asked, line if ended else []) for asked, (line, ended) in zip(questions, lines, strict=True)]
    sizes = {"sentence_tokens": 7, "question_tokens": 5, "answer_tokens": 4}
    assert write_questions(backbone, sentences, asking, **sizes, sink_id=0) == expected
    assert [write_questions(backbone, [one], asking, **sizes, sink_id=0)[0] for one in sentences] == expected


def test_without_sentences_nothing_is_asked(backbone, tokenizer, model):
    asking = make_asking(tokenizer, vocabulary(tokenizer, model), 257)
    sizes = {"sentence_tokens": 5, "question_tokens": 5, "answer_tokens": 5}
    assert write_questions(backbone, [], asking, **sizes, sink_id=0) == []


def test_anchors_are_no_longer_than_the_model_has_positions():
    backbone = inspect(build("gpt2"))
    texts = write_from_nothing(backbone, CONFIG.replace(anchor_texts=1, anchor_tokens=500), sink_id=0)
    assert texts.shape == (1, backbone.max_positions - 1)


def test_a_model_that_gives_nan_writes_nothing():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(DivergedError, match="logits that are nan"):
        write_from_nothing(inspect(model), CONFIG, sink_id=0)
