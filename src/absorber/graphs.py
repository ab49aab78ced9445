"""CUDA graphs of the passes of a round: recorded once per shape, replayed without launching their kernels one by one.

A step over 24 short texts of a 135M model takes longer to launch than to compute. A graph has the shapes, the adapter's
addresses and the settings frozen in it; its inputs are copied into tensors of its own before each replay.

Where a step cannot be recorded it runs as usual: without CUDA, with a model outside `_RECORDABLE` or one that somebody
has hooks on, on a shape that is seen for the first time, and for some of a batch's streams alone.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from absorber.adapter import Adapter
from absorber.backbone import Backbone, altered_by_others

# Decoders that do nothing but causal attention and feed-forward, and so need no mask for texts without padding.
_RECORDABLE = {"llama", "mistral", "qwen2", "qwen3"}
_MASKLESS = "absorber_causal"
# Of these the angles change with the length of what was read, which a recorded step would not see.
_CHANGING_ROPE = {"dynamic", "longrope"}
# Those of steps hold gradients of a whole adapter.
_MOST_RECORDED = 12

Compute = Callable[..., Tensor]


@dataclass(slots=True)
class _Recorded:
    """One graph, with the tensors that it reads and writes."""

    graph: Any
    inputs: list[Tensor]
    result: Tensor
    gradients: list[tuple[Tensor, Tensor | None]]
    """Of which weight, and what it is; none without a backward pass."""


class StepGraphs:
    """The graphs of one adapter."""

    def __init__(self, weights: Sequence[Tensor], places: Hashable) -> None:
        """Begin with none.

        Args:
            weights: The adapter's.
            places: Where the model's weights and the adapter's are, which graphs have in them.
        """
        self.places = places
        self._weights = weights
        self._recorded: dict[Any, _Recorded | None] = {}
        self._pool: Any = None

    def run(
        self,
        key: Any,
        compute: Compute,
        inputs: Sequence[Tensor],
        finish: Callable[[], None] | None,
    ) -> Tensor | None:
        """Compute losses and leave their gradients in the weights' `grad`; or anything without gradients.

        Args:
            key: Whatever `compute` depends on beside the values of its inputs.
            compute: Inputs to losses [B], or to what is wanted.
            inputs: Tensors whose values may differ from call to call.
            finish: What is done with the gradients after the backward pass; None for no such pass, which leaves `grad`
                as it is.

        Returns:
            What was computed, without gradient; None on the first call with this key, which has to run as usual, and
            where it cannot be recorded.
        """
        key = (key, finish is None, tuple((tensor.shape, tensor.dtype) for tensor in inputs))
        if key not in self._recorded:
            while len(self._recorded) >= _MOST_RECORDED:
                del self._recorded[next(iter(self._recorded))]
            self._recorded[key] = None  # kernels are chosen and compiled by a usual run
            return None
        found = self._recorded[key] = self._recorded.pop(key)  # the latest used are kept
        if found is None:
            try:
                found = self._recorded[key] = self._record(compute, inputs, finish)
            except RuntimeError as error:  # the device's memory, or an operation that cannot be recorded
                del self._recorded[key]
                warnings.warn(f"a step could not be recorded and runs as usual: {error}", stacklevel=2)
                return None
        for mine, given in zip(found.inputs, inputs, strict=True):
            mine.copy_(given)
        found.graph.replay()
        for weight, gradient in found.gradients:
            weight.grad = gradient
        return found.result.clone()

    def _record(self, compute: Compute, inputs: Sequence[Tensor], finish: Callable[[], None] | None) -> _Recorded:
        own = [tensor.clone() for tensor in inputs]
        learning = [] if finish is None else self._weights
        for weight in learning:
            weight.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.set_grad_enabled(finish is not None), torch.cuda.graph(graph, pool=self._pool):
            result = compute(*own)
            if finish is not None:
                result.sum().backward()  # type: ignore[no-untyped-call]
                finish()
        self._pool = graph.pool()
        gradients = [(weight, weight.grad) for weight in learning]
        return _Recorded(graph, own, result.detach(), gradients)


_graphs_of: "weakref.WeakKeyDictionary[Adapter, StepGraphs]" = weakref.WeakKeyDictionary()


def is_plain(backbone: Backbone) -> bool:
    """Whether the model does nothing but causal attention over everything, and feed-forward."""
    config = backbone.model.config
    windows = [getattr(config, "sliding_window", None), *(getattr(config, "layer_types", None) or [])]
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in _RECORDABLE
        and rope.get("rope_type", "default") not in _CHANGING_ROPE
        and config._attn_implementation == "sdpa"
        and all(window in (None, "full_attention") for window in windows)
    )


def graphs_of(backbone: Backbone, adapter: Adapter) -> StepGraphs | None:
    """Return the adapter's graphs, or None if its model's steps cannot be recorded."""
    if (
        backbone.device.type != "cuda"
        or not is_plain(backbone)
        or altered_by_others(*backbone.decoder.modules(), backbone.head)
    ):
        return None
    if any(type(projection) is not nn.Linear for projection in backbone.projections.values()):
        return None  # quantized, by kernels of which nobody said that they can be recorded
    weights = [*backbone.model.parameters(), *adapter.parameters()]
    if len({weight.device for weight in weights}) > 1:
        return None
    places, found = tuple(weight.data_ptr() for weight in weights), _graphs_of.get(adapter)
    if found is None or found.places != places:
        found = _graphs_of[adapter] = StepGraphs(adapter.parameters(), places)
    return found


def forget(adapter: Adapter) -> None:
    """Give back the graphs of an adapter, and the memory that they hold."""
    _graphs_of.pop(adapter, None)


@contextlib.contextmanager
def without_masks(backbone: Backbone) -> Iterator[None]:
    """Let the model build no attention mask inside the `with` block.

    It would look at values to see that it needs none, which a graph being recorded cannot, and then build one.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_MASKLESS, sdpa_attention_forward)
    AttentionMaskInterface.register(_MASKLESS, lambda *args, **kwargs: None)
    config = backbone.model.config
    before = config._attn_implementation
    config._attn_implementation = _MASKLESS
    try:
        yield
    finally:
        config._attn_implementation = before
