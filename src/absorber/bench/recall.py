"""Whether facts that have left the window are still known, by the age of their round.

Facts are planted in the text of every round. Some rounds later they are asked for, given the window and the memory
(windowed) or the memory alone (contextless), in the wording of the text and in another. The yardstick is the same model
with the fact's own context in view.

Shapes: B streams, T tokens, Q questions.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from absorber.backbone import forward_states, untouched
from absorber.bench.data import Kind, documents, streams
from absorber.bench.facts import KINDS, WORDINGS, Fact, Wording, draw_facts
from absorber.bench.methods import Questions, Reader, Setting
from absorber.bench.reading import Reading, predictions
from absorber.bench.records import Record
from absorber.bench.task import Checkpoint, Task, as_gap
from absorber.errors import BenchmarkError, ConfigError
from absorber.notes import Guide, make_guide


@dataclass(slots=True)
class Planted:
    """The texts of one run, the same for all methods."""

    token_ids_BT: Tensor
    """What is read: m + n * rounds tokens."""
    facts: list[list[Fact]]
    """Of each stream, in the order of the text."""
    guide: Guide
    """For study, and to tokenize questions."""
    in_view: dict[tuple[int, Wording], dict[str, list[float]]] = field(default_factory=dict)
    """What the model answers with the context in view, by round and wording."""

    def of_streams(self, rows: slice) -> Self:
        """Those of some streams."""
        return replace(self, token_ids_BT=self.token_ids_BT[rows], facts=self.facts[rows], in_view={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall(Task):
    """The protocol's settings.

    Raises:
        ConfigError: If no fact grows as old as one is asked for.
    """

    name: ClassVar[str] = "recall"
    kind: Kind = "books"
    num_rounds: int = 30
    num_facts: int = 2
    """Facts planted in each round's context."""
    ages: tuple[int, ...] = (1, 3, 10, 30)
    """Rounds since a fact was absorbed, the round that absorbed it included."""

    def __post_init__(self) -> None:
        if not self.ages or min(self.ages) > self.num_rounds:
            raise ConfigError(
                f"after {self.num_rounds} rounds no fact is of an age among ages = {list(self.ages)}; use smaller ages "
                "or more rounds"
            )

    @property
    def checkpoints(self) -> list[int]:
        """After which rounds is asked: every tenth, and the last."""
        return [number for number in range(1, self.num_rounds + 1) if number % 10 == 0 or number == self.num_rounds]

    def config(self) -> dict[str, Any]:
        """What a record says of the settings."""
        return Task.config(self) | {"ages": list(self.ages)}

    def prepare(self, model: Any, tokenizer: Any, data_dir: Path) -> Planted:
        """Read, tokenize and plant.

        Raises:
            BenchmarkError: If there is too little text, or too little room in it.
        """

        guide = make_guide(tokenizer, model)
        plain_BT = streams(
            tokenizer,
            documents(self.kind, data_dir, self.split),
            kind=self.kind,
            num_streams=self.num_streams,
            num_tokens=self.sync_tokens + self.context_tokens * self.num_rounds,
            seed=self.seed,
        )
        rows, facts = [], []
        for index, plain in enumerate(plain_BT.tolist()):
            # Streams begin with different kinds, so that every age is asked about all of them.
            own = draw_facts(self.num_facts * self.num_rounds, seed=f"{self.seed}/{index}", first_kind=index)
            dice = random.Random(f"places/{self.seed}/{index}")
            rows.append(_plant(self, plain, own, guide.tokenize, guide.breaks_V, dice))
            facts.append(own)
        return Planted(torch.tensor(rows), facts, guide)

    def examine(self, setting: Setting, reader: Reader, texts: Planted, number: int) -> dict[str, list[float]]:
        """Ask for facts of every age; the figures are named metric/age/wording/view."""
        found: dict[str, list[float]] = {}
        for age in self.ages:
            planted = number - age  # rounds before the one that absorbed the fact
            if planted < 0:
                continue
            for wording in WORDINGS:
                asked = [own[planted * self.num_facts :][: self.num_facts] for own in texts.facts]
                if (planted, wording) not in texts.in_view:
                    context_BN = texts.token_ids_BT[:, planted * self.context_tokens :][:, : self.context_tokens]
                    texts.in_view[planted, wording] = ask(setting, context_BN, asked, wording, texts.guide.tokenize)
                answers = {"full": texts.in_view[planted, wording]}
                with reader.speaking():
                    kept = reader.reading()
                    reads = {"contextless": reader.contextless}
                    if kept is None:
                        reads["windowed"] = reader.windowed
                    else:
                        answers["windowed"] = ask_kept(kept, asked, wording, texts.guide.tokenize)
                    for view, read in reads.items():
                        prefix_QT = _before_each(read, asked, wording, texts.guide.tokenize)
                        answers[view] = ask(setting, prefix_QT, asked, wording, texts.guide.tokenize)
                for view, metrics in answers.items():
                    found |= {f"{metric}/{age}/{wording}/{view}": values for metric, values in metrics.items()}
        return found

    def to_records(
        self,
        method: str,
        method_config: dict[str, Any],
        measured: Sequence[Checkpoint],
        reference: Sequence[Checkpoint],
        facts: dict[str, Any],
    ) -> list[Record]:
        """Write what a method measured as records; there is no reference."""
        records = []
        for checkpoint in measured:
            record = partial(self.record, method, method_config, facts, checkpoint)
            for name, answers in checkpoint.metrics.items():
                metric, age, wording, view = name.split("/")
                place = {"age": int(age), "wording": wording, "view": view}
                own = _by_stream(self, answers)
                unit = "ratio" if metric == "recall_exact" else "nats"
                records.append(record(metric, own, unit, **place, fact_kind="all"))
                if metric != "recall_exact":
                    continue
                if view != "windowed":
                    for kind, of_kind in _by_kind(self, answers, checkpoint.round - int(age)).items():
                        records.append(record(metric, of_kind, "ratio", **place, fact_kind=kind))
                if view != "full":
                    full = _by_stream(self, checkpoint.metrics[f"{metric}/{age}/{wording}/full"])
                    share = record("recall_share", own, "ratio", **place, fact_kind="all")
                    # The share of what full attention answers is a gap closed from zero.
                    negated = ([-exact for exact in exacts] for exacts in (own, full))
                    records.append(as_gap(share, [0.0] * len(own), *negated))
        return records


