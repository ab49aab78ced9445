"""How much of a stream a method keeps, round by round, and what that costs elsewhere.

After each round the next 512 tokens are scored given the window and the memory (windowed), and the memory alone
(contextless); unrelated text of several kinds is scored with and without the memory (drift).

Shapes: B streams, T tokens, P of the passage, D hidden.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from absorber.backbone import Backbone, sentence_breaks
from absorber.bench.data import Kind, Split, documents, streams
from absorber.bench.methods import Method, Reader, Setting
from absorber.bench.methods.full import Full
from absorber.bench.records import Record, gap_interval
from absorber.bench.scoring import passage_kl, passage_nll, predict_passage
from absorber.bench.task import Checkpoint, to_record
from absorber.config import StreamConfig

DRIFT_KINDS: tuple[Kind, ...] = ("books", "dialogues", "encyclopedia", "code")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The protocol's settings."""

    name: ClassVar[str] = "retention"
    """What its records call the task."""
    reference: ClassVar[str | None] = "truncation"
    """Without memory; no gap can be computed without it."""
    kind: Kind = "books"
    """What is streamed."""
    split: Split = "report"
    """Which half of the documents."""
    num_rounds: int = 10
    """Rounds; the stream has m + n * rounds tokens."""
    num_streams: int = 24
    """B."""
    context_tokens: int = 512
    """n."""
    sync_tokens: int = 1024
    """m."""
    passage_tokens: int = 512
    """P."""
    seed: int = 0
    """Of streams and methods."""

    @property
    def stream(self) -> StreamConfig:
        """n and m."""
        return StreamConfig(context_tokens=self.context_tokens, sync_tokens=self.sync_tokens)

    @property
    def checkpoints(self) -> list[int]:
        """After which rounds is measured: each of the first ten, then every tenth."""
        return [number for number in range(1, self.num_rounds + 1) if number <= 10 or number % 10 == 0]

    def config(self) -> dict[str, Any]:
        """What a record says of the task."""
        values = dataclasses.asdict(self)
        del values["seed"]
        return values

    def prepare(self, model: Any, tokenizer: Any, data_dir: Path) -> "Streams":
        """See `prepare`."""
        return prepare(self, model, tokenizer, data_dir)

    def measure(
        self, method: Method, backbone: Backbone, texts: "Streams", *, sink_id: int, on_round: Callable[[int], None]
    ) -> Iterator[Checkpoint]:
        """See `measure`."""
        return measure(self, method, backbone, texts, sink_id=sink_id, on_round=on_round)

    def to_records(
        self,
        method: str,
        method_config: dict[str, Any],
        measured: Sequence[Checkpoint],
        reference: Sequence[Checkpoint],
        facts: dict[str, Any],
    ) -> list[Record]:
        """See `to_records`."""
        return to_records(self, method, method_config, measured, reference, facts)


@dataclass(slots=True)
class Streams:
    """The texts of one run, the same for all methods, and the references after each checkpoint."""

    token_ids_BT: Tensor
    """Everything that is read, and the last passage."""
    breaks_V: Tensor
    """For each token, whether a sentence may begin after it."""
    drift: dict[str, Tensor]
    """Unrelated passages [B, P] by kind, of the other half of the documents."""
    full_BPD: dict[int, Tensor] = field(default_factory=dict)
    """Final states of full attention by round."""
    drift_nll: dict[str, Tensor] = field(default_factory=dict)
    """Without memory [B] by kind."""


def prepare(
    task: Retention, model: Any, tokenizer: Any, data_dir: Path, *, drift_kinds: Sequence[Kind] = DRIFT_KINDS
) -> Streams:
    """Read and tokenize what a run needs.

    Raises:
        BenchmarkError: If there is too little text.
    """
    length = task.sync_tokens + task.context_tokens * task.num_rounds + task.passage_tokens

    def cut(kind: Kind, split: Split, num_tokens: int) -> Tensor:
        pairs = documents(kind, data_dir, split)
        return streams(tokenizer, pairs, kind=kind, num_streams=task.num_streams, num_tokens=num_tokens, seed=task.seed)

    other: Split = "choose" if task.split == "report" else "report"
    return Streams(
        token_ids_BT=cut(task.kind, task.split, length),
        breaks_V=sentence_breaks(tokenizer, model),
        drift={kind: cut(kind, other, task.passage_tokens) for kind in drift_kinds},
    )


