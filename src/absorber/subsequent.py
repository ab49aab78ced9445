"""Text that the model writes itself.

The next text of the stream is the paper's first choice for Y and needs no code: it stands in the window.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from absorber.adapter import Adapter
from absorber.backbone import Backbone, eos_tokens, read_on, untouched
from absorber.config import AbsorbConfig
from absorber.errors import DivergedError
from absorber.generation import Decoder, choose_token

OnCount = Callable[[int, int], None]
"""Told how much of something is done, and of how much."""


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
def write_from_nothing(
    backbone: Backbone, config: AbsorbConfig, *, sink_id: int, on_token: OnCount | None = None
) -> Tensor:
    """Let the base model write texts from nothing but the sink: samples of what it says when it knows nothing.

    Args:
        backbone: The model, with no adapter attached.
        config: How many texts of how many tokens, and the seed.
        sink_id: What stands before them.
        on_token: Told before each token how many of all have one more.

    Returns:
        Token ids [Q, A], on the CPU; shorter where the model has no positions for more.

    Raises:
        DivergedError: If the model gives logits that are nan.
    """
    # Where the model is: drawing from so many distributions on a CPU takes longer than running the model.
    generator = torch.Generator(backbone.device).manual_seed(config.seed)
    num_tokens = config.anchor_tokens
    if backbone.max_positions is not None:
        num_tokens = min(num_tokens, backbone.max_positions - 1)  # the sink takes one
    sink_QT = torch.full((config.anchor_texts, 1), sink_id)

    def draw(logits_QV: Tensor) -> Tensor:
        return torch.multinomial(logits_QV.softmax(dim=-1), 1, generator=generator)

    return _write(backbone, sink_QT, num_tokens, draw, sink_id=sink_id, on_token=on_token)


class Asking(NamedTuple):
    """How a question about a sentence is written: examples in the language's tokens."""

    examples: tuple[int, ...]
    """Sentences, each with a question and its answer."""
    question: tuple[int, ...]
    """What stands before a question."""
    answer: tuple[int, ...]
    """What stands before its answer."""
    blank: int
    """An end of line, which fills up beginnings so that all are as long as any can be: what is written of a sentence
    does not depend on what others there are."""
    line_ends_V: Tensor
    """For each token of the vocabulary, whether it ends a line."""


_EXAMPLES = (
    ("The river Tarn is 381 kilometres long.", "How long is the river Tarn?", "The river is 381 kilometres long."),
    (
        "In May old Mr. Grant sold his house to Peter Lowe.",
        "Who bought the house of Mr. Grant?",
        "The buyer was Peter Lowe.",
    ),
    (
        "The letter for Anne had come from Vienna by the night train.",
        "Where did the letter for Anne come from?",
        "The letter came from Vienna.",
    ),
)


