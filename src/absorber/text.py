"""Text before it is tokens: cut into pieces, so that a book is never tokenized, or held, at once."""

from collections.abc import Iterable, Iterator

_PIECE_CHARACTERS = 8192


def cut(parts: Iterable[str]) -> Iterator[str]:
    """Join the parts of a text and cut it anew at ends of lines, into pieces of at most 8192 characters.

    The pieces do not depend on how the parts were cut.
    """
    held = ""
    for part in parts:
        held += part
        while len(held) > 2 * _PIECE_CHARACTERS:
            piece = _first_piece(held)
            held = held[len(piece) :]
            yield piece
    while held:
        piece = _first_piece(held)
        held = held[len(piece) :]
        yield piece


def _first_piece(text: str) -> str:
    """The beginning of a text up to the last end of a line, or else of a word, within a piece's size.

    The cut comes before a visible character, because tokenizers join runs of blank ones.
    """
    if len(text) <= _PIECE_CHARACTERS:
        return text
    for index in range(_PIECE_CHARACTERS, 0, -1):
        if text[index - 1] == "\n" and not text[index].isspace():
            return text[:index]
    for index in range(_PIECE_CHARACTERS, 0, -1):
        if text[index].isspace() and not text[index - 1].isspace():
            return text[:index]
    return text[:_PIECE_CHARACTERS]
