"""Study: keeping the facts of a context, which nothing in its subsequent text depends on. Not in the paper.

Before a round, the memory learns by heart what `notes` took of X. Learned with all of the memory, that ruins what it
says of other text. So a part of the adapter is for it alone, `study_rank` ranks beside the `rank` of synchronization.
It begins where ordinary text hardly reaches: its A, which is not trained, answers as little as may be to the inputs of
the stream's first window and of the base's own writing (the idea of null-space methods: AlphaEdit, arXiv 2410.02355;
gradient projection memory, arXiv 2103.09762; a frozen A: LoRA-FA, 2308.03303).

Shapes: B streams, P passages, S tokens, R rows of T codes (notes.py), or rank, I inputs of a projection, W texts.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from absorber.adapter import Adapter
from absorber.backbone import Backbone, forward_states, num_features, untouched, with_sink
from absorber.config import AbsorbConfig
from absorber.graphs import graphs_of, without_masks
from absorber.notes import Notes, given, readable
from absorber.optimizer import clip, scheduled, take_step
from absorber.subsequent import OnCount
from absorber.synchronization import next_token_loss

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


def study_loss(backbone: Backbone, rows_BRT: Tensor, *, sink_id: int | None) -> Tensor:
    """Mean next-token loss on what is learned of rows that are read one by one.

    Args:
        backbone: The model, with the adapter that learns attached.
        rows_BRT: Codes; nothing stands at the end of a row alone.
        sink_id: First token of each, or None.

    Returns:
        [B], float32, in nats. Not in the paper: nothing in Y depends on the facts of X (docs/method.md).
    """
    num_streams = len(rows_BRT)
    known_BS, learned_BS = readable(rows_BRT).flatten(1), (rows_BRT >= 0).flatten(1)
    input_ids_BT = with_sink(sink_id, known_BS.reshape(-1, rows_BRT.shape[2]))
    final_BSD = forward_states(backbone, input_ids_BT, first=int(sink_id is not None)).rejoined(num_streams).final_BTD
    scored_BS = torch.roll(learned_BS, -1, dims=1)  # place t predicts t + 1
    return next_token_loss(final_BSD, known_BS, backbone.logits, scored_BT=scored_BS)


def alone(own: Notes, past: Sequence[Notes], text_BT: Tensor, dice: random.Random) -> Tensor:
    """All passages, each as a row of its own."""
    return torch.cat([notes.passages_BPS for notes in (own, *past)], dim=1)


def asked(own: Notes, past: Sequence[Notes], text_BT: Tensor, dice: random.Random) -> Tensor:
    """All questions about the round's passages, and as many about earlier ones, each in one of its two forms."""
    rows = [_either_form(own, index, dice) for index in range(own.passages_BPS.shape[1])]
    return torch.stack(rows + [_either_form(*_any(past, dice), dice) for _ in rows if past], dim=1)


def among(own: Notes, past: Sequence[Notes], text_BT: Tensor, dice: random.Random) -> Tensor:
    """Passages and questions one after another in one row, each after a piece of ordinary text."""
    pieces = []
    for _ in range(own.passages_BPS.shape[1]):
        notes, index = _any((own, *past), dice)
        start = dice.randrange(max(1, text_BT.shape[1] - _PIECE_TOKENS + 1))
        pieces.append(given(text_BT[:, start : start + _PIECE_TOKENS]))
        is_question = dice.random() < 0.5 and notes.questions_BQT.shape[1] > 0
        row_BT = _either_form(notes, index, dice) if is_question else notes.passages_BPS[:, index]
        room = own.questions_BQT.shape[2] - row_BT.shape[1]
        pieces.append(nn.functional.pad(row_BT, (0, max(0, room)), value=-1))
    row_BS = torch.cat(pieces, dim=1)
    order_BS = (row_BS == -1).byte().argsort(dim=1, stable=True)  # nothing goes to the end
    return row_BS.gather(1, order_BS)[:, None]


_FORMS = {"light": (alone,), "full": (alone, asked, among)}
_PIECE_TOKENS = 32


def _any(notes: Sequence[Notes], dice: random.Random) -> tuple[Notes, int]:
    chosen = dice.choice(notes)
    return chosen, dice.randrange(chosen.passages_BPS.shape[1])


def _either_form(notes: Notes, index: int, dice: random.Random) -> Tensor:
    """The question about a passage, as plain text or as a turn of a chat."""
    return notes.questions_BQT[:, index + dice.randrange(2) * notes.passages_BPS.shape[1]]


def rows_of_steps(
    own: Notes, past: Sequence[Notes], text_BT: Tensor, config: AbsorbConfig, *, round_number: int
) -> Iterator[Tensor]:
    """Draw what each step of study is on: the round and some earlier ones, in one form after another.

    Args:
        own: Notes of this round.
        past: Those of earlier rounds.
        text_BT: Ordinary text of the streams.
        config: Steps of each form, how many earlier rounds, and the seed.
        round_number: Decides together with the seed.

    Yields:
        Codes [B, R, T].
    """
    dice = random.Random(f"{config.seed}/study/{round_number}")
    # Without questions there is one form of everything.
    forms = _FORMS[config.study] if own.questions_BQT.shape[1] else (alone,)
    for _ in range(config.study_steps):
        for form in forms:
            again = dice.sample(past, min(config.study_past, len(past)))
            yield form(own, again, text_BT, dice)


def learn(
    backbone: Backbone,
    adapter: Adapter,
    own: Notes,
    past: Sequence[Notes],
    text_BT: Tensor,
    config: AbsorbConfig,
    *,
    sink_id: int | None,
    round_number: int,
    on_step: OnCount | None = None,
) -> None:
    """Study a context, and notes of earlier ones again, with the part of the adapter that is for it.

    Args:
        backbone: The model, with `adapter` attached.
        adapter: B of its last `study_rank` ranks is trained in place.
        own: Notes of this round, from `take_notes`.
        past: Those of earlier rounds.
        text_BT: Ordinary text of the streams, for what is learned in its wake.
        config: Steps and learning rate.
        sink_id: First token of each row, or None.
        round_number: Decides together with the seed which earlier rounds come when.
        on_step: Told before each step how many of all are done.
    """
    optimizer = torch.optim.AdamW(adapter.up.values(), lr=config.study_learning_rate, weight_decay=0.0, fused=True)
    everyone_B = torch.ones(len(text_BT), dtype=torch.bool)
    graphs = graphs_of(backbone, adapter) if config.cuda_graphs else None
    weights = adapter.parameters()

    def compute(rows_BRT: Tensor) -> Tensor:
        return study_loss(backbone, rows_BRT, sink_id=sink_id)

    def compute_without_masks(rows_BRT: Tensor) -> Tensor:
        with without_masks(backbone):
            return compute(rows_BRT)

    def finish() -> None:
        adapter.drop_gradients(slice(config.rank), of_all_down=True)
        clip(adapter, config.gradient_clip)

    steps = list(rows_of_steps(own, past, text_BT.cpu(), config, round_number=round_number))
    for step, rows_BRT in enumerate(rows.to(backbone.device) for rows in steps):
        if on_step is not None:
            on_step(step, len(steps))
        for weight in weights:
            weight.grad = None
        recorded = graphs and graphs.run(("study", config), compute_without_masks, [rows_BRT], finish)
        if recorded is None:
            compute(rows_BRT).sum().backward()  # type: ignore[no-untyped-call]
            finish()
        take_step(optimizer, adapter, everyone_B, scheduled(config.study_learning_rate, step, len(steps), config))
