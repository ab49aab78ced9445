"""What absorbing costs: tokens a second over all streams, against other ways to train as many steps on the same model.

    matmul             the device's rate in a large product, measured in the same run; what MFU is a share of
    one-by-one         rounds of a single stream, one after another
    peft-one-by-one    the same with a plain training loop: PEFT, next-token loss, AdamW, K steps on m tokens
    peft-lora          that loop with one adapter for all rows, K steps on S x m tokens
    absorber           rounds of S streams at once, each with an adapter of its own, a teacher, replay and anchors
    absorber-ages      the same of streams of different age, which replay other things at other steps

All take K steps to absorb n tokens of a stream. Weights and tokens are random. On a CPU only ratios count.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from absorber.backbone import Backbone, checkpointed, num_features
from absorber.bench.latency import Desk, Latency
from absorber.bench.speed import Cell, Figure, make_room, matmul_rate, milliseconds
from absorber.config import AbsorbConfig
from absorber.errors import DeviceMemoryError

Run = Callable[[], list[Figure]]


def step_flops(backbone: Backbone, config: AbsorbConfig, *, num_streams: int, num_tokens: int) -> float:
    """Floating-point operations that a student step needs at least: two per weight and token in each product.

    The base's weights are in a forward and a backward pass, those of the adapter in a third for their own gradients;
    the head is also in the teacher's logits; attention is causal, and its backward pass takes two and a half times as
    long. Blocks that are computed again are not counted.

    Args:
        backbone: The model; every projection of its blocks has an adapter.
        config: Rank.
        num_streams: Rows.
        num_tokens: Of each, with its sink.
    """
    features = [num_features(projection) for projection in backbone.projections.values()]
    base = sum(inputs * outputs for inputs, outputs in features)
    low = config.adapter_rank * sum(inputs + outputs for inputs, outputs in features)
    hidden, vocabulary = int(backbone.model.config.hidden_size), int(backbone.model.config.vocab_size)
    linear = 2 * num_tokens * (2 * base + 3 * low + 3 * hidden * vocabulary)
    attention = 3.5 * 2 * num_tokens**2 * hidden * len(backbone.blocks)
    return num_streams * (linear + attention)


@dataclass(frozen=True, slots=True)
class Cost:
    """What is measured."""

    task: Latency
    """Rounds; its batches are the numbers of streams."""

    def cells(self, backbone: Backbone) -> Iterator[Cell]:
        """Everything to be measured, references first.

        Args:
            backbone: A model whose weights may be trained beside and put back.
        """
        rates: dict[str, float] = {}
        window = self.task.context_tokens + self.task.sync_tokens
        yield Cell("matmul", 0, self.task.config(1), lambda: [_matmul(backbone, rates)])
        for batch in self.task.batches:
            bench = _Bench(self.task, backbone, batch, rates)
            for method, run in {**bench.references(), "absorber": bench.absorber}.items():
                yield Cell(method, window, self.task.config(batch), partial(bench.noted, method, run))
            if batch > 1:
                yield Cell("absorber-ages", window, self.task.config(batch), bench.of_all_ages)


def _matmul(backbone: Backbone, rates: dict[str, float]) -> Figure:
    rates["matmul"] = matmul_rate(backbone.device, backbone.model.dtype)
    return Figure("matmul_rate", (rates["matmul"] / 1e12,), "TFLOP/s")


class _Bench:
    """The cells of S streams."""

    def __init__(self, task: Latency, backbone: Backbone, batch: int, rates: dict[str, float]) -> None:
        self._task, self._backbone, self._batch, self._rates = task, backbone, batch, rates
        self._speeds: dict[str, float] = {}

    def references(self) -> dict[str, Run]:
        """What the absorber is compared with."""
        alone: dict[str, Run] = {}
        if self._batch > 1:
            alone = {"one-by-one": self.one_by_one, "peft-one-by-one": partial(self.peft, 1)}
        return {**alone, "peft-lora": partial(self.peft, self._batch)}

    def noted(self, method: str, run: Run) -> list[Figure]:
        """Run a cell, and keep its speed for the ratios."""
        figures = run()
        for figure in figures:
            if figure.metric == "absorbed_tokens_per_second":
                self._speeds[method] = max(figure.samples)
        return figures

    def one_by_one(self) -> list[Figure]:
        return Desk(self._task, self._backbone, 1).round("if needed")

    def of_all_ages(self) -> list[Figure]:
        return Desk(self._task, self._backbone, self._batch).round("if needed", of_all_ages=True)

    def absorber(self) -> list[Figure]:
        desk = Desk(self._task, self._backbone, self._batch)
        figures = desk.round("if needed")
        speed = max(figure.samples[0] for figure in figures if figure.metric == "absorbed_tokens_per_second")
        for method, run in self.references().items():
            if method not in self._speeds:
                try:
                    self.noted(method, run)
                except (torch.OutOfMemoryError, DeviceMemoryError):
                    continue
            figures.append(Figure(f"times_{method}", (speed / self._speeds[method],), ""))
        if "matmul" not in self._rates:
            _matmul(self._backbone, self._rates)
        flops = step_flops(
            self._backbone, self._task.absorb, num_streams=self._batch, num_tokens=self._task.sync_tokens + 1
        )
        try:
            parts = {figure.metric: figure.samples for figure in desk.parts()}
        except (torch.OutOfMemoryError, DeviceMemoryError):
            return figures  # it needs checkpointing, whose steps are no measure of the kernels
        shares = tuple(flops / taken * 1000 / self._rates["matmul"] for taken in parts["student_step_ms"])
        return [*figures, Figure("mfu", shares, "ratio")]

    def peft(self, rows: int) -> list[Figure]:
        """K steps on that many texts at once, checkpointed if needed; the model is afterwards as it was."""
        from peft import LoraConfig, get_peft_model

        rank = self._task.absorb.rank
        settings = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that transformers has changed
            model = get_peft_model(self._backbone.model, settings)
        taken: tuple[float, ...] = ()
        try:
            with contextlib.suppress(torch.OutOfMemoryError):
                taken = self._train(model, rows, checkpointing=False)
            if not taken:
                model.zero_grad(set_to_none=True)
                make_room(self._backbone.device)
                taken = self._train(model, rows, checkpointing=True)
        finally:
            model.unload()
        speeds = tuple(1000 * rows * self._task.context_tokens / each for each in taken)
        return [Figure("round_ms", taken, "ms"), Figure("absorbed_tokens_per_second", speeds, "tokens/s")]

    def _train(self, model: Any, rows: int, *, checkpointing: bool) -> tuple[float, ...]:
        task = self._task
        ids_BT = Desk(task, self._backbone, rows).tokens(task.sync_tokens)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=task.absorb.learning_rate, fused=True)

        def loop() -> None:
            for _ in range(task.absorb.max_steps):
                with checkpointed(self._backbone, active=checkpointing):
                    loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return milliseconds(self._backbone.device, loop, repeats=task.repeats if rows == 1 else 1)