def _plant(
    task: Recall,
    plain: Sequence[int],
    facts: Sequence[Fact],
    tokenize: Callable[[str], list[int]],
    breaks_V: Tensor,
    dice: random.Random,
) -> list[int]:
    """Put each round's facts, as lines of their own, where sentences begin; the text makes room for them."""
    row: list[int] = []
    used = 0
    for number in range(task.num_rounds):
        lines = [tokenize(f"\n{fact.sentence}\n") for fact in facts[number * task.num_facts :][: task.num_facts]]
        room = task.context_tokens - sum(map(len, lines))
        if room < len(lines):
            raise BenchmarkError(
                f"{task.num_facts} facts take {task.context_tokens - room} of a context of {task.context_tokens} "
                "tokens; use a larger context_tokens or fewer facts"
            )
        text = plain[used : used + room]
        used += room
        begins = [place + 1 for place in range(room - 1) if breaks_V[text[place]]]
        if len(begins) < len(lines):
            begins = list(range(1, room))
        places = sorted(dice.sample(begins, len(lines)))
        for start, end, line in zip([0, *places], [*places, room], [*lines, []], strict=True):
            row += [*text[start:end], *line]
    return row + list(plain[used : used + task.sync_tokens])


def _before_each(
    read: Callable[[Questions], Tensor],
    asked: Sequence[Sequence[Fact]],
    wording: Wording,
    tokenize: Callable[[str], list[int]],
) -> Tensor:
    """What a reader puts before each question [Q, T], those of the first stream first."""
    places = range(len(asked[0]))
    of_place = [read([tokenize(own[place].prompts[wording]) for own in asked]) for place in places]
    return torch.stack(of_place, dim=1).flatten(0, 1)


