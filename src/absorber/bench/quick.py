"""Sizes so small that everything runs in minutes on two cores: whether it works, not how good it is."""

from collections.abc import Mapping
from typing import Any

from absorber.bench.latency import Latency
from absorber.bench.methods import LoRA, Method
from absorber.config import AbsorbConfig

WINDOW_SHARE = 16
"""By how much the windows that an ablation compares are divided."""

_WINDOW = {"context_tokens": 32, "sync_tokens": 48}
_ASKING = {"num_rounds": 2, "num_streams": 2, "num_queries": 2, "context_tokens": 60, "sync_tokens": 100}

SIZES: dict[str, dict[str, Any]] = {
    "retention": {"num_rounds": 2, "num_streams": 2, "passage_tokens": 16, **_WINDOW},
    "recall": {
        "num_rounds": 2,
        "num_streams": 2,
        "num_facts": 1,
        "ages": (1, 2),
        "context_tokens": 100,
        "sync_tokens": 48,
    },
    "icl": {**_ASKING, "num_classes": 4},
    "reasoning": {**_ASKING, "max_new_tokens": 4},
    "summary": {**_ASKING, "max_new_tokens": 4},
    "ablation": {"num_streams": 1, "num_tokens": 32, "passage_tokens": 16, **_WINDOW},
}
"""What the tasks' settings become, by task."""


def smaller(config: AbsorbConfig) -> AbsorbConfig:
    """The same with rounds of two steps at most, and little to write for anchors and study."""
    return config.replace(
        max_steps=min(config.max_steps, 2),
        anchor_texts=min(config.anchor_texts, 2),
        anchor_tokens=min(config.anchor_tokens, 8),
        study_steps=min(config.study_steps, 2),
        study_passages=min(config.study_passages, 2),
        study_written_tokens=min(config.study_written_tokens, 8),
    )


def smaller_methods(methods: Mapping[str, Method]) -> dict[str, Method]:
    """The same methods with smaller rounds, where they have any."""
    return {name: LoRA(smaller(own.absorb_config)) if isinstance(own, LoRA) else own for name, own in methods.items()}


def smaller_speed(seed: int) -> Latency:
    """What `latency` and `cost` measure."""
    return Latency(
        lengths=(64, 128),
        batches=(1, 2),
        num_tokens=4,
        absorb=smaller(AbsorbConfig()),
        repeats=1,
        seed=seed,
        context_tokens=_WINDOW["context_tokens"],
        sync_tokens=_WINDOW["sync_tokens"],
    )
