"""Methods that train an adapter as the stream goes by; they differ in their settings alone.

absorber        our default; absorber-light and absorber-full also study
absorber-paper  Algorithms 1 and 2 as written (arXiv 2604.20915), without the threshold, which ends every round at once
temp-lora       next-token loss on the text itself (arXiv 2401.11504): rank 64, two steps a round; at 2e-4, the best of
                four rates (docs/methods.md), published with 5e-5
temp-lora-16    the same with as many steps as our default takes, at the best of four learning rates (docs/retention.md)
dcd             Deep Context Distillation (arXiv 2503.08727): normalised hidden L1 and KL, rank 16, 1e-3, published
                and the best of four rates
"""

import contextlib
from typing import Any

from torch import Tensor

from absorber.adapter import Adapter
from absorber.bench.methods.reader import Method, Reader, Setting
from absorber.config import PRESETS, AbsorbConfig
from absorber.memory import Round
from absorber.stream import Stream


class LoRA(Method):
    """An adapter trained round by round as an `AbsorbConfig` says."""

    def __init__(self, config: AbsorbConfig) -> None:
        """Take the settings of a round."""
        self.absorb_config = config

    def begin(self, setting: Setting) -> "LoRAReader":
        """Make a reader for B fresh streams."""
        return LoRAReader(setting, self.absorb_config.replace(seed=setting.seed))

    def config(self) -> dict[str, Any]:
        """All fields of the settings."""
        return self.absorb_config.replace(seed=0).to_dict()

    def replace(self, **changes: Any) -> "LoRA":
        """Return the same with other settings of a round."""
        return LoRA(self.absorb_config.replace(**changes))


class LoRAReader(Reader):
    """B streams with an adapter each."""

    def __init__(self, setting: Setting, config: AbsorbConfig) -> None:
        """Begin with fresh adapters."""
        super().__init__(setting)
        self.adapter = Adapter.fresh(setting.backbone, config, num_streams=setting.num_streams)
        self.rounds: list[list[Round]] = []
        """The ledger: per round one line per stream."""
        self._stream = Stream(
            setting.backbone,
            self.adapter,
            config,
            setting.stream,
            sink_id=setting.sink_id,
            guide=setting.guide,
            on_round=self.rounds.append,
        )

    def read(self, token_ids_BT: Tensor) -> None:
        """Absorb what leaves the window."""
        super().read(token_ids_BT)
        self._stream.append(token_ids_BT)

    def speaking(self) -> contextlib.AbstractContextManager[None]:
        """Attach the adapters."""
        return self.adapter.attached(self.setting.backbone)


def lora_methods() -> dict[str, Method]:
    """The table of them."""
    default, paper = PRESETS["default"].absorb, PRESETS["paper"].absorb.replace(threshold=None)
    # The published baselines train on the round's own text alone.
    plain = default.replace(segments=(1,), replay_rounds=0, anchor_share=0.0, settling_rounds=None)
    next_token_alone = plain.replace(kl_weight=0.0, next_token_weight=1.0)
    distilled = plain.replace(hidden_weight=1.0, kl_weight=1.0, next_token_weight=0.0)
    return {
        # Two steps would be over before a warm-up.
        "temp-lora": LoRA(
            next_token_alone.replace(max_steps=2, learning_rate=2e-4, warmup_steps=0, schedule="constant")
        ),
        "temp-lora-16": LoRA(next_token_alone.replace(max_steps=16, learning_rate=4e-5)),
        "dcd": LoRA(distilled.replace(rank=16, max_steps=8, learning_rate=1e-3)),
        "absorber-paper": LoRA(paper),
        "absorber": LoRA(default),
        "absorber-light": LoRA(default.replace(study="light")),
        "absorber-full": LoRA(default.replace(study="full")),
    }
