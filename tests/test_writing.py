"""What is written after what a decoder has read: it ends in time, and whole characters are shown at once."""

import pytest
import torch

from absorber.decoding import StaticDecoder
from absorber.generation import Decoder
from absorber.writing import as_it_comes, write_to_end


@pytest.mark.parametrize("ahead", [None, 1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_ends_before_an_end_of_sequence_token(backbone, stream, ahead, temperature):
    def written(*, eos_ids):
        decoder = Decoder(backbone, read_tokens=16)
        if ahead is not None:
            decoder = StaticDecoder(backbone, read_tokens=16, capacity=64)
            decoder.ahead = ahead
        decoder.read([5, 6, 7])
        generator = torch.Generator().manual_seed(1)
        return write_to_end(decoder, stream.replace(temperature=temperature), generator, eos_ids=eos_ids)

    whole = written(eos_ids=set())
    assert len(whole) == stream.max_new_tokens
    end = whole[-2]
    assert written(eos_ids={end}) == whole[: whole.index(end)]


def test_characters_of_several_tokens_come_whole(tokenizer):
    def pieces(text, *, without=0):
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(as_it_comes(tokenizer, token_ids[: len(token_ids) - without]))

    assert pieces("aé😀b") == ["a", "é", "😀", "b"]
    assert pieces("a😀", without=1) == ["a", "\ufffd"]


def test_text_comes_before_the_next_token_is_asked_for(tokenizer):
    token_ids = iter(tokenizer("ab", add_special_tokens=False)["input_ids"])
    assert next(as_it_comes(tokenizer, token_ids)) == "a"
    assert len(list(token_ids)) == 1
