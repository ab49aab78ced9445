"""What of a context is worth studying: the sentences that the base expects least, and questions about them.

What is learned is a row of codes: a token id is learned, -2 less a token id is read but not learned, -1 is nothing.

Shapes: B streams, N context tokens (X), P passages of S tokens, Q questions of T tokens, R rows, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from absorber.backbone import Backbone, forward_states, sentence_breaks, untouched, vocabulary, with_sink
from absorber.config import AbsorbConfig
from absorber.subsequent import Asking, OnCount, make_asking, write_questions
from absorber.text import as_turn


class Guide(NamedTuple):
    """What study has to know of a language and a model's chat template."""

    breaks_V: Tensor
    """For each token of the vocabulary, whether a sentence may begin after it."""
    asking: Asking
    """How questions are written."""
    tokenizer: Any
    """Of the model."""

    def tokenize(self, text: str) -> list[int]:
        """Without special tokens, but those that the text spells."""
        token_ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return token_ids


def make_guide(tokenizer: Any, model: Any) -> Guide:
    """Make the guide of a tokenizer and its model."""
    texts, size = vocabulary(tokenizer, model), model.get_input_embeddings().num_embeddings
    return Guide(sentence_breaks(texts, size), make_asking(tokenizer, texts, size), tokenizer)


class Notes(NamedTuple):
    """What is studied of one context; rows of codes, on the CPU."""

    passages_BPS: Tensor
    """Its sentences that the base expects least."""
    questions_BQT: Tensor
    """Questions with answers about them, P as plain text and then the same as turns of a chat; none if study is
    light."""

    @classmethod
    def of(cls, passages: list[list[int]], questions: list[list[int]], *, config: AbsorbConfig) -> "Notes":
        """Make those of one stream from lists of rows."""
        return cls(
            torch.tensor([passages], dtype=torch.long).reshape(1, len(passages), config.study_tokens),
            torch.tensor([questions], dtype=torch.long).reshape(1, len(questions), config.study_written_tokens),
        )


def given(token_ids: Tensor) -> Tensor:
    """Code what is read and not learned; what is coded so already, and nothing, stay."""
    return torch.where(token_ids >= 0, -2 - token_ids, token_ids)


def readable(codes: Tensor) -> Tensor:
    """The token ids of codes, whether learned or not; 0 for nothing."""
    return torch.where(codes < -1, -2 - codes, codes.clamp_min(0))


def take_notes(
    backbone: Backbone,
    context_BN: Tensor,
    config: AbsorbConfig,
    *,
    sink_id: int,
    guide: Guide | None,
    on_token: OnCount | None = None,
) -> Notes:
    """Choose what is studied of a context.

    Args:
        backbone: The model, with no adapter attached.
        context_BN: X.
        config: How much of it.
        sink_id: What stands before a text.
        guide: Without it, passages are cut anywhere, and no questions are asked.
        on_token: As in `write_questions`.
    """
    breaks_V = None if guide is None else guide.breaks_V
    passages_BPS = choose_passages(backbone, context_BN, config, sink_id=sink_id, breaks_V=breaks_V)
    if config.study == "light" or guide is None:
        return Notes(passages_BPS, passages_BPS.new_full((len(passages_BPS), 0, config.study_written_tokens), -1))
    return Notes(passages_BPS, ask_about(backbone, passages_BPS, guide, config, sink_id=sink_id, on_token=on_token))


