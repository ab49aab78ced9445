"""How much of a stream a method keeps, round by round, and what that costs elsewhere.

After each round the next 512 tokens are scored given the window and the memory (windowed), and the memory alone
(contextless); unrelated text of several kinds is scored with and without the memory (drift).

Shapes: B streams, T tokens, P of the passage, D hidden.
"""

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from absorber.backbone import Backbone
from absorber.bench.data import Kind, Split, documents, streams
from absorber.bench.methods import Reader, Setting
from absorber.bench.methods.full import Full
from absorber.bench.records import Record
from absorber.bench.scoring import passage_kl, passage_nll, predict_passage
from absorber.bench.task import Checkpoint, Task, as_gap
from absorber.errors import BenchmarkError
from absorber.gate import Rule, Signals, opens, signals
from absorber.notes import Guide, make_guide

DRIFT_KINDS: tuple[Kind, ...] = ("books", "dialogues", "encyclopedia", "code")


@dataclass(slots=True)
class Streams:
    """The texts of one run, the same for all methods, and the references after each checkpoint."""

    token_ids_BT: Tensor
    """Everything that is read, and the last passage."""
    guide: Guide
    """For study."""
    drift: dict[str, Tensor]
    """Unrelated passages [B, P] by kind, of the other half of the documents."""
    full_BPD: dict[int, Tensor] = field(default_factory=dict)
    """Final states of full attention by round."""
    without: dict[str, "Judged"] = field(default_factory=dict)
    """What the model says of unrelated passages without memory, by kind."""

    def of_streams(self, rows: slice) -> Self:
        """Those of some streams."""
        drift = {kind: passages_BP[rows] for kind, passages_BP in self.drift.items()}
        return replace(self, token_ids_BT=self.token_ids_BT[rows], drift=drift, full_BPD={}, without={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention(Task):
    """The protocol's settings."""

    name: ClassVar[str] = "retention"
    reference: ClassVar[str | None] = "truncation"
    kind: Kind = "books"
    num_rounds: int = 10
    passage_tokens: int = 512
    """P."""
    query_tokens: int = 64
    """How many tokens at its beginning a gate sees of a passage; half of it at most."""

    @property
    def checkpoints(self) -> list[int]:
        """After which rounds is measured: each of the first ten, then every tenth."""
        return [number for number in range(1, self.num_rounds + 1) if number <= 10 or number % 10 == 0]

    def prepare(
        self, model: Any, tokenizer: Any, data_dir: Path, *, drift_kinds: Sequence[Kind] = DRIFT_KINDS
    ) -> Streams:
        """Read and tokenize what a run needs.

        Raises:
            BenchmarkError: If there is too little text.
        """

        def cut(kind: Kind, pairs: Sequence[tuple[str, str]], num_tokens: int) -> Tensor:
            return streams(
                tokenizer, pairs, kind=kind, num_streams=self.num_streams, num_tokens=num_tokens, seed=self.seed
            )

        length = self.sync_tokens + self.context_tokens * self.num_rounds + self.passage_tokens
        return Streams(
            token_ids_BT=cut(self.kind, documents(self.kind, data_dir, self.split), length),
            guide=make_guide(tokenizer, model),
            drift={kind: cut(kind, self._unrelated(kind, data_dir), self.passage_tokens) for kind in drift_kinds},
        )

    def check(self, data_dir: Path) -> None:
        """See that there is text of every kind."""
        documents(self.kind, data_dir, self.split)
        for kind in DRIFT_KINDS:
            self._unrelated(kind, data_dir)

    def _unrelated(self, kind: Kind, data_dir: Path) -> list[tuple[str, str]]:
        """The other half of the documents of a kind."""
        other: Split = "choose" if self.split == "report" else "report"
        try:
            return documents(kind, data_dir, other)
        except BenchmarkError as error:
            raise BenchmarkError(
                f"{error}. Whatever is streamed, drift is measured on {', '.join(DRIFT_KINDS)}, so that the folder "
                "needs novels/*.txt (or *.txt), samsum/*.json and wikitext2/*.txt"
            ) from error

    def examine(self, setting: Setting, reader: Reader, texts: Streams, number: int) -> dict[str, list[float]]:
        """Score the passage that follows, and unrelated text."""
        end = self.sync_tokens + self.context_tokens * number
        passage_BP = texts.token_ids_BT[:, end : end + self.passage_tokens]
        if number not in texts.full_BPD:
            texts.full_BPD[number] = _full(setting, texts.token_ids_BT[:, :end], passage_BP)
        query = slice(min(self.query_tokens, self.passage_tokens // 2))
        return _score(setting, reader, texts, passage_BP, texts.full_BPD[number], query)

    def to_records(
        self,
        method: str,
        method_config: dict[str, Any],
        measured: Sequence[Checkpoint],
        reference: Sequence[Checkpoint],
        facts: dict[str, Any],
    ) -> list[Record]:
        """Write what a method measured as records; the reference is `truncation`, without memory."""
        records = []
        without = {checkpoint.round: checkpoint.metrics for checkpoint in reference}
        for checkpoint in measured:
            own = partial(self.record, method, method_config, facts, checkpoint)
            for name, values in checkpoint.metrics.items():
                metric, *parts = name.split("/")
                places = ("gate", "drift_kind") if metric.startswith("gate") else ("drift_kind",)
                place = dict(zip(places, parts, strict=False))
                if metric != "full_nll":
                    records.append(own(metric, values, "ratio" if metric == "gate_open" else "nats", **place))
            for view in ("windowed", "contextless"):
                nll_B = checkpoint.metrics[f"{view}_nll"]
                gap = own(f"{view}_gap_closed", nll_B, "ratio")
                none_B, full_B = without[checkpoint.round][f"{view}_nll"], checkpoint.metrics["full_nll"]
                records.append(as_gap(gap, none_B, nll_B, full_B))
        return records


def _full(setting: Setting, read_BT: Tensor, passage_BP: Tensor) -> Tensor:
    reader = Full().begin(setting)
    reader.read(read_BT)
    # A few streams at a time: without a memory of their own they need not share a batch.
    parts = zip(torch.split(reader.windowed(), 4), torch.split(passage_BP, 4), strict=True)
    states = [predict_passage(setting.backbone, prefix, part, sink_id=setting.sink_id) for prefix, part in parts]
    return torch.cat(states)


class Judged(NamedTuple):
    """What is said of passages [B, P], of which a gate sees the beginning."""

    nll_B: Tensor
    """Of the whole passage."""
    rest_nll_B: Tensor
    """Of what follows the beginning."""
    query: Signals
    """Of the beginning."""


def _judge(backbone: Backbone, final_BPD: Tensor, passage_BP: Tensor, query: slice) -> Judged:
    rest = slice(query.stop, None)
    return Judged(
        passage_nll(backbone, final_BPD, passage_BP),
        passage_nll(backbone, final_BPD[:, rest], passage_BP[:, rest]),
        signals(backbone, final_BPD[:, : query.stop + 1], passage_BP[:, query]),
    )


def _score(
    setting: Setting, reader: Reader, texts: Streams, passage_BP: Tensor, full_BPD: Tensor, query: slice
) -> dict[str, list[float]]:
    backbone, sink_id = setting.backbone, setting.sink_id

    def states(prefix_BT: Tensor, scored_BP: Tensor) -> Tensor:
        return predict_passage(backbone, prefix_BT, scored_BP, sink_id=sink_id)

    def judge_alone(scored_BP: Tensor) -> Judged:
        return _judge(backbone, states(scored_BP[:, :0], scored_BP), scored_BP, query)

    for kind, unrelated_BP in texts.drift.items():
        if kind not in texts.without:
            texts.without[kind] = judge_alone(unrelated_BP)
    pairs = {}
    found: dict[str, Tensor] = {"full_nll": passage_nll(backbone, full_BPD, passage_BP)}
    with reader.speaking():
        kept = reader.reading()
        in_view_BPD = kept.predict(passage_BP) if kept is not None else states(reader.windowed(), passage_BP)
        for name, final_BPD in (
            ("windowed", in_view_BPD),
            ("contextless", states(reader.contextless(), passage_BP)),
        ):
            found[f"{name}_nll"] = passage_nll(backbone, final_BPD, passage_BP)
            found[f"{name}_kl"] = passage_kl(backbone, full_BPD, final_BPD)
        for kind, unrelated_BP in texts.drift.items():
            pairs[f"/{kind}"] = judge_alone(unrelated_BP), texts.without[kind]
            found[f"drift_nll/{kind}"] = pairs[f"/{kind}"][0].nll_B - texts.without[kind].nll_B
        own = judge_alone(passage_BP)
    pairs[""] = own, judge_alone(passage_BP)
    for rule in typing.get_args(Rule):
        for kind, (with_memory, without) in pairs.items():
            open_B = opens(with_memory.query, without.query, rule)
            found[f"gate_open/{rule}{kind}"] = open_B.float()
            found[f"gated_drift_nll/{rule}{kind}"] = (with_memory.rest_nll_B - without.rest_nll_B) * open_B
    return {name: value_B.tolist() for name, value_B in found.items()}
