"""The settings of a run: one frozen dataclass each for a round and for a stream.

The same classes are the Python interface, the source of the command line's flags and TOML keys, and what a
saved memory records of itself. This file imports neither torch nor transformers, so that `--help` is quick.
"""

import dataclasses
import math
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from absorber.errors import ConfigError


class _Settings:
    """What the settings classes share: checked construction from mappings, and the way back."""

    __slots__ = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a mapping; lists become tuples.

        Raises:
            ConfigError: If a key is unknown or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown setting {', '.join(unknown)} for {cls.__name__}; known are {', '.join(sorted(known))}"
            )
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values that JSON can hold; `from_dict` reads them back."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()  # type: ignore[call-overload]
        }

    def replace(self, /, **changes: Any) -> Self:
        """Return a copy with some fields changed.

        Raises:
            ConfigError: If a name is unknown or a value is out of range.
        """
        return self.from_dict({**self.to_dict(), **changes})

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, hint = getattr(self, field.name), hints[field.name]
            if not _fits(value, hint):
                raise ConfigError(f"{field.name} must be {_spell(hint)}; got {value!r}")

    def check(self, name: str, condition: bool, requirement: str) -> None:
        """Raise a ConfigError about the field `name` unless the condition holds."""
        if not condition:
            raise ConfigError(f"{name} must be {requirement}; got {getattr(self, name)!r}")

    def _check_counts(self, *names: str, at_least: int = 1) -> None:
        for name in names:
            self.check(name, getattr(self, name) >= at_least, f"{at_least} or more")

    def _check_not_negative(self, *names: str) -> None:
        for name in names:
            self.check(name, 0 <= getattr(self, name) < math.inf, "a finite number, zero or more")


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type; the few forms that settings use."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_spell(part) for part in typing.get_args(hint))
    if origin is tuple:
        return f"a list of {_spell(typing.get_args(hint)[0])}"
    return "nothing" if hint is types.NoneType else str(hint.__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsorbConfig(_Settings):
    """How one context is absorbed (Algorithm 1 of arXiv 2604.20915).

    The defaults are those of the preset `default`; `PRESETS["paper"]` holds the paper's own.

    Raises:
        ConfigError: If a value is out of range, or if no loss has a weight.
    """

    max_steps: int = 16
    """K: optimizer steps a round at most."""
    threshold: float | None = None
    """eps: a round ends as soon as its loss is below this. None: never."""
    optimizer: Literal["adamw", "sgd", "lion", "muon"] = "adamw"
    """Which optimizer. sgd has momentum .9; lion is arXiv 2302.06675; muon makes each matrix's update orthogonal."""
    learning_rate: float = 7e-5
    """Peak learning rate; each optimizer needs its own."""
    warmup_steps: int = 3
    """Steps of linear warm-up at the start of each round: a fresh Adam's first steps are as large as its later
    ones, whatever the gradient."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the warm-up: decay linearly to zero over the round, or stay."""
    settling_rounds: float | None = 25.0
    """The learning rate of round t is divided by the root of 1 + (t - 1) / this, so that over many rounds the memory
    settles instead of following its last ones. None: the same in every round (paper)."""
    weight_decay: float = 0.0
    """Weight decay, decoupled from the gradient but with sgd."""
    adam_epsilon: float = 1e-8
    """Added to the root of adamw's second moment; larger makes the steps of weights with small gradients smaller."""
    gradient_clip: float | None = 1.0
    """Largest gradient norm of one stream's adapter. None: no clipping."""
    optimizer_state: Literal["reset", "carry"] = "reset"
    """Whether the optimizer's moments start afresh in each round or are carried over the rounds of a stream."""

    rank: int = 64
    """R: rank of the adapter."""
    alpha: float | None = None
    """The adapter's output is scaled by alpha / rank. None: alpha = rank."""
    target_modules: tuple[str, ...] | None = None
    """Last part of the names of the projections that get an adapter. None: every linear projection of the blocks."""
    adapted_layers: tuple[int, ...] | None = None
    """Blocks that get an adapter, counted from 0. None: all."""
    cuda_graphs: bool = True
    """Record a step's forward and backward pass as a CUDA graph where model and device allow, and replay it."""
    checkpointing: bool = False
    """Compute the activations of each block again in the backward pass of a step on text, instead of keeping them:
    about a third more time for a small part of the memory."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the adapter's weights are trained; products run in the base model's type."""

    hidden_weight: float = 0.0
    """Weight of the distance between hidden states (eq. 6)."""
    kl_weight: float = 0.3
    """Weight of KL(teacher || student) of the next-token distributions (the paper's table 5), in nats."""
    next_token_weight: float = 1.0
    """Weight of the next-token loss on the subsequent text, in nats. Not in the paper: with a pristine teacher it
    lets the memory beat that teacher (docs/method.md)."""
    norm: Literal["l1", "l2"] = "l1"
    """Norm of the hidden-state distance: mean absolute or mean squared difference (the paper's table 7)."""
    normalization: Literal["teacher", "none"] = "teacher"
    """Divide each layer's distance by the teacher's mean absolute (squared) value of that layer, or not (paper)."""
    hidden_layers: tuple[int, ...] | None = None
    """Which hidden states are compared: 0 .. L-1 are the outputs of the blocks, L is the final norm. None: all."""
    include_embedding: bool = False
    """Whether the embedding, which is the same in teacher and student, counts among the hidden states (h^0, paper)."""
    include_final_norm: bool = True
    """Whether the final norm is compared where `hidden_layers` is left out; the paper's h^L is the last block."""
    update_penalty: Literal["none", "l1", "l2"] = "none"
    """Penalty on the round's change of the weights: the other reading of the paper's "L1 regularization"."""
    update_penalty_weight: float = 0.0
    """Weight of `update_penalty`, on the mean absolute (squared) change of a weight."""

    segments: tuple[int, ...] = (1, 1, 1, 4)
    """Into how many pieces, which the student reads one by one, the subsequent text is cut: one entry a step, in turn.
    Short pieces make the memory answer for what stands before them. (1,): never (paper)."""
    replay_rounds: int = 64
    """How many earlier rounds are kept, as token ids, to train on again; a random sample of all of them. A pristine
    teacher's final states of them are kept as well, in the CPU's memory, so that it reads each but once more."""
    replay_share: float = 0.5
    """Share of the steps, anchors left out, that train on an earlier round."""
    study: Literal["off", "light", "full"] = "off"
    """How the model studies a context, so that its facts are kept, with a part of the adapter that is for them alone.
    light: the sentences that it expects least are learned by heart. full: so are questions with answers that the base
    writes about them, and both also in the wake of other text; with three times the steps."""
    study_rank: int = 64
    """Rank of that part, beside `rank`."""
    study_floor: float = 0.1
    """How far that part keeps away from the inputs of ordinary text: directions that ordinary text uses more than this
    much of the mean direction's share are held down. Smaller: further away, and slower to learn."""
    study_steps: int = 32
    """Steps of study a round, before those of synchronization, in each form: light has one, full has three."""
    study_learning_rate: float = 1e-3
    """Peak learning rate of study."""
    study_passages: int = 12
    """How many sentences of a context are studied."""
    study_tokens: int = 24
    """Tokens of each at most."""
    study_cue: int = 6
    """How many tokens at the beginning of a sentence are given and not learned: nothing tells them from the sink alone,
    and a model that learns them says them everywhere."""
    study_written_tokens: int = 64
    """full: tokens of a question with its answer at most."""
    study_past: int = 2
    """From how many earlier rounds each step studies the sentences again."""
    study_rounds: int = 64
    """Of how many earlier rounds the sentences are kept, as token ids; a random sample of all of them."""
    anchor_share: float = 0.3
    """Share of the steps that hold the model to what the base says of texts that the base wrote from nothing."""
    anchor_texts: int = 64
    """How many such texts there are; they are written before the first round."""
    anchor_tokens: int = 128
    """Tokens of each."""

    sink: Literal["shared", "none"] = "shared"
    """Give teacher and student the same first token, which is never scored, or none (paper)."""
    positions: Literal["own", "teacher"] = "own"
    """Position ids of the student: those of its own input, from 0, or those that the teacher has for the same text."""
    teacher: Literal["base", "memory", "mixture"] = "base"
    """What the student is synchronized with: the pristine base model, the model with its own memory so far
    (Algorithm 2 as written), or a mixture of both."""
    teacher_mixture: float = 0.5
    """Share of the own memory in the teacher `mixture`."""
    rollback: Literal["worse", "nonfinite"] = "worse"
    """Which rounds are undone: those that end non-finite or with a larger loss than they began with, or the
    non-finite alone (paper)."""
    held_out_tokens: int = 0
    """How many tokens at the end of Y a round does not train on but is judged by: of its change of the weights all, a
    half, a quarter or nothing is kept, whatever says them best. Y keeps two tokens at least, and text that a model
    wrote is no evidence: with fewer tokens of the stream, no round is judged so."""
    seed: int = 0
    """Seed of the adapter's first weights and of sampling."""

    def __post_init__(self) -> None:
        self._check_types()
        self._check_counts(
            "max_steps", "rank", "study_rank", "study_steps", "study_passages", "study_cue", "anchor_texts"
        )
        self._check_counts("anchor_tokens", "study_tokens", "study_written_tokens", at_least=2)
        self._check_counts("replay_rounds", "study_past", "study_rounds", "held_out_tokens", at_least=0)
        for name in ("study_floor", "study_learning_rate"):
            self.check(name, 0 < getattr(self, name) < math.inf, "above zero")
        self.check("study_cue", self.study_cue < self.study_tokens, f"less than study_tokens, {self.study_tokens}")
        self.check("adam_epsilon", 0 < self.adam_epsilon < math.inf, "above zero")
        self.check("segments", len(self.segments) > 0 and min(self.segments) >= 1, "a list of numbers from 1 up")
        for name in ("replay_share", "anchor_share"):
            self.check(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self._check_counts("warmup_steps", "seed", at_least=0)
        for name in ("settling_rounds", "alpha"):
            value = getattr(self, name)
            self.check(name, value is None or 0 < value < math.inf, "above zero, or left out")
        self.check("learning_rate", 0 < self.learning_rate < math.inf, "above zero")
        self.check("threshold", self.threshold is None or self.threshold >= 0, "zero or more, or left out")
        self.check("gradient_clip", self.gradient_clip is None or self.gradient_clip > 0, "above zero, or left out")
        self.check("teacher_mixture", 0 <= self.teacher_mixture <= 1, "between 0 and 1")
        self._check_not_negative(
            "weight_decay", "hidden_weight", "kl_weight", "next_token_weight", "update_penalty_weight"
        )
        for name in ("target_modules", "adapted_layers", "hidden_layers"):
            self.check(name, getattr(self, name) != (), "a list with at least one entry, or left out")
        if self.hidden_weight + self.kl_weight + self.next_token_weight == 0:
            raise ConfigError(
                "hidden_weight, kl_weight and next_token_weight are all 0, so there is nothing to learn; "
                "give at least one of them a weight"
            )

    @property
    def adapter_rank(self) -> int:
        """Rank of the adapter, the part that studies included."""
        return self.rank + (0 if self.study == "off" else self.study_rank)

    @property
    def has_replay(self) -> bool:
        """Whether any step is on an earlier round."""
        return self.replay_rounds * self.replay_share > 0

    @property
    def has_anchors(self) -> bool:
        """Whether any step is on an anchor, which has no next-token term."""
        return self.anchor_share * (self.kl_weight + self.hidden_weight) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig(_Settings):
    """How a stream is cut into rounds and read (Algorithm 2 of arXiv 2604.20915).

    Raises:
        ConfigError: If a value is out of range.
    """

    context_tokens: int = 512
    """n: tokens absorbed and dropped per round."""
    sync_tokens: int = 1024
    """m: tokens on which teacher and student are compared; they stay in the window."""
    teacher_tokens: int = 0
    """How many tokens before X the teacher reads as well; they were absorbed before."""
    flush: Literal["auto", "keep", "generate"] = "auto"
    """What becomes of the last tokens of a finished input, which have no subsequent text. keep: they stay in the
    window. generate: the teacher writes the subsequent text that they lack, and they are absorbed as well. auto:
    keep in a session, whose window goes on; generate in `absorb`, whose memory has no window."""
    flush_temperature: float = 1.0
    """Sampling temperature of that generated text; greedy text of a small model repeats itself."""
    read_tokens: int = 2048
    """Largest piece that the model reads at once when it fills its cache."""
    max_new_tokens: int = 256
    """Tokens generated per call at most."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling: smallest set of tokens with this much probability."""
    gate: Literal["off", "entropy", "likelihood"] = "off"
    """When a question is answered without the memory: never; if the memory makes the first token of the answer more
    uncertain; if it makes the question less likely. Window and question are then read twice more, to find out."""

    def __post_init__(self) -> None:
        self._check_types()
        self._check_counts("context_tokens", "read_tokens", "max_new_tokens")
        self._check_counts("sync_tokens", at_least=2)
        self._check_counts("teacher_tokens", at_least=0)
        self._check_not_negative("temperature", "flush_temperature")
        self.check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")

    @property
    def window_tokens(self) -> int:
        """n + m: what the model reads verbatim at most."""
        return self.context_tokens + self.sync_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A named pair of settings."""

    absorb: AbsorbConfig
    """Settings of a round."""
    stream: StreamConfig
    """Settings of the stream."""


PRESETS: dict[str, Preset] = {
    "default": Preset(absorb=AbsorbConfig(), stream=StreamConfig()),
    # Algorithms 1 and 2 as written, with the paper's setting (section 4.1): n = 1024, m = 2048, L1, AdamW, 5e-4,
    # rank 64, eps = 2. K and alpha are not stated there.
    "paper": Preset(
        absorb=AbsorbConfig(
            max_steps=8,
            threshold=2.0,
            learning_rate=5e-4,
            warmup_steps=0,
            schedule="constant",
            settling_rounds=None,
            weight_decay=0.01,
            gradient_clip=None,
            hidden_weight=1.0,
            kl_weight=0.0,
            next_token_weight=0.0,
            normalization="none",
            include_embedding=True,
            include_final_norm=False,
            segments=(1,),
            replay_rounds=0,
            anchor_share=0.0,
            sink="none",
            teacher="memory",
            rollback="nonfinite",
        ),
        stream=StreamConfig(context_tokens=1024, sync_tokens=2048, flush="generate"),
    ),
}


def preset(name: str) -> Preset:
    """Return the preset of this name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def read_toml(path: Path, base: Preset) -> Preset:
    """Return `base` with what a TOML file changes: tables `[absorb]` and `[stream]`, keys as the fields.

    Raises:
        ConfigError: If the file cannot be read, or a table, key or value is not known.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the settings file {path}: {error}") from error
    unknown = sorted(set(tables) - {"absorb", "stream"})
    unknown += sorted(key for key, table in tables.items() if key not in unknown and not isinstance(table, dict))
    if unknown:
        raise ConfigError(f"{path} has {', '.join(unknown)}; its tables may be [absorb] and [stream]")
    return Preset(
        absorb=base.absorb.replace(**tables.get("absorb", {})), stream=base.stream.replace(**tables.get("stream", {}))
    )
