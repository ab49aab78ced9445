"""Text that the model writes itself.

The next text of the stream is the paper's first choice for Y and needs no code: it stands in the window.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor
from transformers import DynamicCache

from absorber.adapter import Adapter
from absorber.backbone import Backbone, eos_tokens, read_on, untouched, with_sink
from absorber.config import AbsorbConfig
from absorber.errors import DivergedError
from absorber.generation import Decoder, choose_token

_TEMPERATURE = 0.7


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


@torch.no_grad()
def write_from_nothing(backbone: Backbone, config: AbsorbConfig, *, sink_id: int) -> Tensor:
    """Let the base model write texts from nothing but the sink: samples of what it says when it knows nothing.

    Args:
        backbone: The model, with no adapter attached.
        config: How many texts of how many tokens, and the seed.
        sink_id: What stands before them.

    Returns:
        Token ids [Q, A], on the CPU; shorter where the model has no positions for more.

    Raises:
        DivergedError: If the model gives logits that are nan.
    """
    generator = torch.Generator().manual_seed(config.seed)
    num_tokens = config.anchor_tokens
    if backbone.max_positions is not None:
        num_tokens = min(num_tokens, backbone.max_positions - 1)  # the sink takes one
    sink_QT = torch.full((config.anchor_texts, 1), sink_id)

    def draw(logits_QV: Tensor, place: int) -> Tensor:
        return torch.multinomial(logits_QV.softmax(dim=-1), 1, generator=generator)

    return _write(backbone, sink_QT, num_tokens, draw, sink_id=sink_id)


@torch.no_grad()
def write_about(
    backbone: Backbone,
    context_BN: Tensor,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    sink_id: int,
    seed: int,
) -> Tensor:
    """Let the base model, with a context in view, go on from each of some beginnings.

    The texts are what a memory of the context should know to say: questions with answers, lists, summaries, rewordings,
    whatever the beginnings ask for (self-study, as in Cartridges, arXiv 2506.06266).

    Args:
        backbone: The model, with no adapter attached.
        context_BN: X.
        prompts: The beginnings, P of them.
        num_tokens: Length of each text, its beginning included.
        sink_id: What stands before the context.
        seed: Of the sampling, at temperature 0.7; the noise is the same for all streams.

    Returns:
        Token ids [B, P * T], on the CPU.

    Raises:
        DivergedError: If the model gives logits that are nan.
    """
    num_streams, generator = context_BN.shape[0], torch.Generator().manual_seed(seed)

    def draw(logits_RV: Tensor, place: int) -> Tensor:
        logits_BPV = logits_RV.view(num_streams, len(prompts), -1)
        noise_PV = -torch.empty(logits_BPV.shape[1:]).exponential_(generator=generator).log()
        next_BP = (logits_BPV / _TEMPERATURE + noise_PV).argmax(dim=-1)  # Gumbel: a draw from the softmax
        for index, prompt in enumerate(prompts):
            if place < len(prompt):
                next_BP[:, index] = prompt[place]
        return next_BP.reshape(-1, 1)

    # Not the cache of one reading: those of recurrent models cannot be repeated.
    prefix_RT = with_sink(sink_id, context_BN).repeat_interleave(len(prompts), dim=0)
    return _write(backbone, prefix_RT, num_tokens, draw, sink_id=sink_id).reshape(num_streams, -1)


def _write(
    backbone: Backbone,
    prefix_RT: Tensor,
    num_tokens: int,
    draw: Callable[[Tensor, int], Tensor],
    *,
    sink_id: int,
) -> Tensor:
    """Go on from each prefix [R, ...]: token ids [R, T], on the CPU, without sink and ends of sequences.

    `draw` takes logits [R, V] and the place of the token, and returns token ids [R, 1].
    """
    banned = sorted({sink_id} | eos_tokens(backbone.model))
    cache = DynamicCache(config=backbone.model.config)
    texts_RT = given_RT = prefix_RT.cpu()
    with untouched(backbone.model):
        for place in range(num_tokens):
            final_RTD, has_cache = read_on(backbone, given_RT.to(backbone.device), cache)
            logits_RV = backbone.logits(final_RTD[:, -1]).float().cpu()
            if logits_RV.isnan().any():
                raise DivergedError(
                    "the model gives logits that are nan. Check the model's weights, or load it with dtype float32"
                )
            logits_RV[:, banned] = -torch.inf
            next_R1 = draw(logits_RV, place)
            texts_RT = torch.cat([texts_RT, next_R1], dim=1)
            # A model that keeps no key-value cache takes no notice of ours, and has to read all of the text again.
            given_RT = next_R1 if has_cache else texts_RT
    return texts_RT[:, prefix_RT.shape[1] :]
