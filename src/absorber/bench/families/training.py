"""Training a family from scratch: one recipe for all, with a checkpoint from which an interrupted run goes on.

AdamW (.9, .95) on float32 weights, gradients clipped at 1, a learning rate that rises and falls. On CUDA products are
in bfloat16 and a step's passes are recorded as a CUDA graph, because a small recurrent model takes longer to launch
than to compute; what cannot be recorded runs as usual.

Shapes: R rows, T tokens.
"""

import contextlib
import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from absorber.backbone import Backbone, inspect
from absorber.bench.families.corpus import Corpus
from absorber.bench.families.settings import Families
from absorber.bench.families.shapes import build_family
from absorber.bench.speed import make_room, wait
from absorber.errors import BenchmarkError, DivergedError
from absorber.graphs import is_plain, without_masks

_NUM_POINTS = 50
"""Points of a training curve."""
_SAVE_SECONDS = 60
_WARM_UPS = 2  # steps before one is recorded, in which kernels are chosen


@dataclass(slots=True)
class Progress:
    """How far a training is; what a checkpoint says beside weights."""

    step: int = 0
    """Steps done."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """Steps done, and the mean loss of those since the point before, in nats."""
    seconds: float = 0.0
    """Wall time of the steps."""
    speeds: list[float] = field(default_factory=list)
    """Tokens a second between points."""
    peak_memory_bytes: int = 0
    """Largest allocation on an accelerator."""
    data: str = ""
    """Digest of all rows so far, in their order."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained family."""

    model: Any
    """Its model, in eval mode and frozen, with weights in float32."""
    progress: Progress
    """How it was trained."""


class Stopped(Exception):  # noqa: N818
    """Time is over; what was done is in the checkpoint."""


def train(
    task: Families,
    family: str,
    corpus: Corpus,
    *,
    device: torch.device,
    path: Path,
    say: Callable[[str], None] = lambda line: None,
    on_point: Callable[[int], None] = lambda step: None,
    deadline: float | None = None,
) -> Trained:
    """Train a family, or go on where its checkpoint is, or load it if that is complete.

    Args:
        task: The settings.
        family: Its name.
        corpus: Tokens.
        device: Where.
        path: The checkpoint.
        say: Told how it goes, with the time left.
        on_point: Called with the steps done, at each point of the curve.
        deadline: Time of `time.monotonic` after which training ends at the next point of its curve.

    Raises:
        Stopped: If the deadline was passed.
        BenchmarkError: If the checkpoint cannot be read.
        DivergedError: If the loss is not finite.
    """
    model = build_family(family, task.size, vocabulary=corpus.vocabulary, positions=task.row_tokens, seed=task.seed).to(
        device
    )
    optimizer, progress = _optimizer(model, task), Progress()
    if path.is_file():
        progress = _load(path, model, optimizer)
    if progress.step < task.num_steps:
        run = _Run(task, family, corpus, model, optimizer, progress, path, say, on_point)
        # A mask would have to be looked at, which a step that is recorded cannot do.
        maskless = without_masks(inspect(model)) if is_plain(inspect(model)) else contextlib.nullcontext()
        with quick_products(), maskless:
            run.go_on(deadline)
        del run  # with the memory of a recorded step
    optimizer.zero_grad()
    make_room(device)
    return Trained(model.eval().requires_grad_(False), progress)


class _Run:
    """The steps that are left."""

    def __init__(
        self,
        task: Families,
        family: str,
        corpus: Corpus,
        model: Any,
        optimizer: Any,
        progress: Progress,
        path: Path,
        say: Callable[[str], None],
        on_point: Callable[[int], None],
    ) -> None:
        self._task, self._family, self._corpus, self._model = task, family, corpus, model.train()
        self._optimizer, self._progress, self._path = optimizer, progress, path
        self._say, self._on_point = say, on_point
        self._passes = _Passes(inspect(model), say)

    def go_on(self, deadline: float | None) -> None:
        task, progress, device = self._task, self._progress, self._passes.device
        every = max(1, task.num_steps // _NUM_POINTS)
        begun, began_at, saved = time.perf_counter(), progress.step, time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        total, point = torch.zeros((), device=device), time.perf_counter()
        while progress.step < task.num_steps:
            total += self._step()
            if progress.step % every and progress.step < task.num_steps:
                continue
            wait(device)
            now = time.perf_counter()
            self._note(float(total), now - point)
            left = (now - begun) / (progress.step - began_at) * (task.num_steps - progress.step)
            self._say(
                f"{self._family}: step {progress.step} of {task.num_steps}, loss {progress.losses[-1][1]:.3f}, "
                f"{progress.speeds[-1]:,.0f} tokens/s, {left:.0f} s left"
            )
            self._on_point(progress.step)
            is_over = deadline is not None and time.monotonic() > deadline
            if is_over or progress.step == task.num_steps or now - saved > _SAVE_SECONDS:
                _save(self._path, self._model, self._optimizer, progress)
                saved = time.perf_counter()
            if is_over and progress.step < task.num_steps:
                raise Stopped
            total, point = torch.zeros((), device=device), time.perf_counter()

    def _step(self) -> Tensor:
        task, progress = self._task, self._progress
        ids_RT = self._corpus.batch(
            progress.step, rows=task.rows, length=task.row_tokens, pair_share=task.pair_share, seed=task.seed
        )
        progress.data = hashlib.sha256(progress.data.encode() + ids_RT.numpy().tobytes()).hexdigest()[:16]
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(task, progress.step)
        loss = self._passes(ids_RT)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        progress.step += 1
        return loss

    def _note(self, total: float, seconds: float) -> None:
        task, progress = self._task, self._progress
        steps = progress.step - (progress.losses[-1][0] if progress.losses else 0)
        loss = total / steps
        if not math.isfinite(loss):
            raise DivergedError(f"{self._family} diverged at step {progress.step}; use a smaller learning_rate")
        progress.losses.append((progress.step, loss))
        progress.seconds += seconds
        progress.speeds.append(steps * task.rows * task.row_tokens / seconds)
        if self._passes.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._passes.device)
            progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak)


