"""LoRA with a stream axis: each row of the batch may have weights of its own.

The adapter reaches the model through forward hooks on its linear projections, so attaching and detaching leaves
the module tree alone. This is the only file that knows PEFT, whose folder format memories are stored in.

Shapes: B streams, T tokens, R rank, I inputs and O outputs of a projection.
"""

import contextlib
import json
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from absorber.backbone import Backbone, base_name, num_features
from absorber.config import AbsorbConfig
from absorber.errors import ConfigError, MemoryFileError, MemoryMismatchError, ModelError
from absorber.low_rank import add_low_rank, frozen_weight

_PEFT_PREFIX = "base_model.model."
_attached: "weakref.WeakKeyDictionary[nn.Module, Adapter]" = weakref.WeakKeyDictionary()

Snapshot = list[Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """What PEFT has to be told of the model that an adapter belongs to."""

    blocks_name: str
    """Dotted name of the list of blocks."""
    num_layers: int
    """L: how many blocks."""
    transposed: bool
    """Whether projections store their weights as inputs x outputs (GPT-2's Conv1D)."""

    @classmethod
    def of(cls, backbone: Backbone) -> "Layout":
        """Look it up."""
        transposed = any(isinstance(module, Conv1D) for module in backbone.projections.values())
        return cls(backbone.blocks_name, len(backbone.blocks), transposed)

    def layer(self, name: str) -> int:
        """Number of the block that a projection is in."""
        return int(name.removeprefix(self.blocks_name + ".").split(".", 1)[0])


class Adapter:
    """The trainable weights of B streams: for each projection W a product B A, so that W x becomes W x + s B A x.

    Low-Rank Adaptation, arXiv 2106.09685. With one stream the adapter serves batches of any size; with more, row b
    of a batch uses the weights of stream b. A batch may have S rows per stream, those of stream 0 first.
    """

    def __init__(self, down: dict[str, Tensor], up: dict[str, Tensor], *, alpha: float, layout: Layout) -> None:
        """Take weights as they are; `Adapter.fresh` makes new ones.

        Args:
            down: A by the projection's dotted name in the model, each [B, R, I].
            up: B by the same names, each [B, O, R].
            alpha: The product is scaled by alpha / R.
            layout: Of the model that it belongs to.
        """
        self.down = {name: nn.Parameter(weight) for name, weight in down.items()}
        self.up = {name: nn.Parameter(weight) for name, weight in up.items()}
        self.alpha, self.layout = alpha, layout
        self.enabled = True
        self.rows: Tensor | None = None
        """Which streams' rows a batch has, inside `only`; None for those of all."""
        self.elsewhere: frozenset[str] = frozenset()
        """Projections that add their product themselves, inside `fused_adapter.together`."""

    @classmethod
    def fresh(cls, backbone: Backbone, config: AbsorbConfig, *, num_streams: int = 1) -> "Adapter":
        """Make an adapter that changes nothing yet: A random, B zero. All streams begin alike.

        Raises:
            ConfigError: If `target_modules` or `adapted_layers` names nothing in the model.
        """
        chosen = _choose(backbone, config)
        kind = getattr(torch, config.adapter_dtype)
        generator = torch.Generator().manual_seed(config.seed)
        down, up, rank = {}, {}, config.adapter_rank
        for name, projection in chosen.items():
            inputs, outputs = num_features(projection)
            bound = 1 / math.sqrt(inputs)  # Kaiming uniform with a = sqrt(5), as PEFT begins
            first_RI = torch.empty(config.rank, inputs).uniform_(-bound, bound, generator=generator)
            # The ranks that study begin elsewhere (study.begin); the others are the same with and without them.
            first_RI = nn.functional.pad(first_RI, (0, 0, 0, rank - config.rank))
            place = backbone.device
            down[name] = first_RI.to(place, kind).repeat(num_streams, 1, 1)
            up[name] = torch.zeros(num_streams, outputs, rank, device=place, dtype=kind)
        scale = 1.0 if config.alpha is None else config.alpha / config.rank
        return cls(down, up, alpha=rank * scale, layout=Layout.of(backbone))

    @property
    def rank(self) -> int:
        """R."""
        return next(iter(self.down.values())).shape[1]

    @property
    def num_streams(self) -> int:
        """B."""
        return next(iter(self.down.values())).shape[0]

    @property
    def scale(self) -> float:
        """What the product B A is multiplied with."""
        return self.alpha / self.rank

    @property
    def num_bytes(self) -> int:
        """Bytes of all streams' weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """All weights, in a fixed order; axis 0 is the stream."""
        return [weight for name in self.down for weight in (self.down[name], self.up[name])]

    def drop_gradients(self, ranks: slice, *, of_all_down: bool = False) -> None:
        """Take away the gradients of these ranks, and those of A altogether if `of_all_down`."""
        for down_BRI, up_BOR in zip(self.down.values(), self.up.values(), strict=True):
            if up_BOR.grad is not None:
                up_BOR.grad[:, :, ranks] = 0
            if of_all_down:
                down_BRI.grad = None
            elif down_BRI.grad is not None:
                down_BRI.grad[:, ranks] = 0

    # --- Attaching

    @contextlib.contextmanager
    def attached(self, backbone: Backbone) -> Iterator[None]:
        """Apply the adapter to every forward pass of the model inside the `with` block.

        The sum may be written over what a projection gave: a hook of others that keeps that has to copy it.

        Raises:
            ModelError: If another adapter is attached, or a projection is not in the model.
        """
        if backbone.model in _attached:
            raise ModelError("a memory is already applied to this model; leave its `with` block first")
        strangers = sorted(set(self.down) - set(backbone.projections))
        if strangers:
            raise ModelError(f"the model has no projection {strangers[0]}; this memory is of another architecture")
        handles = []
        _attached[backbone.model] = self
        try:
            for name in self.down:
                handles.append(backbone.projections[name].register_forward_hook(self._hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            del _attached[backbone.model]

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the pristine base model speak inside the `with` block, while attached."""
        before = self.enabled
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = before

    @contextlib.contextmanager
    def only(self, rows: Tensor | None) -> Iterator[None]:
        """Take batches that have the rows of some streams alone inside the `with` block; None for all."""
        before = self.rows
        self.rows = rows
        try:
            yield
        finally:
            self.rows = before

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.enabled or name in self.elsewhere:
                return None
            down_BRI: Tensor = self.down[name]
            up_BOR: Tensor = self.up[name]
            if self.rows is not None:
                down_BRI, up_BOR = down_BRI[self.rows], up_BOR[self.rows]
            over = frozen_weight(module) is not None
            return add_low_rank(output, args[0], down_BRI, up_BOR, scale=self.scale, over=over)

        return add

    # --- Streams

    def snapshot(self, streams: Tensor | None = None) -> Snapshot:
        """Copy the weights of all streams, or of those where the mask [B] is True."""
        weights = [weight.detach() if streams is None else weight.detach()[streams] for weight in self.parameters()]
        copies = [torch.empty_like(weight) for weight in weights]
        torch._foreach_copy_(copies, weights)
        return copies

    @torch.no_grad()
    def restore(self, snapshot: Snapshot, streams: Tensor | None = None) -> None:
        """Put back what `snapshot` returned for the same streams."""
        if streams is None:
            torch._foreach_copy_(tuple(self.parameters()), snapshot)
            return
        for weight, saved in zip(self.parameters(), snapshot, strict=True):
            weight[streams] = saved

    def stream(self, index: int) -> "Adapter":
        """Copy one stream's weights into an adapter of its own."""
        return Adapter(
            {name: weight[index : index + 1].detach().clone() for name, weight in self.down.items()},
            {name: weight[index : index + 1].detach().clone() for name, weight in self.up.items()},
            alpha=self.alpha,
            layout=self.layout,
        )

    @classmethod
    def joined(cls, adapters: "Sequence[Adapter]") -> "Adapter":
        """Copy the streams of several adapters of one shape into one, those of the first one first."""
        first = adapters[0]
        down, up = (
            {name: torch.cat([getattr(one, part)[name].detach() for one in adapters]) for name in first.down}
            for part in ("down", "up")
        )
        return cls(down, up, alpha=first.alpha, layout=first.layout)

    def to(self, device: torch.device) -> "Adapter":
        """Copy to a device."""
        return Adapter(
            {name: weight.detach().to(device) for name, weight in self.down.items()},
            {name: weight.detach().to(device) for name, weight in self.up.items()},
            alpha=self.alpha,
            layout=self.layout,
        )


def mean_update(adapter: Adapter, before: Snapshot, norm: str) -> Tensor:
    """Mean absolute ("l1") or squared ("l2") change of an adapted weight since a snapshot.

    Returns:
        One number per stream [B], float32, with gradient.

    Cost: "l2" stays in rank space by tr(A A^T B^T B); "l1" has to build each O x I change, one at a time.
    """
    total_B = torch.zeros(adapter.num_streams, device=before[0].device)
    count = 0
    for index, name in enumerate(adapter.down):
        down_BRI, up_BOR = adapter.down[name].float(), adapter.up[name].float() * adapter.scale
        old_BRI, old_BOR = before[2 * index].float(), before[2 * index + 1].float() * adapter.scale
        count += up_BOR.shape[1] * down_BRI.shape[2]
        if norm == "l2":
            both_BRI, both_BOR = torch.cat([down_BRI, old_BRI], dim=1), torch.cat([up_BOR, -old_BOR], dim=2)
            total_B = total_B + ((both_BRI @ both_BRI.mT) * (both_BOR.mT @ both_BOR)).sum(dim=(1, 2))
        else:
            # Two products, so that no change is exactly zero: the gradient of |x| is 0 there, and +-1 beside it.
            total_B = total_B + (up_BOR @ down_BRI - old_BOR @ old_BRI).abs().sum(dim=(1, 2))
    return total_B / count


def _choose(backbone: Backbone, config: AbsorbConfig) -> dict[str, nn.Module]:
    """The projections that get an adapter, by name."""
    chosen = backbone.projections
    if config.target_modules is not None:
        known = sorted({_suffix(name) for name in chosen})
        strangers = sorted(set(config.target_modules) - set(known))
        if strangers:
            raise ConfigError(f"target_modules has {', '.join(strangers)}; this model has {', '.join(known)}")
        chosen = {name: module for name, module in chosen.items() if _suffix(name) in config.target_modules}
    if config.adapted_layers is not None:
        layout = Layout.of(backbone)
        wrong = [layer for layer in config.adapted_layers if not 0 <= layer < len(backbone.blocks)]
        if wrong:
            raise ConfigError(f"adapted_layers has {wrong[0]}; this model has layers 0 to {len(backbone.blocks) - 1}")
        chosen = {name: module for name, module in chosen.items() if layout.layer(name) in config.adapted_layers}
    return chosen


def _suffix(name: str) -> str:
    return name.rsplit(".", 1)[-1]


# --- PEFT folders ----------------------------------------------------------------------------------------------


def save_peft(adapter: Adapter, folder: Path, *, base: str, dtype: torch.dtype) -> None:
    """Write one stream's weights as a PEFT LoRA folder, which PEFT, vLLM and SGLang load.

    Args:
        adapter: An adapter of one stream.
        folder: An existing folder.
        base: Name of the base model.
        dtype: Type of the stored weights.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    layout = adapter.layout
    layers = sorted({layout.layer(name) for name in adapter.down})
    partial = len(layers) < layout.num_layers
    LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        # PEFT takes a whole number here in its annotations only; the value is used as it is.
        lora_alpha=int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted({_suffix(name) for name in adapter.down}),
        layers_to_transform=layers if partial else None,
        layers_pattern=_suffix(layout.blocks_name) if partial else None,
        fan_in_fan_out=layout.transposed,
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(folder)
    weights = {}
    for name in adapter.down:
        weights[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = adapter.down[name][0].detach().to("cpu", dtype).contiguous()
        weights[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = adapter.up[name][0].detach().to("cpu", dtype).contiguous()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_peft(backbone: Backbone, folder: Path, *, dtype: torch.dtype = torch.float32) -> Adapter:
    """Read a PEFT LoRA folder, whether Absorber or PEFT wrote it.

    Args:
        backbone: The model that it belongs to.
        folder: The place.
        dtype: Type in which the weights are held.

    Raises:
        MemoryFileError: If files are missing or damaged, or it is more than a plain LoRA.
        MemoryMismatchError: If its weights do not fit the model.
    """
    config, weights = _read_peft(folder)
    rank, alpha = config["r"], config["lora_alpha"]
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    for key, weight in weights.items():
        name, _, part = key.removeprefix(_PEFT_PREFIX).rpartition(".lora_")
        projection = backbone.projections.get(name)
        table = {"A.weight": down, "B.weight": up}.get(part)
        if projection is None or table is None:
            raise MemoryMismatchError(
                f"{folder} has weights for {name or key}, which {type(backbone.model).__name__} "
                f"({base_name(backbone.model)}) does not have; load the model it was absorbed with: "
                f"{config.get('base_model_name_or_path')}"
            )
        inputs, outputs = num_features(projection)
        shape = (rank, inputs) if part == "A.weight" else (outputs, rank)
        if tuple(weight.shape) != shape:
            raise MemoryMismatchError(
                f"{folder} has {tuple(weight.shape)} for {name}, but {base_name(backbone.model)} needs {shape}; "
                f"load the model it was absorbed with: {config.get('base_model_name_or_path')}"
            )
        table[name] = weight.to(backbone.device, dtype)[None]
    if not down or set(down) != set(up):
        raise MemoryFileError(f"{folder} is damaged: its A and B matrices do not pair up; absorb the text again")
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)
    order = [name for name in backbone.projections if name in down]  # that of a fresh adapter, as optimizers count
    return Adapter(
        {name: down[name] for name in order},
        {name: up[name] for name in order},
        alpha=alpha,
        layout=Layout.of(backbone),
    )


def _read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and weights of a folder that holds one plain LoRA."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise MemoryFileError(
            f"{folder} is not a memory: {Path(str(error.filename or error)).name} is missing"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise MemoryFileError(f"{folder} is damaged: {error}. Absorb the text again, or restore a copy") from error
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    unread = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "use_bdlora", "lora_bias")
    extras = [key for key in unread if kind == "LORA" and config.get(key)]
    if kind != "LORA" or config.get("bias", "none") != "none" or extras:
        what = kind if kind != "LORA" else ", ".join(extras) or "bias"
        raise MemoryFileError(f"{folder} holds {what}; only plain LoRA of one rank can be read")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        raise MemoryFileError(f"{folder} is damaged: adapter_config.json has no r or lora_alpha; restore a copy")
    return config, weights
