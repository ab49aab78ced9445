"""What each choice of the method is worth: one choice changed at a time, the rest as it is, measured by `retention`.

`ablation_tables.TABLES` is the whole plan. Settings that several tables have, the default first of all, are measured
once and recorded under each. Ablations choose, so they run on the documents that are for choosing, unless told
otherwise; figures are taken after the last round alone.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from absorber.backbone import inspect
from absorber.bench.ablation_tables import LAYERS, TABLES
from absorber.bench.data import Split
from absorber.bench.methods import LoRA
from absorber.bench.quick import WINDOW_SHARE, smaller
from absorber.bench.records import Record, append_records
from absorber.bench.retention import DRIFT_KINDS, Retention
from absorber.bench.runner import Listener, run_task
from absorber.config import AbsorbConfig
from absorber.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation(Retention):
    """What all variants share: the settings of `retention`, and when they are compared.

    Every variant absorbs as many tokens, so a smaller n has more rounds (5120 tokens: 20 of 256, 10 of 512, 5 of
    1024); a number that n does not divide is rounded down, to one round at least. A stream is m + n * rounds tokens and
    the passage, so variants with another m are scored on other passages: compare their gaps, not their nll.

    Raises:
        ConfigError: If a value is unknown or out of range.
    """

    name: ClassVar[str] = "ablation"
    split: Split = "choose"
    """Which half of the documents."""
    num_streams: int = 12
    """B."""
    num_tokens: int = 5120
    """Tokens absorbed per stream."""

    def __post_init__(self) -> None:
        if self.kind not in DRIFT_KINDS or self.split not in ("choose", "report"):
            raise ConfigError(
                f"kind is one of {', '.join(DRIFT_KINDS)} and split choose or report; got {self.kind!r}, {self.split!r}"
            )
        counts = (self.num_tokens, self.num_streams, self.num_rounds, self.context_tokens, self.passage_tokens)
        if min(counts) < 1 or self.sync_tokens < 2 or self.seed < 0:
            raise ConfigError(f"counts are 1 or more, sync_tokens 2 or more and the seed 0 or more; got {self}")

    @property
    def checkpoints(self) -> list[int]:
        """The last round alone."""
        return [self.num_rounds]

    def with_window(self, context_tokens: int, sync_tokens: int) -> "Ablation":
        """The same with other n and m, and as many rounds as absorb the tokens."""
        rounds = max(1, self.num_tokens // context_tokens)
        return dataclasses.replace(self, context_tokens=context_tokens, sync_tokens=sync_tokens, num_rounds=rounds)


@dataclass(frozen=True, slots=True)
class Cell:
    """One variant of one table, ready to be measured."""

    table: str
    """Name of the table."""
    variant: str
    """Name of the variant."""
    task: Ablation
    """What is read."""
    config: AbsorbConfig
    """How it is absorbed."""

    @property
    def name(self) -> str:
        """Of both."""
        return f"{self.table}/{self.variant}"

    @property
    def label(self) -> dict[str, str]:
        """What a record's `config` says of its place."""
        return {"table": self.table, "variant": self.variant}


def cells(task: Ablation, tables: Sequence[str] = (), *, num_layers: int, quick: bool = False) -> list[Cell]:
    """Work out what the tables ask to be measured.

    Args:
        task: What all variants share.
        tables: Names; all if there are none.
        num_layers: Blocks of the model.
        quick: Whether rounds and windows are as small as those of `quick`, so that every variant runs and no figure
            means anything.

    Raises:
        ConfigError: If there is no such table.
    """
    unknown = sorted(set(tables) - set(TABLES))
    if unknown:
        raise ConfigError(f"there is no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    found = []
    for table in tables or TABLES:
        for variant, changes in TABLES[table].variants.items():
            settings = dict(changes)
            window = [
                settings.pop(name) // (WINDOW_SHARE if quick else 1) if name in settings else getattr(task, name)
                for name in ("context_tokens", "sync_tokens")
            ]
            if "adapted_layers" in settings:
                settings["adapted_layers"] = tuple(LAYERS[settings["adapted_layers"]](num_layers))
            config = AbsorbConfig().replace(**settings)
            found.append(Cell(table, variant, task.with_window(*window), smaller(config) if quick else config))
    return found


def run_ablation(
    task: Ablation,
    model: Any,
    tokenizer: Any,
    *,
    tables: Sequence[str] = (),
    data_dir: Path,
    output: Path,
    batch: int | None = None,
    listener: Listener | None = None,
    quick: bool = False,
) -> list[Record]:
    """Measure the variants that the output file does not have yet, each once.

    Args:
        task: What all variants share.
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        tables: Names; all if there are none.
        data_dir: Folder with the data; see `data.documents`.
        output: File of records; those of a variant are added when it is done.
        batch: As in `run_task`.
        listener: Whom to tell. A variant that fails is told of and left out.
        quick: As in `cells`.

    Returns:
        The records of all variants asked for, old and new.

    Raises:
        BenchmarkError: If there is too little text, or the file is not one of records.
        ConfigError: If there is no such table.
    """
    wanted: dict[Ablation, dict[AbsorbConfig, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells(task, tables, num_layers=len(inspect(model).blocks), quick=quick):
        wanted[cell.task][cell.config].append(cell)
    found: list[Record] = []
    for shared, same in wanted.items():
        methods = {places[0].name: LoRA(config) for config, places in same.items()}
        records = run_task(
            shared,
            methods,
            model,
            tokenizer,
            data_dir=data_dir,
            output=output,
            batch=batch,
            listener=listener,
            labels={places[0].name: places[0].label for places in same.values()},
        )
        for config, places in same.items():
            own = [record for record in records if record.config["method"] == LoRA(config).config()]
            for place in places:
                found += _recorded(place, own, output)
    return found


def _recorded(cell: Cell, own: Sequence[Record], output: Path) -> list[Record]:
    """The records of a cell; written now if the measurement was recorded under other cells alone."""
    places = defaultdict(list)
    for record in own:
        places[record.config["table"], record.config["variant"]].append(record)
    if not places or (cell.table, cell.variant) in places:
        return places[cell.table, cell.variant]
    records = [
        dataclasses.replace(record, method=cell.name, config=record.config | cell.label)
        for record in next(iter(places.values()))
    ]
    append_records(output, records)
    return records