class _Passes:
    """Forward and backward pass of a step, which leave gradients in the weights' `grad`."""

    def __init__(self, backbone: Backbone, say: Callable[[str], None]) -> None:
        self._backbone, self._say, self.device = backbone, say, backbone.device
        self._calls, self._recordable = 0, backbone.device.type == "cuda"
        self._graph: Any = None
        self._ids_RT: Tensor = torch.empty(0)
        self._loss = torch.empty(0)

    def __call__(self, ids_RT: Tensor) -> Tensor:
        self._calls += 1
        if self._recordable and self._graph is None and self._calls > _WARM_UPS:
            self._record(ids_RT)
        if self._graph is not None:
            self._ids_RT.copy_(ids_RT)
            self._graph.replay()
            return self._loss
        self._backbone.model.zero_grad(set_to_none=True)
        return self._compute(ids_RT.to(self.device))

    def _compute(self, ids_RT: Tensor) -> Tensor:
        loss = next_token_loss(self._backbone, ids_RT)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _record(self, ids_RT: Tensor) -> None:
        self._backbone.model.zero_grad(set_to_none=True)
        make_room(self.device)
        self._ids_RT, graph = ids_RT.to(self.device), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._loss = self._compute(self._ids_RT)
            self._graph = graph
        except RuntimeError as error:
            self._say(f"a step cannot be recorded and runs as usual: {str(error).splitlines()[0]}")
            self._recordable = False
            self._backbone.model.zero_grad(set_to_none=True)
            make_room(self.device)


def next_token_loss(backbone: Backbone, ids_RT: Tensor) -> Tensor:
    """Mean negative log-likelihood of all tokens but the first; products in bfloat16 on CUDA."""
    with torch.autocast("cuda", torch.bfloat16, enabled=ids_RT.device.type == "cuda", cache_enabled=False):
        final_RTD = backbone.decoder(input_ids=ids_RT[:, :-1], use_cache=False).last_hidden_state
        logits = backbone.logits(final_RTD)
    return functional.cross_entropy(logits.float().flatten(0, 1), ids_RT[:, 1:].flatten())


def learning_rate(task: Families, step: int) -> float:
    """That of a step, from 0 on."""
    rise = max(1, task.num_steps // 20)
    if step < rise:
        return task.learning_rate * (step + 1) / rise
    done = (step - rise) / max(1, task.num_steps - rise)
    return task.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


@contextlib.contextmanager
def quick_products() -> Iterator[None]:
    """Products of float32 in TF32 inside the `with` block, on devices that have it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _optimizer(model: Any, task: Families) -> Any:
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if weight.dim() != 2]
    groups = [{"params": matrices, "weight_decay": task.weight_decay}, {"params": others, "weight_decay": 0.0}]
    on_gpu = matrices[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=task.learning_rate, betas=(0.9, 0.95), fused=on_gpu)


def speed_of(progress: Progress) -> float:
    """Tokens a second, the median of what was measured; the first point, in which kernels are chosen, is left out."""
    return statistics.median(progress.speeds[1:] or progress.speeds)


def _save(path: Path, model: Any, optimizer: Any, progress: Progress) -> None:
    values = {name: getattr(progress, name) for name in Progress.__dataclass_fields__}
    scratch = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": values}, scratch)
    os.replace(scratch, path)


def _load(path: Path, model: Any, optimizer: Any) -> Progress:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        return Progress(**found["progress"])
    except Exception as error:  # a damaged file makes its readers raise whatever they raise
        raise BenchmarkError(f"cannot read the checkpoint {path}: {error}. Delete it to train anew") from error
