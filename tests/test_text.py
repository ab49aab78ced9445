"""Text: strict UTF-8, and pieces that do not depend on how the parts were cut."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from absorber import ContextError, text
from absorber.text import cut, decode

LETTERS = st.sampled_from(list("ab .\n\u00a0é\u2003😀"))
TEXTS = st.text(LETTERS, max_size=120)
SIZE = 16


@pytest.fixture(autouse=True, scope="module")
def _small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_PIECE_CHARACTERS", SIZE)
        yield


def parts_of(whole, places):
    edges = [0, *sorted(place % (len(whole) + 1) for place in places), len(whole)]
    return [whole[start:end] for start, end in itertools.pairwise(edges)]


@settings(deadline=None, max_examples=300, derandomize=True)
@given(whole=TEXTS, places=st.lists(st.integers(0, 1000), max_size=9))
def test_pieces_do_not_depend_on_the_parts(whole, places):
    pieces = list(cut([whole]))
    assert list(cut(parts_of(whole, places))) == pieces
    assert list(cut(whole)) == pieces
    assert "".join(pieces) == whole
    assert all(1 <= len(piece) <= SIZE for piece in pieces)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(whole=TEXTS, more=TEXTS)
def test_a_text_that_grows_keeps_its_pieces_but_the_last(whole, more):
    """So that a source can be read on from where it ended: all but the pieces at its end stay."""
    before, after = list(cut([whole])), list(cut([whole + more]))
    assert after[: max(0, len(before) - 1)] == before[:-1]


@pytest.mark.parametrize(
    ("whole", "first"),
    [
        ("one line\nand more of it", "one line\n"),
        ("a\n\n\nb c d e f g h i", "a\n\n\n"),
        ("no line but words here", "no line but"),
        ("w" * 40, "w" * SIZE),
        ("short", "short"),
    ],
)
def test_cuts_come_at_lines_then_words(whole, first):
    assert next(cut([whole])) == first


def test_nothing_gives_nothing():
    assert list(cut([])) == list(cut(["", ""])) == []


@settings(deadline=None, max_examples=200, derandomize=True)
@given(whole=st.text(st.sampled_from(list("a\r\né😀")), max_size=40), places=st.lists(st.integers(0, 99), max_size=6))
def test_bytes_are_decoded_however_they_are_cut(whole, places):
    data = parts_of(whole.encode(), places)
    assert "".join(decode(data, "it")) == whole.replace("\r\n", "\n").replace("\r", "\n")


def test_a_byte_order_mark_is_left_out():
    assert "".join(decode([b"\xef\xbb", b"\xbfyes"], "it")) == "yes"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([b"abc\xe9d"], "book.txt is not UTF-8 text: byte 0xe9 at byte 3"),
        ([b"abc", b"d\xffe"], "byte 0xff at byte 4"),
        ([b"ab\xc3"], "byte 0xc3 at byte 2"),
        ([b"a\xf0\x9f", b"\x98", b"x"], "byte 0xf0 at byte 1"),
    ],
)
def test_other_bytes_are_refused_with_their_place(parts, message):
    with pytest.raises(ContextError, match=message):
        list(decode(parts, "book.txt"))
