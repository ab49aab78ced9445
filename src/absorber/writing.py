"""Going on from what a decoder has read: the next tokens, all up to an end, and their text as it comes.

Where the window is, and what becomes of the tokens, the session knows.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import torch

from absorber.config import StreamConfig
from absorber.decoding import StaticDecoder
from absorber.generation import Decoder, choose_token


def write_next(
    decoder: Decoder | StaticDecoder, settings: StreamConfig, generator: torch.Generator, *, at_most: int
) -> list[int]:
    """The next token, not yet read, or if it is always the likeliest some of them, which are.

    Args:
        decoder: Has read what is to be gone on from.
        settings: Temperature and nucleus.
        generator: Source of randomness.
        at_most: How many tokens, 1 or more.

    Raises:
        ContextError: If nothing was read, or that is more than the model's positions.
    """
    if settings.temperature == 0:
        return decoder.write(min(at_most, decoder.ahead))
    return [choose_token(decoder.logits_V, temperature=settings.temperature, top_p=settings.top_p, generator=generator)]


def write_to_end(
    decoder: Decoder | StaticDecoder, settings: StreamConfig, generator: torch.Generator, *, eos_ids: AbstractSet[int]
) -> list[int]:
    """At most `max_new_tokens` tokens, without the end-of-sequence token that may have come sooner; see `write_next`.

    How far the decoder has read afterwards is left open.
    """
    written: list[int] = []
    while len(written) < settings.max_new_tokens:
        fresh = write_next(decoder, settings, generator, at_most=settings.max_new_tokens - len(written))
        ended = next((at for at, token in enumerate(fresh) if token in eos_ids), None)
        written += fresh[:ended]
        if ended is not None:
            break
        if settings.temperature:
            decoder.read(fresh)
    return written


def as_it_comes(tokenizer: Any, token_ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens, each piece as soon as its characters are whole."""
    written: list[int] = []
    shown = ""
    for token in token_ids:
        written.append(token)
        text = str(tokenizer.decode(written, skip_special_tokens=True))
        if not text.endswith("�"):  # the first bytes of a character that is not complete
            yield text[len(shown) :]
            shown = text
    rest = str(tokenizer.decode(written, skip_special_tokens=True))[len(shown) :]
    if rest:
        yield rest
