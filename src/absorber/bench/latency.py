"""Milliseconds per generated token after N tokens, with and without what absorbing them costs; table 1 of the paper.

    absorber           window and memory, its products beside those of the base      N tokens before, one token a step
    absorber-merged    the same, with weights that hold both (one stream)
    truncation         the window alone: the same decoder without a memory
    full               everything in the cache, which is of fixed size and read by a recorded step
    full-eager         everything in the cache of transformers, which grows; filled with random numbers
    mamba, ttt         a state space model or TTT-Linear, whose state does not depend on N
    absorber-round     one round: what absorbing n tokens takes (N is the window)
    absorber-parts     the passes that a round and an answer are made of

A step gives each of B streams a token; all times are of a step. Weights and tokens are random: neither speed nor memory
depends on them. What absorbing costs per token is (round + reading the window again) / n, whatever N is; rounds are
measured with all that they have to replay. On a CPU only ratios within one run count.

Shapes: B streams, T tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from absorber.absorption import Earlier, absorb_context
from absorber.adapter import Adapter
from absorber.backbone import Backbone, read_on, untouched
from absorber.bench.speed import Cell, Figure, make_room, milliseconds
from absorber.config import AbsorbConfig
from absorber.decoding import StaticDecoder, Way, usable
from absorber.errors import BenchmarkError, ConfigError, DeviceMemoryError
from absorber.fused_adapter import together
from absorber.fused_text import fused
from absorber.graphs import graphs_of
from absorber.lessons import Anchors, Lesson, Part, Past
from absorber.optimizer import new_optimizer, take_step
from absorber.student import gradients, look
from absorber.teacher import teach

METHODS = (
    "absorber-round",
    "absorber-parts",
    "absorber",
    "absorber-merged",
    "truncation",
    "full",
    "full-eager",
    "mamba",
    "ttt",
)
LENGTHS = (1024, 4096, 16384, 65536, 131072)
"""N, if nobody says otherwise."""

Checkpointing = Literal["never", "always", "if needed"]

_EAGER_TOKENS = 16
_MAMBA_PREFIX = 8
_SINK = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """What is measured.

    Raises:
        ConfigError: If a number is less than one.
    """

    lengths: tuple[int, ...] = LENGTHS
    """N."""
    batches: tuple[int, ...] = (1, 8)
    """B."""
    num_tokens: int = 128
    """Tokens generated after the N."""
    context_tokens: int = 512
    """n: tokens absorbed a round."""
    sync_tokens: int = 1024
    """m: tokens of the window that stay."""
    absorb: AbsorbConfig = field(default_factory=AbsorbConfig)
    """How a round is absorbed."""
    eager: bool = False
    """Record no step of absorbing as a CUDA graph."""
    repeats: int = 3
    """How often each thing is timed."""
    seed: int = 0
    """Of the tokens."""

    def __post_init__(self) -> None:
        numbers = (*self.lengths, *self.batches, self.num_tokens, self.context_tokens, self.repeats)
        if not self.lengths or not self.batches or min(numbers) < 1 or self.sync_tokens < 2:
            raise ConfigError(f"lengths, batches, tokens and repeats are 1 or more, sync tokens 2; got {self}")

    def window(self, length: int) -> int:
        """How many of N tokens are in the window: all, or as many as it holds in the mean between two rounds."""
        return min(length, self.sync_tokens + self.context_tokens // 2)

    def config(self, batch: int) -> dict[str, Any]:
        """The settings of a cell, for its records."""
        return {
            "batch": batch,
            "weights": "random",
            "num_tokens": self.num_tokens,
            "context_tokens": self.context_tokens,
            "sync_tokens": self.sync_tokens,
            "max_steps": self.absorb.max_steps,
            "rank": self.absorb.rank,
            "eager": self.eager,
            "repeats": self.repeats,
        }

    def cells(self, backbone: Backbone, methods: Sequence[str] = ()) -> Iterator[Cell]:
        """Everything to be measured, the most important first.

        Args:
            backbone: The model.
            methods: Some of `METHODS`; all that the model can do if none is named.

        Raises:
            BenchmarkError: If there is no such method, or the model cannot do it.
        """
        own = "ttt" if "ttt" in backbone.model.config.model_type else "mamba"
        able = [name for name in METHODS if name not in ("mamba", "ttt")] if usable(backbone) else [own]
        unknown = sorted(set(methods) - set(able))
        if unknown:
            raise BenchmarkError(f"{', '.join(unknown)} cannot be measured with this model; it has {', '.join(able)}")
        chosen = [name for name in able if not methods or name in methods]
        for batch in self.batches:
            desk = Desk(self, backbone, batch)
            for method in chosen:
                yield from desk.cells(method)


class Desk:
    """The cells of B streams, which share an adapter and what a round was found to take."""

    def __init__(self, task: Latency, backbone: Backbone, batch: int) -> None:
        """Begin with nothing measured, and no adapter."""
        self._task, self._backbone, self._batch = task, backbone, batch
        self._device = backbone.device
        self._adapter: Adapter | None = None
        self._round_ms: float | None = None
        self._tried = False

    def cells(self, method: str) -> Iterator[Cell]:
        """Those of one method."""
        task, config = self._task, self._task.config(self._batch)
        window = task.context_tokens + task.sync_tokens
        if method == "absorber-round":
            ways: tuple[Checkpointing, ...] = ("never", "always") if self._batch == 1 else ("if needed",)
            for checkpointing in ways:
                more = {"checkpointing": checkpointing}
                yield Cell(method, window, config | more, self._keeping(partial(self.round, checkpointing)))
        elif method == "absorber-parts":
            yield Cell(method, window, config, self._keeping(self.parts))
        elif method in ("mamba", "ttt"):
            for length in task.lengths:
                yield Cell(method, length, config | {"tokens_read": _MAMBA_PREFIX}, self.recurrent)
        elif method != "absorber-merged" or self._batch == 1:
            for length in task.lengths:
                yield Cell(method, length, config, self._of_length(method, length))

    def _of_length(self, method: str, length: int) -> Callable[[], list[Figure]]:
        match method:
            case "absorber":
                return self._keeping(lambda: self.absorber(length, "beside"))
            case "absorber-merged":
                return self._keeping(lambda: self.absorber(length, "merged"))
            case "truncation":
                return self._alone(lambda: self.decode(self._task.window(length), None))
            case "full":
                return self._alone(lambda: self.decode(length, None))
        return self._alone(lambda: self.full_eager(length))

    def _keeping(self, run: Callable[[], list[Figure]]) -> Callable[[], list[Figure]]:
        """A cell that needs the adapter; without room for it, it has none afterwards either."""

        def work() -> list[Figure]:
            try:
                return run()
            except (torch.OutOfMemoryError, DeviceMemoryError):
                self._adapter = None
                raise

        return work

    def _alone(self, run: Callable[[], list[Figure]]) -> Callable[[], list[Figure]]:
        """A cell without memory, whose peak must not count an adapter."""

        def work() -> list[Figure]:
            self._adapter = None
            make_room(self._device)
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)
            return run()

        return work

    def clear(self) -> None:
        """Give back the adapter."""
        self._adapter = None

    @property
    def adapter(self) -> Adapter:
        """Weights of B streams, made when they are first needed."""
        if self._adapter is None:
            self._adapter = Adapter.fresh(self._backbone, self._task.absorb, num_streams=self._batch)
        return self._adapter

    def tokens(self, length: int, *, rows: int | None = None) -> Tensor:
        """Token ids [B, T]."""
        vocabulary = self._backbone.model.config.vocab_size
        generator = torch.Generator().manual_seed(self._task.seed + length)
        return torch.randint(1, vocabulary, (rows or self._batch, length), generator=generator).to(self._device)

    # --- Decoding

    def absorber(self, length: int, way: Way) -> list[Figure]:
        """Decode with a memory, and add to each token what absorbing it will cost."""
        task = self._task
        figures = self.decode(task.window(length), self.adapter, way=way, again=task.sync_tokens)
        found = {figure.metric: figure for figure in figures}
        if self._round_ms is None and not self._tried:
            self._tried = True
            with contextlib.suppress(torch.OutOfMemoryError, DeviceMemoryError):
                self.round("if needed")
        if self._round_ms is not None:
            absorbed = (self._round_ms + min(found["window_again_ms"].samples)) / task.context_tokens
            figures.append(Figure("absorb_ms_per_token", (absorbed,), "ms"))
            both = tuple(decoded + absorbed for decoded in found["ms_per_token"].samples)
            figures.append(Figure("ms_per_token_with_absorption", both, "ms"))
        return figures

    def decode(self, num_read: int, adapter: Adapter | None, *, way: Way = "beside", again: int = 0) -> list[Figure]:
        """Read and write with the quick decoder; also read so many tokens again, as after a round."""
        task = self._task
        decoder = StaticDecoder(
            self._backbone,
            read_tokens=max(num_read, again),
            capacity=num_read + task.num_tokens,
            adapter=adapter,
            way=way,
            num_rows=self._batch,
        )
        given_BT, window_BT = self.tokens(num_read), self.tokens(again or 1)

        def read(text_BT: Tensor = given_BT) -> None:
            decoder.reset()
            decoder.read_rows(text_BT)

        def write() -> None:
            with decoder.aside():
                decoder.write_rows(task.num_tokens)

        long = num_read > 8192  # its reading takes seconds
        first = milliseconds(self._device, read, repeats=1 if long else task.repeats, warm_ups=0 if long else 2)
        written = milliseconds(self._device, write, repeats=task.repeats)
        figures = [
            Figure("ms_per_token", tuple(taken / task.num_tokens for taken in written), "ms"),
            Figure("first_token_seconds", tuple(taken / 1000 for taken in first), "s"),
        ]
        if again:  # at the third time by a recorded pass, as in a stream
            taken = milliseconds(self._device, lambda: read(window_BT), repeats=task.repeats, warm_ups=2)
            figures.append(Figure("window_again_ms", taken, "ms"))
        decoder.release()
        return figures

    @torch.no_grad()
    def full_eager(self, length: int) -> list[Figure]:
        """Write one kernel after another, in a cache that grows."""
        config = self._backbone.model.config
        features = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = DynamicCache(config=config)
        for layer in range(len(self._backbone.blocks)):
            shape = (self._batch, config.num_key_value_heads, length, features)
            keys, values = (torch.randn(shape, device=self._device, dtype=self._backbone.model.dtype) for _ in range(2))
            cache.update(keys, values, layer)

        def write() -> None:
            next_B1 = self.tokens(1)
            for _ in range(_EAGER_TOKENS):
                final_BTD, _ = read_on(self._backbone, next_B1, cache)
                next_B1 = self._backbone.logits(final_BTD[:, -1]).argmax(dim=-1, keepdim=True)

        taken = milliseconds(self._device, write, repeats=self._task.repeats)
        return [Figure("ms_per_token", tuple(each / _EAGER_TOKENS for each in taken), "ms")]

    @torch.no_grad()
    def recurrent(self) -> list[Figure]:
        """One token after a short prefix: the state has the same size after any number of tokens."""
        model = self._backbone.model
        output = model(self.tokens(_MAMBA_PREFIX), use_cache=True)
        name = next(
            key for key in ("cache", "cache_params", "past_key_values") if getattr(output, key, None) is not None
        )
        next_B1, cache = self.tokens(1).clone(), getattr(output, name)

        def step() -> None:
            logits = model(next_B1, use_cache=True, **{name: cache}).logits
            next_B1.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))

        step()
        replay = step
        if self._device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            # A model that looks at values while it runs cannot be recorded, and is measured as it is.
            with contextlib.suppress(RuntimeError):
                with torch.cuda.graph(graph):
                    step()
                replay = graph.replay

        def write() -> None:
            for _ in range(self._task.num_tokens):
                replay()

        taken = milliseconds(self._device, write, repeats=self._task.repeats)
        recorded = Figure("recorded", (float(replay is not step),), "")
        return [Figure("ms_per_token", tuple(each / self._task.num_tokens for each in taken), "ms"), recorded]

    # --- Absorbing

    def absorb_config(self, *, checkpointing: bool = False) -> AbsorbConfig:
        """The settings of a round, recorded where that is possible, whose loss may rise on random tokens."""
        recorded = self._device.type == "cuda" and not self._task.eager
        return self._task.absorb.replace(cuda_graphs=recorded, checkpointing=checkpointing, rollback="nonfinite")

    def round(self, checkpointing: Checkpointing, *, of_all_ages: bool = False) -> list[Figure]:
        """One round with everything that it has to replay, from the teacher's pass to the last look.

        Args:
            checkpointing: Whether activations are computed again.
            of_all_ages: Let each stream be of another age, so that it replays other things at other steps.
        """
        if checkpointing == "if needed":
            with contextlib.suppress(torch.OutOfMemoryError, DeviceMemoryError):
                return self.round("never", of_all_ages=of_all_ages)
            self._adapter = None  # with the graphs that were recorded of its steps
            make_room(self._device)
            return self.round("always", of_all_ages=of_all_ages)
        task, config = self._task, self.absorb_config(checkpointing=checkpointing == "always")
        n, m = task.context_tokens, task.sync_tokens
        texts = self.tokens(n).cpu(), self.tokens(m).cpu()
        anchors = None
        if config.has_anchors:
            anchors = Anchors(self.tokens(config.anchor_tokens, rows=config.anchor_texts).cpu())
        ages = [slice(row, row + 1) for row in range(self._batch)] if of_all_ages else [slice(None)]
        earlier = [
            Earlier(
                [Past(texts[0][rows], texts[1][rows]) for _ in range(config.replay_rounds)],
                anchors,
                1 + config.replay_rounds + age,
                Past(texts[0][rows], texts[1][rows]),
            )
            for age, rows in enumerate(ages)
        ]

        def work() -> None:  # the first time asks the teacher for all that is drawn, as the rounds before would have
            absorb_context(
                self._backbone,
                self.adapter,
                self.tokens(n),
                self.tokens(m),
                config,
                sink_id=_SINK,
                earlier=earlier if of_all_ages else earlier[0],
            )

        taken = milliseconds(self._device, work, repeats=task.repeats if self._batch == 1 else 1)
        if not of_all_ages:
            self._round_ms = min(taken) if self._round_ms is None else min(*taken, self._round_ms)
        per_token = tuple(each / n for each in taken)
        return [
            Figure("round_ms", taken, "ms"),
            Figure("absorb_ms_per_token", per_token, "ms"),
            Figure("absorbed_tokens_per_second", tuple(1000 * self._batch / each for each in per_token), "tokens/s"),
            Figure("checkpointing", (float(config.checkpointing),), ""),
        ]

    def parts(self) -> list[Figure]:
        """The passes that a round is made of, one by one."""
        task, config, adapter = self._task, self.absorb_config(), self.adapter
        lesson = Lesson(self.tokens(task.context_tokens), self.tokens(task.sync_tokens), 0, (1,))
        parts = [Part(lesson, None, own=True)]
        graphs = graphs_of(self._backbone, adapter) if config.cuda_graphs else None
        running_B = torch.ones(self._batch, dtype=torch.bool)
        optimizer = new_optimizer(adapter.parameters(), config)
        before = adapter.snapshot()
        texts = (lesson.context_BN, lesson.subsequent_BM)

        def asked() -> None:
            lesson.target = teach(self._backbone, adapter, *texts, config, sink_id=_SINK, graphs=graphs)

        def student() -> None:
            gradients(self._backbone, adapter, before, parts, config, sink_id=_SINK, step=0, graphs=graphs)

        def looked() -> None:
            look(self._backbone, adapter, before, parts, config, sink_id=_SINK, step=0, graphs=graphs)

        def optimize() -> None:
            take_step(optimizer, adapter, running_B, 0.0)

        works: dict[str, Callable[[], Any]] = {"teacher_ms": asked, "student_step_ms": student, "look_ms": looked}
        works |= {"optimizer_ms": optimize, "snapshot_ms": adapter.snapshot}
        with (
            untouched(self._backbone.model),
            adapter.attached(self._backbone),
            fused(self._backbone),
            together(self._backbone, adapter),
        ):
            figures = [
                Figure(name, milliseconds(self._device, work, repeats=task.repeats, warm_ups=2), "ms")
                for name, work in works.items()
            ]
        for weight in adapter.parameters():
            weight.grad = None
        return figures
