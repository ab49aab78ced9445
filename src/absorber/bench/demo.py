"""The main job once, small enough for two cores: a book streams through a window and is absorbed; did it help?"""

import dataclasses
import importlib.resources
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from absorber.backbone import Backbone, base_name, inspect, untouched
from absorber.bench.scoring import gap_closed, passage_nll, predict_passage
from absorber.config import AbsorbConfig, StreamConfig
from absorber.generation import Decoder
from absorber.memory import Memory, Round
from absorber.models import DEFAULT_MODEL
from absorber.progress import OnProgress
from absorber.session import Session
from absorber.text import cut

# Short windows, few steps and few anchors, for a CPU. The learning rate is higher because there are half as many steps;
# nothing else was tried on this book.
CONFIG = AbsorbConfig(max_steps=8, learning_rate=1e-4, anchor_texts=16)
STREAM = StreamConfig(context_tokens=128, sync_tokens=256, max_new_tokens=48)
NUM_ROUNDS = 10
PASSAGE_TOKENS = 256
BOOK = "Alice's Adventures in Wonderland"
QUESTION = "What is happening to Alice?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """What was measured."""

    model: str
    """Base model."""
    num_tokens: int
    """Tokens read."""
    window_tokens: int
    """n + m."""
    passage_tokens: int
    """Tokens of the following passage that was scored."""
    rounds: list[Round]
    """The ledger."""
    cache_tokens: list[int]
    """Tokens read, at each point of the next two."""
    window_cache_bytes: list[int]
    """Keys and values held for the window."""
    full_cache_bytes: list[int]
    """Keys and values that full attention would hold."""
    memory_bytes: int
    """Bytes of the adapter."""
    nll_full: float
    """Passage given all that was read, in nats per token; the next four likewise."""
    nll_window: float
    """Given the window's last m tokens."""
    nll_window_memory: float
    """Given the same and the memory."""
    nll_nothing: float
    """Given nothing."""
    nll_memory: float
    """Given the memory alone."""
    question: str
    """Asked at the end."""
    answer: str
    """With window and memory."""
    answer_without: str
    """With the window alone."""

    @property
    def windowed_gap_closed(self) -> float:
        """1: as good as full attention."""
        return gap_closed(self.nll_window, self.nll_window_memory, self.nll_full)

    @property
    def contextless_gap_closed(self) -> float:
        """The same, when nothing but the memory is there."""
        return gap_closed(self.nll_nothing, self.nll_memory, self.nll_full)

    @property
    def helped(self) -> bool:
        """Whether the memory made the passage more likely, with and without the window."""
        return self.nll_window_memory < self.nll_window and self.nll_memory < self.nll_nothing

    @property
    def weights_note(self) -> str:
        """What has to be said of the model beside every number."""
        return "weights 4-bit in origin (Q4_1)" if self.model == DEFAULT_MODEL else ""

    def to_dict(self) -> dict[str, Any]:
        """All of it as values that JSON can hold."""
        values = dataclasses.asdict(self)
        for name in ("windowed_gap_closed", "contextless_gap_closed"):
            ratio = getattr(self, name)
            values[name] = ratio if math.isfinite(ratio) else None
        return values | {"helped": self.helped, "weights_note": self.weights_note}


def demonstrate(
    model: Any,
    tokenizer: Any,
    *,
    config: AbsorbConfig = CONFIG,
    stream: StreamConfig = STREAM,
    num_rounds: int = NUM_ROUNDS,
    passage_tokens: int = PASSAGE_TOKENS,
    progress: OnProgress | None = None,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[Memory], None] = lambda memory: None,
) -> Demonstration:
    """Stream the book through a window, absorb what leaves it, and score the passage that follows.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        config: How a context is absorbed.
        stream: Window sizes.
        num_rounds: Rounds to absorb.
        passage_tokens: Length of the passage.
        progress: Called before each step and after each round.
        say: Called with a line of text before what follows the stream.
        keep: Called with the memory as soon as the stream is absorbed, or interrupted.
    """
    backbone = inspect(model)
    num_tokens = num_rounds * stream.context_tokens + stream.sync_tokens
    book_1T = _book(tokenizer, num_tokens + passage_tokens)
    read_1T, passage_1P = book_1T[:, :num_tokens], book_1T[:, num_tokens:]
    cache_tokens, window_bytes = [], []
    with Session(model, tokenizer, config, stream, progress=progress) as session:
        try:
            # A window at first, then what fills it again: a round each time.
            for piece_1T in read_1T.tensor_split(_ends(num_tokens, stream), dim=1):
                session.append_ids(piece_1T[0].tolist())
                session.read_window()
                cache_tokens.append(session.num_tokens)
                window_bytes.append(session.cache_bytes)
        finally:
            keep(session.memory)
        say("scoring the passage that follows")
        scores = _scores(backbone, session.memory, read_1T, passage_1P, stream.sync_tokens)
        full_bytes = _full_cache_bytes(backbone, read_1T, stream)
        say("asking a question")
        answer, answer_without = session.ask(QUESTION), _without_memory(session).ask(QUESTION)
        return Demonstration(
            model=base_name(model),
            num_tokens=num_tokens,
            window_tokens=stream.window_tokens,
            passage_tokens=passage_tokens,
            rounds=session.memory.ledger,
            cache_tokens=cache_tokens,
            window_cache_bytes=window_bytes,
            full_cache_bytes=[round(full_bytes * tokens / num_tokens) for tokens in cache_tokens],
            memory_bytes=session.memory.adapter.num_bytes,
            question=QUESTION,
            answer=answer,
            answer_without=answer_without,
            **scores,
        )


