"""Comparison of answers with references, by hand."""

import sys

import pytest

from absorber.bench.overlap import exact_match, normalized, rouge_l, token_f1
from absorber.errors import MissingExtraError


def test_normalized():
    assert normalized(" The  Cat's, an  apple. ") == "cats apple"


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("the Rome!", ("Rome",), 1, 1),
        ("Rome, Italy", ("Paris", "Rome"), 0, 2 / 3),
        ("", ("Rome",), 0, 0),
        ("a", ("the",), 1, 1),  # nothing is left of both
        ("red red blue", ("red blue blue green",), 0, 4 / 7),  # shared: one red, one blue
        ("Paris", ("Rome", "paris"), 1, 1),
    ],
)
def test_exact_match_and_f1(answer, references, exact, f1):
    assert exact_match(answer, references) == exact
    assert token_f1(answer, references) == pytest.approx(f1)


def test_rouge_l():
    # The longest common subsequence is "the sat mat": 3 of 4 words written, 3 of 6 in the reference.
    assert rouge_l()("the dog sat mat", ("other", "the cat sat on the mat")) == pytest.approx(2 * 3 / (4 + 6))


def test_without_the_package(monkeypatch):
    rouge_l.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingExtraError, match=r"absorber\[bench\]"):
        rouge_l()
