"""What a run of the families is: how they are trained, and what is measured of them."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Self

from absorber.bench.data import Split
from absorber.bench.families.shapes import SIZES
from absorber.config import StreamConfig
from absorber.errors import ConfigError

# They say how families are measured, so that trained weights do not depend on them.
_MEASURING = (
    "split",
    "num_streams",
    "scored_tokens",
    "passage_tokens",
    "distances",
    "num_pairs",
    "context_tokens",
    "sync_tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Families:
    """The same for all families.

    Raises:
        ConfigError: If a value is out of range.
    """

    size: str = "30m"
    """One of `shapes.SIZES`."""
    tokens: int = 30_000_000
    """Training tokens, the budget of each family."""
    row_tokens: int = 2048
    """Length of a training row."""
    step_tokens: int = 32768
    """Tokens of an optimizer step."""
    learning_rate: float = 1e-3
    """Peak of AdamW's, after a rise over the first twentieth of the steps; it falls along a cosine to a tenth."""
    weight_decay: float = 0.1
    """Of matrices."""
    vocabulary: int = 8192
    """Tokens of the tokenizer."""
    pair_share: float = 0.2
    """Share of the training rows that have pairs to be recalled."""
    split: Split = "report"
    """Which half of the scored books."""
    num_streams: int = 16
    """Streams that are scored."""
    scored_tokens: int = 16384
    """Length of a scored stream: sync_tokens and a number of passages."""
    passage_tokens: int = 512
    """Tokens whose mean is a point of the curve over positions."""
    distances: tuple[int, ...] = (64, 256, 1024, 4096, 15360)
    """Tokens after which pairs are asked for."""
    num_pairs: int = 8
    """Pairs of a stream, all of which are asked for."""
    context_tokens: int = 512
    """n of the methods on the trained transformer."""
    sync_tokens: int = 1024
    """m of the same."""
    seed: int = 0
    """Of weights, order, pairs and streams."""

    def __post_init__(self) -> None:
        numbers = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if isinstance(value, int) and name not in ("seed", "sync_tokens")
        }
        wrong = [name for name, value in numbers.items() if value < 1]
        if wrong or self.seed < 0 or not self.distances or min(self.distances) < 1:
            raise ConfigError(f"{', '.join(wrong) or 'distances'} are 1 or more, and the seed 0 or more; got {self}")
        if self.size not in SIZES or self.split not in ("report", "choose"):
            raise ConfigError(f"size is one of {', '.join(SIZES)} and split report or choose; got {self}")
        if self.row_tokens < 32 or self.step_tokens < self.row_tokens or self.tokens < self.step_tokens:
            raise ConfigError(f"a row has 32 tokens or more, a step a row, a run a step; got {self}")
        if not 0 <= self.pair_share <= 1 or not 0 < self.learning_rate < 1 or self.weight_decay < 0:
            raise ConfigError(
                f"pair_share is from 0 to 1, learning_rate between them, weight_decay not less; got {self}"
            )
        rest = self.scored_tokens - self.sync_tokens
        if rest < self.passage_tokens or rest % self.context_tokens or self.scored_tokens % self.passage_tokens:
            raise ConfigError(
                f"scored_tokens are sync_tokens and a number of context_tokens, and a number of passages; got {self}"
            )
        if self.context_tokens + self.sync_tokens >= self.row_tokens:
            raise ConfigError(f"context and sync tokens are within a training row; got {self}")

    @classmethod
    def from_table(cls, values: dict[str, Any]) -> Self:
        """Build from flags and a table of a settings file.

        Raises:
            ConfigError: If a setting is unknown or of a wrong type.
        """
        known = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in values.items():
            default = known.get(name)
            kinds = {float: (int, float), tuple: (list, tuple)}.get(type(default), (type(default),))
            if name not in known or isinstance(value, bool) or not isinstance(value, kinds):
                raise ConfigError(f"{name} = {value!r} is no setting of [families]; there are {', '.join(known)}")
        given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**given)

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.step_tokens // self.row_tokens

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // (self.rows * self.row_tokens)

    @property
    def stream(self) -> StreamConfig:
        """n and m."""
        return StreamConfig(context_tokens=self.context_tokens, sync_tokens=self.sync_tokens)

    def config(self) -> dict[str, Any]:
        """What a record says of the settings."""
        values = dataclasses.asdict(self)
        del values["seed"]
        return values | {"distances": list(self.distances)}

    def training_key(self, corpus: str) -> str:
        """What trained weights depend on, beside the family.

        Args:
            corpus: Digest of the training text.
        """
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in _MEASURING}
        return hashlib.sha256(json.dumps([corpus, values], sort_keys=True).encode()).hexdigest()[:12]