@torch.no_grad()
def ask(
    setting: Setting,
    prefix_QT: Tensor,
    asked: Sequence[Sequence[Fact]],
    wording: Wording,
    tokenize: Callable[[str], list[int]],
) -> dict[str, list[float]]:
    """Ask each stream its questions, with whatever memory is attached.

    Greedy decoding gives the answer exactly if every token of the answer is the most likely one after those before it,
    so that one pass over prompt and answer decides it.

    Args:
        setting: Model and sink.
        prefix_QT: What is read before a question, a row for each or a row for all those of a stream; may have no
            tokens.
        asked: The same number of facts for each stream.
        wording: Of the questions.
        tokenize: Without special tokens.

    Returns:
        `recall_exact` (0 or 1) and `recall_nll` (of the whole answer, in nats), stream by stream, question by question.
    """
    backbone = setting.backbone
    rows: list[tuple[list[int], list[int]]] = []
    facts = [fact for own in asked for fact in own]
    prefixes = prefix_QT.repeat_interleave(len(facts) // len(prefix_QT), dim=0).tolist()
    for prefix, fact in zip(prefixes, facts, strict=True):
        prompt = tokenize(("\n" if prefix else "") + fact.prompts[wording])
        rows.append(([setting.sink_id, *prefix, *prompt], tokenize(fact.answer)))
    longest = max(len(before) + len(answer) for before, answer in rows)
    padded = [before + answer + [setting.sink_id] * (longest - len(before) - len(answer)) for before, answer in rows]
    with untouched(backbone.model):
        # What stands behind an answer is not seen from it.
        final_BTD = forward_states(backbone, torch.tensor(padded, device=backbone.device)).final_BTD
    found: dict[str, list[float]] = {"recall_exact": [], "recall_nll": []}
    for row, (before, answer) in enumerate(rows):
        logits = backbone.logits(final_BTD[row, len(before) - 1 : len(before) + len(answer) - 1]).float()
        answer_T = torch.tensor(answer, device=logits.device)
        found["recall_exact"].append(float((logits.argmax(dim=-1) == answer_T).all()))
        found["recall_nll"].append(float(torch.nn.functional.cross_entropy(logits, answer_T, reduction="sum")))
    return found


@torch.no_grad()
def ask_kept(
    reading: Reading, asked: Sequence[Sequence[Fact]], wording: Wording, tokenize: Callable[[str], list[int]]
) -> dict[str, list[float]]:
    """The same as `ask`, after what a method keeps in a cache of its own."""
    found: dict[str, list[list[float]]] = {"recall_exact": [], "recall_nll": []}
    for turn in zip(*asked, strict=True):
        rows = [(tokenize("\n" + fact.prompts[wording]), tokenize(fact.answer)) for fact in turn]
        log_p = predictions(reading, [(prompt, answer[:-1]) for prompt, answer in rows])
        answers = [torch.tensor(answer, device=log_p[0].device) for _, answer in rows]
        pairs = list(zip(log_p, answers, strict=True))
        found["recall_exact"].append([float((log_p_TV.argmax(-1) == ids_T).all()) for log_p_TV, ids_T in pairs])
        found["recall_nll"].append([-float(log_p_TV.gather(1, ids_T[:, None]).sum()) for log_p_TV, ids_T in pairs])
    return {metric: [value for own in zip(*turns, strict=True) for value in own] for metric, turns in found.items()}


def _by_stream(task: Recall, answers: Sequence[float]) -> list[float]:
    size = task.num_facts
    return [sum(answers[first : first + size]) / size for first in range(0, len(answers), size)]


def _by_kind(task: Recall, answers: Sequence[float], planted: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for index, answer in enumerate(answers):
        stream, place = divmod(index, task.num_facts)
        kind = KINDS[(stream + planted * task.num_facts + place) % len(KINDS)]
        found.setdefault(kind, []).append(answer)
    return found
