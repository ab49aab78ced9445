"""Where the subsequent text Y comes from when the stream does not have it: the model writes it.

The next text of the stream is the paper's first choice and needs no code: it stands in the window.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch

from absorber.adapter import Adapter
from absorber.backbone import Backbone, untouched
from absorber.generation import Decoder, choose_token


def generate_subsequent(
    backbone: Backbone,
    adapter: Adapter,
    prefix_ids: Sequence[int],
    num_tokens: int,
    *,
    read_tokens: int,
    eos_ids: AbstractSet[int],
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    at_least: int = 2,
) -> list[int]:
    """Let the model with its memory continue a window ("model-generated inferences", arXiv 2604.20915).

    Args:
        backbone: The model.
        adapter: Its memory, one stream.
        prefix_ids: What the model reads first: sink, context and the subsequent text there is.
        num_tokens: How many tokens to write at most.
        read_tokens: Largest piece read at once.
        eos_ids: Tokens that end the text; they are not returned.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus of the sampling.
        generator: Source of randomness.
        at_least: An end-of-sequence token does not count before this many tokens.

    Returns:
        Token ids, `num_tokens` or fewer.
    """
    written: list[int] = []
    with torch.no_grad(), untouched(backbone.model), adapter.attached(backbone):
        decoder = Decoder(backbone, read_tokens=read_tokens)
        decoder.read(prefix_ids)
        while len(written) < num_tokens:
            logits_V = decoder.logits_V.clone()
            if len(written) < at_least:
                logits_V[list(eos_ids)] = -torch.inf
            token = choose_token(logits_V, temperature=temperature, top_p=top_p, generator=generator)
            if token in eos_ids:
                break
            written.append(token)
            if len(written) < num_tokens:
                decoder.read([token])
    return written
