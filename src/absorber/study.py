"""Study: keeping the facts of a context, which nothing in its subsequent text depends on. Not in the paper.

Before a round, the base says which sentences of X it expects least; the memory learns them by heart. Learned with all
of the memory they ruin what it says of other text. So a part of the adapter is for them alone, `study_rank` ranks
beside the `rank` of synchronization, and begins where ordinary text hardly reaches: its A, which is not trained,
answers as little as may be to the inputs of the stream's first window and of the base's own writing (the idea of
null-space methods: AlphaEdit, arXiv 2410.02355; gradient projection memory, arXiv 2103.09762; a frozen A: LoRA-FA,
2308.03303).

Shapes: B streams, N context tokens, S tokens of passages, R rank, I inputs of a projection, W texts, T tokens.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from absorber.adapter import Adapter
from absorber.backbone import Backbone, forward_states, num_features, sentence_breaks, untouched, with_sink
from absorber.config import AbsorbConfig
from absorber.graphs import graphs_of, without_masks
from absorber.lessons import Lesson
from absorber.optimizer import scheduled, take_step
from absorber.student import gradients
from absorber.synchronization import next_token_loss

# --- What is studied

_PROMPTS = (
    "\n\nQuestion:",
    "\n\nNames and numbers in this text:\n-",
    "\n\nIn short,",
    "\n\nIn other words,",
    "\n",
)


class Guide(NamedTuple):
    """What study has to know of a language."""

    breaks_V: Tensor
    """For each token of the vocabulary, whether a sentence may begin after it."""
    prompts: tuple[tuple[int, ...], ...]
    """Beginnings of texts that the model writes about a context, as token ids."""


def make_guide(tokenizer: Any, model: Any) -> Guide:
    """Make the guide of a tokenizer; the model's vocabulary may be larger than the tokenizer's."""
    prompts = (tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in _PROMPTS)
    return Guide(sentence_breaks(tokenizer, model), tuple(prompts))


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
        Token ids [B, S], on the CPU: `study_passages` times `study_tokens`, the most surprising first; -1 fills up a
        short passage, and takes the place of one that is not there.
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
    return passages_BPS.flatten(1)


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


# --- Where it is kept


@torch.no_grad()
def begin(
    backbone: Backbone,
    adapter: Adapter,
    window_BT: Tensor,
    anchors: Tensor | None,
    config: AbsorbConfig,
    *,
    sink_id: int,
) -> None:
    """Choose the A of the part that studies, unless it has begun.

    Random rows, times (C + c I)^-1 for the covariance C of the projection's inputs on ordinary text, mean eigenvalue 1:
    a direction that such text uses c times as much as the mean direction loses half. Rows keep their length.

    Args:
        backbone: The model, with no adapter attached.
        adapter: Changed in place; what the model says stays, for B is zero.
        window_BT: The streams' first windows, on the model's device.
        anchors: Texts [Q, A] that the base wrote from nothing, or None.
        config: Rank, c and seed.
        sink_id: What stands before a text.
    """
    study_up = [up_BOR[:, :, config.rank :] for up_BOR in adapter.up.values()]
    if any(bool(weight.any()) for weight in study_up):
        return
    num_streams, num_tokens = window_BT.shape
    length = min(num_tokens, config.anchor_tokens if anchors is None else anchors.shape[1])
    texts_WT = window_BT[:, : num_tokens - num_tokens % length].reshape(-1, length)
    num_common = 0
    if anchors is not None and length == anchors.shape[1]:
        texts_WT, num_common = torch.cat([anchors.to(texts_WT.device), texts_WT]), len(anchors)
    generator = torch.Generator().manual_seed(config.seed)
    handles = []
    for name, down_BRI in adapter.down.items():
        inputs = num_features(backbone.projections[name])[0]
        rows_RI = torch.randn(config.study_rank, inputs, generator=generator).to(down_BRI.device)
        rows_RI *= 3**-0.5 / rows_RI.norm(dim=1, keepdim=True)  # as long as those of a fresh adapter

        def choose(
            module: nn.Module, args: tuple[Tensor, ...], down_BRI: Tensor = down_BRI, rows_RI: Tensor = rows_RI
        ) -> None:
            x_WTI = args[0].reshape(len(texts_WT), -1, args[0].shape[-1])[:, 1:].float()  # without the sink
            covariance_BII = _covariance(x_WTI[num_common:].reshape(num_streams, -1, x_WTI.shape[-1]))
            if num_common:
                covariance_BII = (covariance_BII + _covariance(x_WTI[:num_common].flatten(0, 1)[None])) / 2
            covariance_BII.diagonal(dim1=1, dim2=2).add_(config.study_floor)
            factor_BII = torch.linalg.cholesky(covariance_BII)
            quiet_BRI = torch.cholesky_solve(rows_RI.T.expand(num_streams, -1, -1), factor_BII).mT
            quiet_BRI = quiet_BRI * (rows_RI.norm(dim=1)[:, None] / quiet_BRI.norm(dim=2, keepdim=True))
            down_BRI[:, config.rank :] = quiet_BRI.to(down_BRI.dtype)

        handles.append(backbone.projections[name].register_forward_pre_hook(choose))
    try:
        with untouched(backbone.model):
            forward_states(backbone, with_sink(sink_id, texts_WT))
    finally:
        for handle in handles:
            handle.remove()


def _covariance(x_BTI: Tensor) -> Tensor:
    """Second moments [B, I, I], scaled so that the mean eigenvalue is 1."""
    moments_BII = x_BTI.mT @ x_BTI
    mean_B = moments_BII.diagonal(dim1=1, dim2=2).mean(dim=1)
    return moments_BII / mean_B.clamp_min(1e-12)[:, None, None]


# --- How it is learned


def study_loss(
    backbone: Backbone, passages_BS: Tensor, config: AbsorbConfig, *, sink_id: int | None, together: bool = False
) -> Tensor:
    """Mean next-token loss on passages that are read one by one, after the sink alone, or one after another.

    Read alone, a passage is known to a model that has nothing else in view; read after others, also to one that has.
    The first `study_cue` tokens of a passage are its cue and are not scored.

    Args:
        backbone: The model, with the adapter that learns attached.
        passages_BS: Passages of `study_tokens` tokens, one after another, filled up with -1.
        config: Their length and that of the cue.
        sink_id: First token of each, or None.
        together: Whether each is read after those before it.

    Returns:
        [B], float32, in nats. Not in the paper: nothing in Y depends on the facts of X (docs/method.md).
    """
    num_streams, num_tokens = passages_BS.shape
    places_S = torch.arange(num_tokens, device=passages_BS.device) % config.study_tokens
    wanted_BS = (places_S >= config.study_cue) & (passages_BS >= 0)
    if together:  # what fills passages up goes to the end
        order_BS = (passages_BS < 0).byte().argsort(dim=1, stable=True)
        passages_BS, wanted_BS = passages_BS.gather(1, order_BS), wanted_BS.gather(1, order_BS)
    known_BS = passages_BS.clamp_min(0)
    input_ids_BT = with_sink(sink_id, known_BS if together else known_BS.reshape(-1, config.study_tokens))
    final_BSD = forward_states(backbone, input_ids_BT, first=int(sink_id is not None)).rejoined(num_streams).final_BTD
    scored_BS = torch.roll(wanted_BS, -1, dims=1)  # place t predicts t + 1
    return next_token_loss(final_BSD, known_BS, backbone.logits, scored_BT=scored_BS)


def passages_of_steps(
    own_BS: Tensor, past: Sequence[Tensor], config: AbsorbConfig, *, round_number: int
) -> Iterator[Tensor]:
    """Draw what each step of study is on: the passages of the round and of some earlier ones, in an order of its own.

    Args:
        own_BS: Passages of this round, from `choose_passages`.
        past: Those of earlier rounds.
        config: Steps, how many earlier rounds, and the seed.
        round_number: Decides together with the seed.

    Yields:
        Passages [B, S'].
    """
    dice = random.Random(f"{config.seed}/study/{round_number}")
    for _ in range(config.study_steps):
        again = dice.sample(past, min(config.study_past, len(past)))
        passages_BPS = torch.cat([own_BS, *again], dim=1).view(len(own_BS), -1, config.study_tokens)
        order = dice.sample(range(passages_BPS.shape[1]), passages_BPS.shape[1])
        yield passages_BPS[:, order].flatten(1)


def learn(
    backbone: Backbone,
    adapter: Adapter,
    own_BS: Tensor,
    past: Sequence[Tensor],
    config: AbsorbConfig,
    *,
    sink_id: int | None,
    round_number: int,
    written: Lesson | None = None,
) -> None:
    """Study a context, and passages of earlier ones again, with the part of the adapter that is for it.

    Args:
        backbone: The model, with `adapter` attached.
        adapter: B of its last `study_rank` ranks is trained in place.
        own_BS: Passages of this round, from `choose_passages`.
        past: Those of earlier rounds.
        config: Steps and learning rate.
        sink_id: First token of each passage, or None.
        round_number: Decides together with the seed which earlier rounds come when.
        written: What the base wrote about X, and says of it with X in view. If it is given, the steps are in turn on
            passages read alone, on passages read one after another, and on this.
    """
    optimizer = torch.optim.AdamW(adapter.up.values(), lr=config.study_learning_rate, weight_decay=0.0, fused=True)
    everyone_B = torch.ones(len(own_BS), dtype=torch.bool, device=own_BS.device)
    graphs = graphs_of(backbone, adapter) if config.cuda_graphs else None
    weights = adapter.parameters()
    # Against the teacher's distributions alone, whatever the round itself is on.
    distill = config.replace(
        study="off", hidden_weight=0.0, kl_weight=1.0, next_token_weight=0.0, update_penalty="none", positions="own"
    )

    def compute(passages_BS: Tensor) -> Tensor:
        return study_loss(backbone, passages_BS, config, sink_id=sink_id, together=turn == 1)

    def compute_without_masks(passages_BS: Tensor) -> Tensor:
        with without_masks(backbone):
            return compute(passages_BS)

    for step, passages_BS in enumerate(passages_of_steps(own_BS, past, config, round_number=round_number)):
        turn = step % 3 if written is not None else 0
        for weight in weights:
            weight.grad = None
        if turn == 2 and written is not None:
            segments = written.pieces(0)
            gradients(backbone, adapter, [], written, distill, everyone_B, sink_id=sink_id, segments=segments)
        else:
            key = ("study", turn, config)
            if graphs is None or graphs.run(key, compute_without_masks, [passages_BS], everyone_B, weights) is None:
                compute(passages_BS).sum().backward()  # type: ignore[no-untyped-call]
        adapter.drop_gradients(slice(config.rank), of_all_down=True)
        rate = scheduled(config.study_learning_rate, step, config.study_steps, config)
        take_step(optimizer, adapter, everyone_B, rate, config)
