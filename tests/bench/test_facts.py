"""Planted facts: about different things, not to be guessed, the same for a seed."""

import pytest

from absorber.bench.facts import KINDS, WORDINGS, draw_facts
from absorber.errors import BenchmarkError


def test_facts_are_about_different_things_and_the_same_for_a_seed():
    facts = draw_facts(200, seed=1)
    assert facts == draw_facts(200, seed=1)
    assert facts != draw_facts(200, seed=2)
    for wording in WORDINGS:
        assert len({fact.prompts[wording] for fact in facts}) == 200


def test_the_text_continues_its_own_prompt_and_no_prompt_tells_the_answer():
    for fact in draw_facts(100, seed=0):
        assert fact.sentence == f"{fact.prompts['text']}{fact.answer}."
        assert fact.answer.startswith(" ")
        for prompt in fact.prompts.values():
            assert fact.answer.strip() not in prompt
            assert not prompt.endswith(" ")
    for kind in KINDS:  # nor does the kind
        answers = [fact.answer for fact in draw_facts(300, seed=0) if fact.kind == kind]
        assert max(map(answers.count, answers)) <= len(answers) / 5


def test_kinds_take_turns():
    for first in range(5):
        kinds = [fact.kind for fact in draw_facts(9, seed=0, first_kind=first)]
        assert kinds == [KINDS[(first + index) % 4] for index in range(9)]


def test_too_many_facts_are_refused():
    with pytest.raises(BenchmarkError, match="no 9999 different facts"):
        draw_facts(9999, seed=0)
