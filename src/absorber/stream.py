"""The sliding window: Algorithm 2 of arXiv 2604.20915 over B streams that advance together.

The window Z never exceeds n + m tokens. Once it is full, its oldest n tokens X are absorbed by synchronizing on the
m after them, Y, and dropped; Y stays. So every token is absorbed once, and what is in view never is.

Shapes: B streams, T tokens.
"""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from absorber import study
from absorber.absorption import Earlier, RoundResult, absorb_context
from absorber.adapter import Adapter
from absorber.backbone import Backbone, check_positions, with_sink
from absorber.config import AbsorbConfig, StreamConfig
from absorber.errors import ConfigError, ContextError
from absorber.lessons import Anchors, Past, Reservoir
from absorber.memory import Round
from absorber.notes import Guide, Notes, take_notes
from absorber.optimizer import new_optimizer
from absorber.subsequent import OnCount, generate_subsequent, write_from_nothing

OnStep = Callable[[int, Tensor], None]
OnRound = Callable[[list[Round]], None]
Work = Literal["writing anchors", "asking", "studying"]
"""What there is to do beside synchronizing."""
OnWork = Callable[[Work, int, int], None]


class Stream:
    """B token sequences of any length, each with its window and its row of the adapter."""

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        config: AbsorbConfig,
        stream: StreamConfig,
        *,
        sink_id: int,
        guide: Guide | None = None,
        on_step: OnStep | None = None,
        on_round: OnRound | None = None,
        on_work: OnWork | None = None,
    ) -> None:
        """Begin with an empty window.

        Args:
            backbone: The model.
            adapter: One row of weights per stream; trained in place.
            config: How a context is absorbed.
            stream: n, m, and what to do at the end.
            sink_id: First token of teacher and student.
            guide: For study; without it, passages are cut anywhere and no questions are asked.
            on_step: Called before each optimizer step with its number and the losses [B].
            on_round: Called after each round with one ledger line per stream.
            on_work: Called while there is other work, with what it is, how much of it is done, and of how much.

        Raises:
            ConfigError: If the window is larger than the model's positions, or study has no part of the adapter.
        """
        if config.study != "off" and adapter.rank != config.adapter_rank:
            raise ConfigError(
                f"study needs a memory of rank {config.rank} + {config.study_rank}; this one has rank {adapter.rank}. "
                'Begin a new memory, or go on with study = "off"'
            )
        check_positions(backbone, stream.teacher_tokens + stream.window_tokens + (config.sink == "shared"))
        self._backbone, self._config, self._stream = backbone, config, stream
        self.adapter = adapter
        """The memory, one row of weights per stream."""
        self._sink_id, self._guide = sink_id, guide
        self._on_step, self._on_round, self._on_work = on_step, on_round, on_work
        self.optimizer = new_optimizer(adapter.parameters(), config) if config.optimizer_state == "carry" else None
        self.window_BT = torch.zeros(adapter.num_streams, 0, dtype=torch.long)
        """Z: what the model reads verbatim."""
        self.pending_BT = self.window_BT
        """Given, but not yet in the window; empty unless `append` was interrupted."""
        self.behind_BT = self.window_BT
        """What left the window last, as far as the teacher still reads it."""
        self.num_rounds = 0
        """Rounds so far."""
        self.reservoir: Reservoir[Past] = Reservoir(config.replay_rounds, seed=config.seed)
        """Earlier rounds to train on again."""
        self.studied: Reservoir[Notes] = Reservoir(config.study_rounds, seed=f"{config.seed}/study")
        """Notes of them, to study again."""
        self.anchors: Anchors | None = None
        """Texts on which the model should stay as it is; written before the first round."""
        self._own: Past | None = None  # of the round that is under way

    def append(self, token_ids_BT: Tensor) -> None:
        """Add tokens at the end, absorbing what leaves the window.

        If a round is interrupted or fails, its text is still in the window and the rest is pending: the next call,
        also with no tokens, goes on from there.

        Raises:
            ContextError: If the batch is not that of the adapter.
            AbsorptionError: If a round cannot be carried out.
        """
        self.give(token_ids_BT)
        while self.fill():
            self.absorb()

    def give(self, token_ids_BT: Tensor) -> None:
        """Add tokens at the end, and absorb nothing yet.

        Raises:
            ContextError: If the batch is not that of the adapter.
        """
        if token_ids_BT.shape[0] != self.window_BT.shape[0]:
            raise ContextError(f"there are {self.window_BT.shape[0]} streams; got tokens for {token_ids_BT.shape[0]}")
        self.pending_BT = torch.cat([self.pending_BT, token_ids_BT.cpu()], dim=1)

    def fill(self) -> bool:
        """Move what is pending into the window as far as it has room; return whether it is full, and a round due."""
        room = self._stream.window_tokens - self.window_BT.shape[1]
        longer_BT = torch.cat([self.window_BT, self.pending_BT[:, :room]], dim=1)
        self.window_BT, self.pending_BT = longer_BT, self.pending_BT[:, room:]
        return self.window_BT.shape[1] == self._stream.window_tokens

    def flush(self, *, eos_ids: AbstractSet[int], generator: torch.Generator) -> None:
        """Absorb what is left in the window; the teacher writes the subsequent text that it lacks.

        Args:
            eos_ids: Tokens that end a generated text.
            generator: Source of randomness.

        Raises:
            ContextError: If there are several streams; the texts that they generate differ in length.
        """
        if self.window_BT.shape[0] > 1:
            raise ContextError(f"only a single stream can be flushed; got {self.window_BT.shape[0]}")
        sink_id = self._sink_id if self._config.sink == "shared" else None
        self.append(self.window_BT[:, :0])  # what an interruption left pending
        while self.window_BT.shape[1]:
            follows = max(0, self.window_BT.shape[1] - self._stream.context_tokens)
            pristine = self.adapter.disabled() if self._config.teacher == "base" else contextlib.nullcontext()
            with pristine:
                written = generate_subsequent(
                    self._backbone,
                    self.adapter,
                    with_sink(sink_id, self.window_BT)[0].tolist(),
                    self._stream.sync_tokens - follows,
                    read_tokens=self._stream.read_tokens,
                    eos_ids=eos_ids,
                    temperature=self._stream.flush_temperature,
                    top_p=self._stream.top_p,
                    generator=generator,
                    at_least=max(0, 2 - follows),
                )
            self._absorb_oldest(torch.tensor([written], dtype=torch.long))

    def _telling(self, work: Work) -> OnCount | None:
        return None if self._on_work is None else partial(self._on_work, work)

    def _absorb_oldest(self, generated_BT: Tensor) -> None:
        """One round: X leaves the window once it is absorbed; generated text is never part of the window."""
        place, notes = self._backbone.device, None
        taught_BT, subsequent_BM = self.next_texts(generated_BT)
        earlier = self.earlier()
        if self._config.study != "off":
            notes = self._take_notes()
        results = absorb_context(
            self._backbone,
            self.adapter,
            taught_BT.to(place),
            subsequent_BM.to(place),
            self._config,
            sink_id=self._sink_id,
            num_generated=generated_BT.shape[1],
            notes=notes,
            studied=self.studied.items,
            earlier=earlier,
            optimizer=self.optimizer,
            on_step=self._on_step,
            on_study=self._telling("studying"),
        )
        self.take(results, num_generated=generated_BT.shape[1], notes=notes)

    def absorb(self) -> None:
        """One round of a window that is full."""
        self._absorb_oldest(torch.zeros(self.window_BT.shape[0], 0, dtype=torch.long))

    @property
    def kind(self) -> Hashable:
        """Equal for streams whose next rounds can share a batch; None for one that has to be alone.

        What is studied, and an optimizer that is carried on, belong to a single stream.
        """
        config = self._config
        if config.study != "off" or self.optimizer is not None or self.adapter.num_streams > 1:
            return None
        taught_BT, subsequent_BM = self.next_texts(self.window_BT[:, :0])
        shape = (self.adapter.rank, self.adapter.alpha, taught_BT.shape, subsequent_BM.shape)
        return (id(self._backbone.model), config, self._sink_id, *shape)

    def next_texts(self, generated_BT: Tensor) -> tuple[Tensor, Tensor]:
        """What the next round is of: X, with what the teacher reads before it, and Y."""
        size = self._stream.context_tokens
        taught_BT = torch.cat([self.behind_BT, self.window_BT[:, :size]], dim=1)
        return taught_BT, torch.cat([self.window_BT[:, size:], generated_BT], dim=1)

    def earlier(self) -> Earlier:
        """What the rounds before leave for the next one, which takes it; anchors are written if there are none."""
        if self.anchors is None and self._config.has_anchors:
            texts_QA = write_from_nothing(
                self._backbone, self._config, sink_id=self._sink_id, on_token=self._telling("writing anchors")
            )
            self.anchors = Anchors(texts_QA)
        self._own = Past(*self.next_texts(self.window_BT[:, :0]))
        return Earlier(self.reservoir.items, self.anchors, self.num_rounds + 1, self._own)

    def _take_notes(self) -> Notes:
        place, size = self._backbone.device, self._stream.context_tokens
        anchors_QA = None if self.anchors is None else self.anchors.texts_QA
        study.begin(
            self._backbone, self.adapter, self.window_BT.to(place), anchors_QA, self._config, sink_id=self._sink_id
        )
        return take_notes(
            self._backbone,
            self.window_BT[:, :size].to(place),
            self._config,
            sink_id=self._sink_id,
            guide=self._guide,
            on_token=self._telling("asking"),
        )

    def take(self, results: Sequence[RoundResult], *, num_generated: int = 0, notes: Notes | None = None) -> None:
        """Note that a round is done: its X leaves the window.

        Args:
            results: Of each stream.
            num_generated: Tokens of its Y that the teacher wrote.
            notes: What was studied of it.
        """
        size = self._stream.context_tokens
        context_tokens, follows_BM = self.window_BT[:, :size].shape[1], self.window_BT[:, size:]
        taught_BT, _ = self.next_texts(follows_BM[:, :0])
        self.window_BT = follows_BM
        self.behind_BT = taught_BT[:, max(0, taught_BT.shape[1] - self._stream.teacher_tokens) :]
        self.num_rounds += 1
        if self._own is not None and follows_BM.shape[1] >= 2:  # what was generated is not of the stream
            self.reservoir.add(self._own, round_number=self.num_rounds)
        self._own = None
        if notes is not None:
            self.studied.add(notes, round_number=self.num_rounds)
        if self._on_round is not None:
            self._on_round(
                [
                    Round(
                        number=self.num_rounds,
                        context_tokens=context_tokens,
                        sync_tokens=follows_BM.shape[1] + num_generated,
                        generated_tokens=num_generated,
                        num_steps=result.num_steps,
                        loss_before=result.losses[0],
                        loss_after=result.losses[-1],
                        outcome=result.outcome,
                        seconds=result.seconds,
                    )
                    for result in results
                ]
            )