def _book(tokenizer: Any, num_tokens: int) -> Tensor:
    text = importlib.resources.files("absorber").joinpath("data/alice.txt").read_text(encoding="utf-8")
    token_ids: list[int] = []
    for piece in cut([text]):
        token_ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(token_ids) >= num_tokens:
            break
    return torch.tensor([token_ids[:num_tokens]])


def _ends(num_tokens: int, stream: StreamConfig) -> list[int]:
    """Where to cut the stream: just before each round, and at its end."""
    return list(range(stream.window_tokens - 1, num_tokens, stream.context_tokens))


def _scores(
    backbone: Backbone, memory: Memory, read_1T: Tensor, passage_1P: Tensor, window_tokens: int
) -> dict[str, float]:
    def nll(prefix_1T: Tensor) -> float:
        final_BPD = predict_passage(backbone, prefix_1T, passage_1P, sink_id=memory.sink_id)
        return float(passage_nll(backbone, final_BPD, passage_1P))

    window_1T, nothing_1T = read_1T[:, -window_tokens:], read_1T[:, :0]
    scores = {"nll_full": nll(read_1T), "nll_window": nll(window_1T), "nll_nothing": nll(nothing_1T)}
    with memory.applied_to(backbone.model):
        return scores | {"nll_window_memory": nll(window_1T), "nll_memory": nll(nothing_1T)}


def _full_cache_bytes(backbone: Backbone, read_1T: Tensor, stream: StreamConfig) -> int:
    with untouched(backbone.model):
        decoder = Decoder(backbone, read_tokens=stream.read_tokens)
        decoder.read(read_1T[0].tolist())
    return decoder.cache_bytes


def _without_memory(session: Session) -> Session:
    """A session with the same window whose memory is empty."""
    pristine = Session(session.model, session.tokenizer, session.memory.config, session.memory.stream)
    pristine.append_ids(session.window_ids)
    return pristine


def draw(demo: Demonstration, path: Path) -> None:
    """Draw loss by round, nll bars and cache growth into an image file."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, bars, cache = figure.subplots(1, 3)
    numbers = [line.number for line in demo.rounds]
    loss.plot(numbers, [line.loss_before for line in demo.rounds], "o-", color="#999999", label="before the round")
    loss.plot(numbers, [line.loss_after for line in demo.rounds], "o-", color="#1f77b4", label="after it")
    loss.set(title="Synchronization loss", xlabel="round", ylabel="nats per token", ylim=(0, None))
    loss.legend(frameon=False)

    names = ["full\nattention", "window", "window +\nmemory", "nothing", "memory\nalone"]
    values = [demo.nll_full, demo.nll_window, demo.nll_window_memory, demo.nll_nothing, demo.nll_memory]
    drawn = bars.bar(names, values, color=["#555555", "#bbbbbb", "#1f77b4", "#bbbbbb", "#1f77b4"])
    bars.bar_label(drawn, fmt="%.3f", fontsize=8)
    spread = max(values) - min(values)
    bars.set_ylim(min(values) - spread, max(values) + 0.2 * spread)
    bars.set_title(f"nll of the next {demo.passage_tokens} tokens (axis cut)")
    bars.set_ylabel("nats per token")
    bars.tick_params(axis="x", labelsize=8)

    million = 1e6
    cache.plot(
        demo.cache_tokens, [size / million for size in demo.full_cache_bytes], color="#555555", label="full attention"
    )
    cache.plot(demo.cache_tokens, [size / million for size in demo.window_cache_bytes], color="#1f77b4", label="window")
    cache.set(title="Cache", xlabel="tokens read", ylabel="MB", ylim=(0, None))
    cache.legend(frameon=False)
    note = f"; {demo.weights_note}" if demo.weights_note else ""
    figure.suptitle(f"{BOOK} through a window of {demo.window_tokens} tokens; {demo.model}{note}", fontsize=10)
    figure.savefig(path, dpi=130)
