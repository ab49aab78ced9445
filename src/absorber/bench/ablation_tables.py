"""The questions that ablations answer: the variants of each, and the paper's figures (tables 5 to 7)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from absorber.config import PRESETS, AbsorbConfig

Changes = Mapping[str, Any]
"""Fields of `AbsorbConfig` (and context_tokens, sync_tokens) that are not as in the default. `adapted_layers` may be
one of `LAYERS`, for it depends on the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What the paper (arXiv 2604.20915) says of some variants. LLaMA2-7B; higher is better in all its metrics."""

    table: int
    """Number of its table."""
    dataset: str
    """What it was measured on."""
    metrics: tuple[str, ...]
    """Names of the figures."""
    values: Mapping[str, tuple[float, ...]]
    """The figures by our name of the variant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One question."""

    asks: str
    """The question."""
    variants: Mapping[str, Changes]
    """What is compared, by name."""
    published: tuple[Published, ...] = ()
    """The paper's figures, once for each group of variants that differ in nothing else."""


LAYERS: dict[str, Callable[[int], Sequence[int]]] = {
    "upper half": lambda num_layers: range(num_layers // 2, num_layers),
    "lower half": lambda num_layers: range(max(1, num_layers // 2)),
    "every second": lambda num_layers: range(0, num_layers, 2),
}

_HIDDEN = {"hidden_weight": 1.0, "kl_weight": 0.0, "next_token_weight": 0.0}
_KL = {"hidden_weight": 0.0, "kl_weight": 1.0, "next_token_weight": 0.0}
_NEXT_TOKEN = {"hidden_weight": 0.0, "kl_weight": 0.0, "next_token_weight": 1.0}
_L2 = {"norm": "l2"}
# Algorithms 1 and 2 as written, but for two things: the threshold ends every round before its first step, and without a
# shared sink the first token's noise hides what is compared here.
_PAPER = {
    name: value for name, value in PRESETS["paper"].absorb.to_dict().items() if value != AbsorbConfig().to_dict()[name]
} | {"threshold": None, "sink": "shared"}
# As published: next-token loss on the round's own text.
_TEMP_LORA = _NEXT_TOKEN | {"segments": (1,), "replay_rounds": 0, "anchor_share": 0.0, "settling_rounds": None}
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def _summaries(table: int, values: Mapping[str, tuple[float, float]]) -> Published:
    return Published(table=table, dataset="SAMSum", metrics=("F1", "BLEURT"), values=values)


_TABLE_5 = {"hidden": (57.5, 0.415), "KL": (37.4, 0.324)}
_TABLE_6 = {
    "256 x 512": (35.1,),
    "256 x 1024": (57.9,),
    "256 x 2048": (42.3,),
    "512 x 512": (41.9,),
    "512 x 1024": (46.5,),
    "512 x 2048": (55.1,),
    "1024 x 512": (47.8,),
    "1024 x 1024": (50.8,),
    "1024 x 2048": (61.9,),
}
_TABLE_7 = {"L1": (57.5, 0.415), "L2": (42.3, 0.383)}

# A round of the default changes a weight by 2.5e-5 in the mean, squared 1e-9 (SmolLM2-135M, 8 steps); its loss falls by
# .1 or so. The weights reach from hardly felt to as large as that.
_PENALTIES: dict[str, Changes] = {
    **{f"L1, {w:.0e}": {"update_penalty": "l1", "update_penalty_weight": w} for w in (1e1, 1e2, 1e3)},
    **{f"L2, {w:.0e}": {"update_penalty": "l2", "update_penalty_weight": w} for w in (1e6, 1e7, 1e8)},
}

TABLES: dict[str, Table] = {
    "objective": Table(
        asks="What should teacher and student agree in?",
        variants={
            "default": {},
            "hidden": _HIDDEN,
            "KL": _KL,
            "hidden + KL": _HIDDEN | {"kl_weight": 1.0},
            "next-token alone": _NEXT_TOKEN,
            "paper's, hidden": _PAPER | _HIDDEN,
            "paper's, KL": _PAPER | _KL,
        },
        published=(
            _summaries(5, _TABLE_5),
            _summaries(5, {f"paper's, {name}": values for name, values in _TABLE_5.items()}),
        ),
    ),
    "norm": Table(
        asks="Which norm should the distance of hidden states have (one reading of the paper's L1 regularization)?",
        variants={
            "hidden L1": _HIDDEN,
            "hidden L2": _HIDDEN | _L2,
            "paper's, hidden L1": _PAPER | _HIDDEN,
            "paper's, hidden L2": _PAPER | _HIDDEN | _L2,
        },
        published=(
            _summaries(7, {f"hidden {name}": values for name, values in _TABLE_7.items()}),
            _summaries(7, {f"paper's, hidden {name}": values for name, values in _TABLE_7.items()}),
        ),
    ),
    "penalty": Table(
        asks="Does a penalty on the round's change of the weights help (the other reading of L1 regularization)?",
        variants={"none": {}, **_PENALTIES},
        published=(_summaries(7, {name: _TABLE_7[name[:2]] for name in _PENALTIES}),),
    ),
    "window": Table(
        asks="How many tokens should be absorbed at once (n), and on how many compared (m)? The names are n x m.",
        variants={
            f"{n} x {m}": {"context_tokens": n, "sync_tokens": m} for n in (256, 512, 1024) for m in (512, 1024, 2048)
        },
        published=(Published(table=6, dataset="SAMSum", metrics=("accuracy",), values=_TABLE_6),),
    ),
    "teacher": Table(
        asks="Who should teach: the pristine base, the model with its own memory (the paper), or a mixture?",
        variants={"base": {}, "memory": {"teacher": "memory"}, "mixture .5": {"teacher": "mixture"}},
    ),
    "sink": Table(
        asks="Do teacher and student need the same first token?", variants={"shared": {}, "none": {"sink": "none"}}
    ),
    "steps": Table(
        asks="How many optimizer steps a round (K)?", variants={f"{k}": {"max_steps": k} for k in (4, 8, 16, 32)}
    ),
    "rank": Table(asks="Which rank of the adapter?", variants={f"{r}": {"rank": r} for r in (8, 16, 64)}),
    "modules": Table(
        asks="Which projections need an adapter?",
        variants={
            "all": {},
            "attention": {"target_modules": _ATTENTION},
            "MLP": {"target_modules": _MLP},
            "down_proj": {"target_modules": ("down_proj",)},
        },
    ),
    "layers": Table(
        asks="Which blocks need an adapter?",
        variants={"all": {}, **{name: {"adapted_layers": name} for name in LAYERS}},
    ),
    "learning_rate": Table(
        asks="Which learning rate?",
        variants={f"{rate:.0e}": {"learning_rate": rate} for rate in (2e-5, 4e-5, 7e-5, 1.4e-4, 3e-4)},
    ),
    "settling": Table(
        asks="Should the learning rate fall over the rounds?",
        variants={
            "by half in 75 rounds": {},
            "by half in 24 rounds": {"settling_rounds": 8.0},
            "never": {"settling_rounds": None},
        },
    ),
    "replay": Table(
        asks="Does training on earlier rounds again help, and how many must be kept?",
        variants={"off": {"replay_rounds": 0}, **{f"{count} rounds": {"replay_rounds": count} for count in (3, 64)}},
    ),
    "anchors": Table(
        asks="Do texts on which the model should stay as it is help?",
        variants={
            "off": {"anchor_share": 0.0},
            "share .3 of 64 texts": {},
            "share .3 of 16 texts": {"anchor_texts": 16},
            "share .15 of 64 texts": {"anchor_share": 0.15},
            "share .5 of 64 texts": {"anchor_share": 0.5},
        },
    ),
    "segments": Table(
        asks="Should the student read the subsequent text in pieces?",
        variants={
            "never": {"segments": (1,)},
            "every fourth step": {"segments": (1, 1, 1, 4)},
            "every second step": {"segments": (1, 4)},
        },
    ),
    "optimizer_state": Table(
        asks="Should AdamW's moments start afresh in each round?",
        variants={"reset": {}, "carry": {"optimizer_state": "carry"}},
    ),
    "optimizer": Table(
        asks="Which optimizer, at the best of three learning rates?",
        variants={
            "adamw 7e-05": {},
            "adamw 7e-05, epsilon 1e-3": {"adam_epsilon": 1e-3},
            **{
                f"{name} {rate:.0e}": {"optimizer": name, "learning_rate": rate}
                for name, rates in (
                    ("sgd", (0.03, 0.3, 3.0)),
                    ("lion", (3e-6, 1e-5, 3e-5)),
                    ("muon", (1e-4, 3e-4, 1e-3)),
                )
                for rate in rates
            },
        },
    ),
    "decay": Table(
        asks="Should the weights decay?",
        variants={"no": {}, **{f"{decay}": {"weight_decay": float(decay)} for decay in (1, 10, 30)}},
    ),
    "held_out": Table(
        asks="Should the last tokens of Y judge how much of a round is kept?",
        variants={"no": {}, "64 tokens": {"held_out_tokens": 64}, "256 tokens": {"held_out_tokens": 256}},
    ),
    "temp_lora": Table(
        asks="How good is next-token loss on the text itself (Temp-LoRA) at its best learning rate?",
        variants={
            "absorber": {},
            **{
                f"16 steps, {rate:.0e}": _TEMP_LORA | {"max_steps": 16, "learning_rate": rate}
                for rate in (1e-5, 2e-5, 4e-5, 8e-5)
            },
            **{  # two steps would be over before a warm-up
                f"2 steps, {rate:.0e}, no warm-up": _TEMP_LORA
                | {"max_steps": 2, "learning_rate": rate, "warmup_steps": 0, "schedule": "constant"}
                for rate in (2e-5, 5e-5, 1e-4, 2e-4)
            },
        },
    ),
}
"""By the name on the command line."""
