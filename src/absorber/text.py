"""Text before it is tokens: read and cut into pieces, so that a book is never tokenized, or held, at once."""

import codecs
import io
from collections.abc import Iterable, Iterator
from typing import Any

from absorber.errors import ContextError

_PIECE_CHARACTERS = 8192


def decode(parts: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode the parts of a UTF-8 text strictly; a byte order mark is left out, and every end of line becomes \\n.

    Args:
        parts: The bytes, cut anywhere.
        name: What an error calls the text.

    Raises:
        ContextError: If a byte is not UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    lines = io.IncrementalNewlineDecoder(utf8, translate=True)
    num_bytes = 0
    try:
        for part in parts:
            num_bytes += len(part)
            if text := lines.decode(part):
                yield text
        if text := lines.decode(b"", final=True):
            yield text
    except UnicodeDecodeError as error:
        place = num_bytes - len(error.object) + error.start
        raise ContextError(
            f"{name} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at byte {place}. Give plain text in "
            "UTF-8, for instance by: iconv -f LATIN1 -t UTF-8"
        ) from error


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


def as_turn(tokenizer: Any, message: str) -> str:
    """Write a user's message as the model's chat template has it; without a template, as a question to answer.

    It is a turn inside a conversation, so that a system prompt is not repeated with every turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        return f"\n\nQuestion: {message}\nAnswer:"
    user = {"role": "user", "content": message}
    earlier = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]

    def render(turns: list[dict[str, str]], *, reply: bool) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=reply))

    whole, before = render([*earlier, user], reply=True), render(earlier, reply=False)
    return whole.removeprefix(before) if whole.startswith(before) else render([user], reply=True)