def make_asking(tokenizer: Any, texts: Sequence[str], size: int) -> Asking:
    """Make it in the tokens of a model.

    Args:
        tokenizer: Of the model.
        texts: Each token of its vocabulary as text.
        size: V; may be larger than the tokenizer's.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    line_ends_V = torch.zeros(size, dtype=torch.bool)
    line_ends_V[: len(texts)] = torch.tensor(["\n" in text for text in texts])
    shown = "".join(f"{sentence}\nQuestion: {asks}\nAnswer: {says}\n\n" for sentence, asks, says in _EXAMPLES)
    return Asking(ids(shown), ids("\nQuestion:"), ids("\nAnswer:"), ids("\n")[-1], line_ends_V)


@torch.no_grad()
def write_questions(
    backbone: Backbone,
    sentences: Sequence[Sequence[int]],
    asking: Asking,
    *,
    sentence_tokens: int,
    question_tokens: int,
    answer_tokens: int,
    sink_id: int,
    on_token: OnCount | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Let the base model ask for what a sentence says, and answer with the sentence in view, greedily.

    Self-study, as in Cartridges (arXiv 2506.06266), sentence by sentence: a small model asks of a sentence what it
    says, and of a page whatever comes to its mind.

    Args:
        backbone: The model, with no adapter attached.
        sentences: Token ids of each.
        asking: Examples.
        sentence_tokens: Of a sentence at most.
        question_tokens: Of a question at most.
        answer_tokens: Of an answer at most.
        sink_id: What stands before a text.
        on_token: Told before each token how many of a question or an answer are written.

    Returns:
        Question and answer of each, as token ids; an answer that did not end in time is empty.

    Raises:
        DivergedError: If the model gives logits that are nan.
    """
    if not sentences:
        return []

    def greedy(logits_RV: Tensor) -> Tensor:
        return logits_RV.argmax(dim=-1, keepdim=True)

    def go_on(beginnings: Sequence[Sequence[int]], longest: int, num_tokens: int) -> list[tuple[list[int], bool]]:
        """What follows each up to the end of its line, and whether that came in time."""
        rows = [[sink_id, *[asking.blank] * (longest - len(row)), *asking.examples, *row] for row in beginnings]
        prefix_RT = torch.tensor(rows)
        texts_RT = _write(
            backbone, prefix_RT, num_tokens, greedy, sink_id=sink_id, ends_V=asking.line_ends_V, on_token=on_token
        )
        found = []
        for text_T in texts_RT:
            ends = asking.line_ends_V[text_T].nonzero().flatten().tolist()
            found.append((text_T[: ends[0]].tolist() if ends else text_T.tolist(), bool(ends)))
        return found

    asked = [[*sentence, *asking.question] for sentence in sentences]
    longest = sentence_tokens + len(asking.question)
    questions = [question for question, _ in go_on(asked, longest, question_tokens)]
    whole = [[*row, *question, *asking.answer] for row, question in zip(asked, questions, strict=True)]
    longest += question_tokens + len(asking.answer)
    answers = [answer if ended else [] for answer, ended in go_on(whole, longest, answer_tokens)]
    return list(zip(questions, answers, strict=True))


def _write(
    backbone: Backbone,
    prefix_RT: Tensor,
    num_tokens: int,
    draw: Callable[[Tensor], Tensor],
    *,
    sink_id: int,
    ends_V: Tensor | None = None,
    on_token: OnCount | None = None,
) -> Tensor:
    """Go on from each prefix [R, ...]: token ids [R, T], on the CPU, without sink and ends of sequences.

    `draw` takes logits [R, V] and returns token ids [R, 1]. Once every text has one of the tokens `ends_V`, all are
    done.
    """
    banned = sorted({sink_id} | eos_tokens(backbone.model))
    cache = DynamicCache(config=backbone.model.config)
    texts_RT = given_RT = prefix_RT.to(backbone.device)
    ended_R1 = torch.zeros(len(prefix_RT), 1, dtype=torch.bool, device=backbone.device)
    if ends_V is not None:
        ends_V = ends_V.to(backbone.device)
    with untouched(backbone.model):
        for count in range(num_tokens):
            if on_token is not None:
                on_token(count, num_tokens)
            final_RTD, has_cache = read_on(backbone, given_RT, cache)
            logits_RV = backbone.logits(final_RTD[:, -1]).float()
            if logits_RV.isnan().any():
                raise DivergedError(
                    "the model gives logits that are nan. Check the model's weights, or load it with dtype float32"
                )
            logits_RV[:, banned] = -torch.inf
            next_R1 = draw(logits_RV)
            texts_RT = torch.cat([texts_RT, next_R1], dim=1)
            # A model that keeps no key-value cache takes no notice of ours, and has to read all of the text again.
            given_RT = next_R1 if has_cache else texts_RT
            if ends_V is not None:
                ended_R1 |= ends_V[next_R1]
                if ended_R1.all():
                    break
    return texts_RT[:, prefix_RT.shape[1] :].cpu()