@torch.no_grad()
def choose_passages(
    backbone: Backbone, context_BN: Tensor, config: AbsorbConfig, *, sink_id: int, breaks_V: Tensor | None
) -> Tensor:
    """Find the sentences of a text that the base model expects least: names, numbers, whatever cannot be guessed.

    A passage is a sentence, or as much of it as `study_tokens` holds; what is too short to have anything after its cue
    takes in the next one. Passages do not overlap.

    Args:
        backbone: The model, with no adapter attached.
        context_BN: X.
        config: How many passages of how many tokens, and how long a cue is.
        sink_id: What stands before the text.
        breaks_V: For each token of the vocabulary, whether a sentence may begin after it. None: the text is cut into
            passages of equal length.

    Returns:
        Codes [B, P, S], on the CPU: `study_passages` of `study_tokens` tokens, the most surprising first. The first
        `study_cue` tokens of each are read and not learned.
    """
    with untouched(backbone.model):
        states = forward_states(backbone, with_sink(sink_id, context_BN))
        nll_BN = torch.stack(
            [
                -backbone.logits(final[:-1]).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
                for final, ids in zip(states.final_BTD, context_BN, strict=True)
            ]
        ).cpu()
    count, size = config.study_passages, config.study_tokens
    passages_BPS = torch.full((context_BN.shape[0], count, size), -1)
    for passages_PS, ids, nll in zip(passages_BPS, context_BN.cpu(), nll_BN, strict=True):
        sentences = _sentences(ids, breaks_V, shortest=config.study_cue + 2, longest=size)
        chosen: list[slice] = []
        for place in sorted(sentences, key=lambda place: -float(nll[place].mean())):
            if len(chosen) < count and all(place.stop <= other.start or other.stop <= place.start for other in chosen):
                passages_PS[len(chosen), : place.stop - place.start] = ids[place]
                chosen.append(place)
    cue = slice(config.study_cue)
    passages_BPS[:, :, cue] = given(passages_BPS[:, :, cue])
    return passages_BPS


def _sentences(ids: Tensor, breaks_V: Tensor | None, *, shortest: int, longest: int) -> list[slice]:
    """Where sentences stand in a text, from each place where one begins; they may overlap."""
    begins = [0] if breaks_V is None else [0, *(breaks_V[ids[:-1]].nonzero().flatten() + 1).tolist()]
    found = []
    for begin in begins:
        sentence_end = next((end for end in begins if end >= begin + shortest), len(ids))
        for start in range(begin, sentence_end, longest):  # a long one is cut
            end = min(start + longest, sentence_end)
            if end - start >= shortest:
                found.append(slice(start, end))
    return found


def ask_about(
    backbone: Backbone,
    passages_BPS: Tensor,
    guide: Guide,
    config: AbsorbConfig,
    *,
    sink_id: int,
    on_token: OnCount | None = None,
) -> Tensor:
    """Let the base ask a question about each passage and answer it.

    An answer that did not end, or has less than half of what the passage says after its cue, is put aside for the
    passage itself, which is true.

    Returns:
        Codes [B, 2 P, T] of `study_written_tokens` tokens, the question read and the answer learned; nothing where
        there is no passage.
    """
    num_streams, num_passages, _ = passages_BPS.shape
    rows_RS = passages_BPS.flatten(0, 1)
    there = (rows_RS != -1).any(dim=1).nonzero().flatten().tolist()
    sentences = [readable(row_S[row_S != -1]).tolist() for row_S in rows_RS[there]]
    size = config.study_written_tokens
    written = write_questions(
        backbone,
        sentences,
        guide.asking,
        sentence_tokens=config.study_tokens,
        question_tokens=size // 2,
        answer_tokens=size // 2,
        sink_id=sink_id,
        on_token=on_token,
    )
    questions_RFT = torch.full((len(rows_RS), 2, size), -1)
    for row, sentence, (question, answer) in zip(there, sentences, written, strict=True):
        says = sentence[config.study_cue :]
        if 2 * sum(token_id in answer for token_id in says) < len(says):
            answer = sentence
        question, answer = (guide.tokenizer.decode(token_ids).strip() for token_ids in (question, answer))
        forms = ((f"\nQuestion: {question}\nAnswer:", f" {answer}"), (as_turn(guide.tokenizer, question), answer))
        for form, (read, learned) in enumerate(forms):
            codes = [-2 - token_id for token_id in guide.tokenize(read)] + guide.tokenize(learned)
            questions_RFT[row, form, : len(codes)] = torch.tensor(codes[:size])
    return questions_RFT.view(num_streams, num_passages, 2, size).transpose(1, 2).flatten(1, 2)