def measure(
    task: Retention,
    method: Method,
    backbone: Backbone,
    texts: Streams,
    *,
    sink_id: int,
    on_round: Callable[[int], None] = lambda number: None,
) -> Iterator[Checkpoint]:
    """Let a method read the streams and score it after each checkpoint.

    Args:
        task: The protocol's settings.
        method: The method.
        backbone: The model.
        texts: From `prepare`; the references are filled in when first needed.
        sink_id: First token of every input.
        on_round: Called after each round.

    Yields:
        One checkpoint after another.
    """
    setting = Setting(
        backbone=backbone,
        stream=task.stream,
        sink_id=sink_id,
        num_streams=task.num_streams,
        seed=task.seed,
        breaks_V=texts.breaks_V,
    )
    reader = method.begin(setting)
    seconds = 0.0
    for number in range(task.num_rounds + 1):
        begin = task.sync_tokens + task.context_tokens * (number - 1) if number else 0
        end = task.sync_tokens + task.context_tokens * number
        started = time.perf_counter()
        reader.read(texts.token_ids_BT[:, begin:end])
        if backbone.device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        if number in task.checkpoints:
            passage_BP = texts.token_ids_BT[:, end : end + task.passage_tokens]
            if number not in texts.full_BPD:
                texts.full_BPD[number] = _full(setting, texts.token_ids_BT[:, :end], passage_BP)
            metrics = _score(setting, reader, texts, passage_BP, texts.full_BPD[number])
            yield Checkpoint(number, metrics, seconds)
        if number:
            on_round(number)


def _full(setting: Setting, read_BT: Tensor, passage_BP: Tensor) -> Tensor:
    reader = Full().begin(setting)
    reader.read(read_BT)
    # A few streams at a time: without a memory of their own they need not share a batch.
    parts = zip(torch.split(reader.windowed(), 4), torch.split(passage_BP, 4), strict=True)
    states = [predict_passage(setting.backbone, prefix, part, sink_id=setting.sink_id) for prefix, part in parts]
    return torch.cat(states)


def _score(
    setting: Setting, reader: Reader, texts: Streams, passage_BP: Tensor, full_BPD: Tensor
) -> dict[str, list[float]]:
    backbone, sink_id = setting.backbone, setting.sink_id

    def states(prefix_BT: Tensor, scored_BP: Tensor) -> Tensor:
        return predict_passage(backbone, prefix_BT, scored_BP, sink_id=sink_id)

    nothing_BT = passage_BP[:, :0]
    for kind, unrelated_BP in texts.drift.items():
        if kind not in texts.drift_nll:
            texts.drift_nll[kind] = passage_nll(backbone, states(nothing_BT, unrelated_BP), unrelated_BP)
    found: dict[str, Tensor] = {"full_nll": passage_nll(backbone, full_BPD, passage_BP)}
    with reader.speaking():
        for name, prefix_BT in (("windowed", reader.windowed()), ("contextless", reader.contextless())):
            final_BPD = states(prefix_BT, passage_BP)
            found[f"{name}_nll"] = passage_nll(backbone, final_BPD, passage_BP)
            found[f"{name}_kl"] = passage_kl(backbone, full_BPD, final_BPD)
        for kind, unrelated_BP in texts.drift.items():
            nll_B = passage_nll(backbone, states(nothing_BT, unrelated_BP), unrelated_BP)
            found[f"drift_nll/{kind}"] = nll_B - texts.drift_nll[kind]
    return {name: value_B.tolist() for name, value_B in found.items()}


def to_records(
    task: Retention,
    method: str,
    method_config: dict[str, Any],
    measured: Sequence[Checkpoint],
    reference: Sequence[Checkpoint],
    facts: dict[str, Any],
) -> list[Record]:
    """Write what a method measured as records.

    Args:
        task: The protocol's settings.
        method: Its name.
        method_config: Its settings.
        measured: Its checkpoints.
        reference: Those of `truncation` on the same streams: without memory.
        facts: Model, device, dtype, versions, git.
    """
    records = []
    without = {checkpoint.round: checkpoint.metrics for checkpoint in reference}

    def add(checkpoint: Checkpoint, metric: str, values: Sequence[float], unit: str, **extra: Any) -> None:
        records.append(to_record(task, method, method_config, facts, checkpoint, metric, values, unit, extra))

    for checkpoint in measured:
        for name, values in checkpoint.metrics.items():
            metric, _, kind = name.partition("/")
            if metric != "full_nll":
                add(checkpoint, metric, values, "nats", **({"drift_kind": kind} if kind else {}))
        for view in ("windowed", "contextless"):
            none = without[checkpoint.round][f"{view}_nll"]
            own, full = checkpoint.metrics[f"{view}_nll"], checkpoint.metrics["full_nll"]
            value, low, high = gap_interval(none, own, full)
            ends = {"ci95_low": low, "ci95_high": high} if math.isfinite(low) else {"ci95_low": None, "ci95_high": None}
            add(checkpoint, f"{view}_gap_closed", own, "ratio")
            records[-1] = dataclasses.replace(records[-1], value=value, per_sample=[], **ends)
    return records