def absorb_together(streams: Sequence[Stream], batch: Adapter) -> None:
    """One round of several streams whose windows are full, in one batch, as if each were absorbed alone.

    Args:
        streams: Of one `kind`, which may be of different age.
        batch: With as many streams; overwritten.

    Raises:
        AbsorptionError: If the round cannot be carried out; all streams are as they were.
    """
    first, place = streams[0], streams[0]._backbone.device

    def on_step(step: int, loss_B: Tensor) -> None:
        for index, stream in enumerate(streams):
            if stream._on_step is not None:
                stream._on_step(step, loss_B[index : index + 1])

    # What the base writes from nothing is the same for all of them.
    anchors = next((stream.anchors for stream in streams if stream.anchors is not None), None)
    earlier = []
    for stream in streams:
        stream.anchors = stream.anchors or anchors
        earlier.append(stream.earlier())
        anchors = stream.anchors
    texts = [stream.next_texts(stream.window_BT[:, :0]) for stream in streams]
    batch.restore([torch.cat(weights) for weights in zip(*(one.adapter.parameters() for one in streams), strict=True)])
    results = absorb_context(
        first._backbone,
        batch,
        torch.cat([taught_BT for taught_BT, _ in texts]).to(place),
        torch.cat([subsequent_BM for _, subsequent_BM in texts]).to(place),
        first._config,
        sink_id=first._sink_id,
        earlier=earlier,
        on_step=on_step if any(stream._on_step is not None for stream in streams) else None,
    )
    for index, (stream, result) in enumerate(zip(streams, results, strict=True)):
        stream.adapter.restore([weight[index : index + 1] for weight in batch.parameters()])
        stream.take([result])
