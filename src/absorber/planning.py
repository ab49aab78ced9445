"""What absorbing takes of a device, from a model's configuration alone, and which settings fit.

Bytes are counted: weights, adapter, optimizer and cache exactly; activations by the tensors that a block of the Llama
family keeps, and roughly for others. Time is estimated from the device's rates. What the allocator loses, and what
other programs hold, is not in it.

Shapes: B streams; n, m, K as in `StreamConfig` and `AbsorbConfig`.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from absorber import kernels
from absorber.backbone import inspect, num_features
from absorber.config import AbsorbConfig, Preset, StreamConfig
from absorber.errors import ConfigError, ModelError
from absorber.synchronization import LOGITS_AT_ONCE

Quantization = Literal["none", "8bit", "4bit"]

SPARE = 0.9
"""Share of a device's memory that a plan uses; the allocator loses some of the rest."""
READ_EFFICIENCY = 0.9
"""Share of its bandwidth that a device is assumed to reach when it writes a token."""
_MARGIN = 512
"""A product of I inputs and O outputs is taken to last as long as one of I O + `_MARGIN` (I + O) weights at the full
rate: narrow ones do not reach it, 4096 wide ones to 80 %, 576 wide ones to 36 %."""
_TOUCHES = 6.25
"""How often a pass reads or writes the bytes that a step keeps of a block."""
_BESIDE_MS = 0.0055
"""What a kernel of a memory beside the base takes more than its bytes do; there are `_BESIDE_KERNELS` a block. These
five are fitted to LLaMA2-7B and SmolLM2-135M geometry on one H100 and one H200 (tests/test_planning.py)."""
_BESIDE_KERNELS = 4
_OPTIMIZER_BYTES = 36
"""Read and written for a weight in a step of AdamW, clipping included."""

# Bytes of a projection's weight; 4bit has a float32 for each 64 of them (bitsandbytes).
_QUANTIZED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
_MOMENTS = {"adamw": 2, "sgd": 1, "lion": 1, "muon": 1}

# What is given up for the sake of memory or time, and how reluctantly: a judgement, on what docs/retention.md measured.
_RELUCTANCE: dict[str, dict[Any, int]] = {
    "checkpointing": {False: 0, True: 1},
    "max_steps": {16: 0, 12: 2, 8: 4, 4: 10, 2: 16, 1: 24},
    "window": {(512, 1024): 0, (1024, 1024): 3, (256, 512): 6, (128, 256): 12, (64, 128): 20},
    "rank": {64: 0, 32: 5, 16: 9, 8: 14, 4: 20},
    "quantization": {"none": 0, "8bit": 8, "4bit": 11},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model, from its configuration."""

    num_parameters: int
    """Numbers in the model."""
    num_layers: int
    """L."""
    hidden: int
    """D."""
    intermediate: int
    """Features between the feed-forward projections."""
    query_features: int
    """Features of all heads of queries."""
    vocabulary: int
    """V."""
    cache_features: int
    """Keys and values of one token in one layer."""
    projection_features: int
    """Inputs and outputs of all linear projections that get an adapter."""
    projection_weights: int
    """Weights of the same."""
    max_positions: int | None
    """Positions that it was built for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes that a round takes at its peak, by part."""

    weights: int
    """Of the base model."""
    adapter: int
    """In its own type, and once more in the model's, for decoding."""
    optimizer: int
    """Gradients, moments, and the copy that a round is rolled back to."""
    activations: int
    """What a student step keeps for its backward pass, or what the teacher's pass needs, if that is more."""
    logits: int
    """Of a piece of the text, of student and teacher, with logarithms and slopes."""
    states: int
    """What the teachers of a round's lessons said."""
    cache: int
    """Keys and values of the window."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a device does a second."""

    flops: float
    """Floating-point operations in a large product of matrices."""
    bandwidth: float
    """Bytes read from its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Settings that fit, and what they are expected to take."""

    preset: Preset
    """The settings."""
    quantization: Quantization
    """How the base model is loaded."""
    needs: Needs
    """Memory."""
    absorb_ms: float
    """Of a token, absorbed in each of the streams."""
    decode_ms: float
    """Of a token, written in each of the streams with the memory beside the base, as a session does unless told."""
    merged_decode_ms: float
    """The same with the memory merged into a copy of the weights, which is not in `needs`."""
    break_even_tokens: int
    """From how many tokens of a stream on full attention's cache is larger than all that Absorber takes beside the
    weights."""


def shape_of(config: Any) -> Shape:
    """Look up the sizes of a model.

    Raises:
        ModelError: If it is no causal language model that can be used.
    """
    try:
        with torch.device("meta"):  # shapes without memory
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the model is no causal language model that transformers knows: {reason}") from error
    backbone = inspect(model)
    text = config.get_text_config()
    query_heads = getattr(text, "num_attention_heads", None) or 0
    heads = getattr(text, "num_key_value_heads", None) or query_heads
    head_features = getattr(text, "head_dim", None) or (text.hidden_size // query_heads if query_heads else 0)
    features = [num_features(projection) for projection in backbone.projections.values()]
    return Shape(
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        num_layers=len(backbone.blocks),
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        query_features=query_heads * head_features,
        vocabulary=text.vocab_size,
        cache_features=2 * heads * head_features,
        projection_features=sum(map(sum, features)),
        projection_weights=sum(inputs * outputs for inputs, outputs in features),
        max_positions=backbone.max_positions,
    )


def needs(
    shape: Shape,
    preset: Preset,
    *,
    weight_bytes: int,
    quantization: Quantization = "none",
    num_streams: int = 1,
    device: str = "cuda",
) -> Needs:
    """Count what a round takes.

    Args:
        shape: Of the model.
        preset: Settings.
        weight_bytes: Of one number in the model's type.
        quantization: How the base model is loaded.
        num_streams: B.
        device: Kind of device, which decides how many logits are built at once, and whether a kernel takes their
            losses, which keeps no logarithms.
    """
    config, stream = preset.absorb, preset.stream
    quantized = shape.projection_weights if quantization != "none" else 0
    adapter = num_streams * shape.projection_features * config.adapter_rank
    adapter_bytes = 2 if config.adapter_dtype == "bfloat16" else 4
    rows = num_streams * (stream.sync_tokens + 1)
    taught = num_streams * (stream.teacher_tokens + stream.window_tokens + 1)
    block = rows * _block_bytes(shape, weight_bytes, config.adapter_rank, fused=kernels.usable_on(device))
    kept = rows * shape.num_layers * shape.hidden * weight_bytes + block if config.checkpointing else None
    converted = adapter * weight_bytes if weight_bytes != adapter_bytes else 0  # for the products
    if kept is not None and (quantization != "none" or not kernels.usable_on(device)):
        converted //= shape.num_layers  # hooks convert the factors of a block when it is computed again
    student = converted + (block * shape.num_layers if kept is None else kept)
    # Nothing is kept for a backward pass: the widest place of a block, and what goes around it.
    teacher = taught * weight_bytes * (4 * shape.hidden + 3 * shape.intermediate)
    lessons = 1 + min(config.replay_rounds, round(config.replay_share * config.max_steps)) + config.has_anchors
    layers = 1 + (shape.num_layers if config.hidden_weight else 0)
    at_once = min(LOGITS_AT_ONCE[device], rows * shape.vocabulary)
    return Needs(
        weights=int((shape.num_parameters - quantized) * weight_bytes + quantized * _QUANTIZED.get(quantization, 0)),
        adapter=adapter * (adapter_bytes + weight_bytes),
        optimizer=adapter * adapter_bytes * (2 + _MOMENTS[config.optimizer]),
        activations=max(student, teacher),
        logits=at_once * (2 * weight_bytes + (0 if kernels.usable_on(device) else 5 * 4)),
        # Views of what the teacher said of X and Y, which stays as a whole.
        states=lessons * taught * layers * shape.hidden * weight_bytes,
        cache=num_streams
        * (1 + stream.window_tokens + stream.max_new_tokens)
        * shape.num_layers
        * shape.cache_features
        * weight_bytes,
    )


def _block_bytes(shape: Shape, weight_bytes: int, rank: int, *, fused: bool) -> int:
    """What the backward pass of one block needs of one token: what norms and projections are given, queries, keys,
    values and their mixture, gate, the other branch, their product; A x of each. Parts that are not fused keep what the
    norms are given in float32, and the gate's activation."""
    numbers = 2 * shape.hidden + 2 * shape.query_features + shape.cache_features + 3 * shape.intermediate + 7 * rank
    if fused:
        return weight_bytes * (numbers + 2 * shape.hidden)
    return weight_bytes * (numbers + shape.intermediate) + 2 * 4 * shape.hidden


def absorb_ms(
    shape: Shape,
    preset: Preset,
    rates: Rates,
    *,
    weight_bytes: int,
    num_streams: int = 1,
    device: str = "cuda",
) -> float:
    """Estimate the time of a round, by token that it absorbs in each stream.

    Counted: K steps of two operations per weight and token forward and as many backward, and once more forward if
    blocks are computed again; the teacher's pass over the round, and two more over anchors and an earlier round if what
    it says of them is not kept; the last look; for each of these passes the activations that are read and written, and
    for each step the optimizer's state. Study is not, nor what a quantized weight takes to be spelled out.
    """
    config, stream = preset.absorb, preset.stream
    taught = 1
    if config.hidden_weight or config.teacher != "base":
        taught += config.has_replay + config.has_anchors
    # Passes over a token: forward, and a backward pass counts as two of reading and writing, as one of products.
    once = taught * stream.window_tokens + stream.sync_tokens
    steps = config.max_steps * stream.sync_tokens
    products = once + (3 if config.checkpointing else 2) * steps
    moved = once + (4 if config.checkpointing else 3) * steps
    # Logits of student and teacher, in each step and in the look.
    spoken = 2 * (steps + stream.sync_tokens)
    wide = shape.projection_weights + (config.adapter_rank + _MARGIN) * shape.projection_features
    head = shape.hidden * shape.vocabulary + _MARGIN * (shape.hidden + shape.vocabulary)
    flops = 2 * (wide * products + head * (spoken + steps))
    block = _block_bytes(shape, weight_bytes, config.adapter_rank, fused=kernels.usable_on(device))
    touched = block * shape.num_layers * moved + shape.vocabulary * weight_bytes * spoken
    optimizer = config.max_steps * shape.projection_features * config.adapter_rank * _OPTIMIZER_BYTES
    seconds = num_streams * (flops / rates.flops + (_TOUCHES * touched + optimizer) / rates.bandwidth)
    return 1000 * seconds / stream.context_tokens


def decode_ms(
    shape: Shape,
    preset: Preset,
    found: Needs,
    rates: Rates,
    *,
    weight_bytes: int,
    num_streams: int = 1,
    merged: bool = False,
) -> float:
    """Estimate the time of a token: the weights and a full window are read once.

    Args:
        shape: Of the model.
        preset: Settings.
        found: What `needs` found.
        rates: Of the device.
        weight_bytes: Of one number in the model's type.
        num_streams: B.
        merged: The memory is in the weights. Beside them it is read as well, and takes kernels of its own.
    """
    stream = preset.stream
    num_bytes = found.weights + found.cache * stream.window_tokens / (1 + stream.window_tokens + stream.max_new_tokens)
    more = 0.0
    if not merged:
        num_bytes += num_streams * shape.projection_features * preset.absorb.adapter_rank * weight_bytes
        more = shape.num_layers * _BESIDE_KERNELS * _BESIDE_MS
    return 1000 * num_bytes / (READ_EFFICIENCY * rates.bandwidth) + more


def plan(
    shape: Shape,
    *,
    memory_bytes: int,
    rate: float,
    rates: Rates,
    weight_bytes: int,
    num_streams: int = 1,
    device: str = "cuda",
) -> Plan:
    """Choose the settings that fit and give up least.

    Args:
        shape: Of the model.
        memory_bytes: What the device has; `SPARE` of it is used.
        rate: Tokens a second that each stream brings.
        rates: Of the device.
        weight_bytes: Of one number in the model's type.
        num_streams: B.
        device: Its kind.

    Raises:
        ConfigError: If nothing fits; the message says what is too much.
    """
    smallest, quickest = memory_bytes * 1000, 0.0
    found: list[tuple[int, Plan]] = []
    for values in itertools.product(*_RELUCTANCE.values()):
        chosen = dict(zip(_RELUCTANCE, values, strict=True))
        preset = _preset(chosen)
        if shape.max_positions is not None and preset.stream.window_tokens + 1 > shape.max_positions:
            continue
        quantization = chosen["quantization"]
        need = needs(
            shape,
            preset,
            weight_bytes=weight_bytes,
            quantization=quantization,
            num_streams=num_streams,
            device=device,
        )
        taken = absorb_ms(shape, preset, rates, weight_bytes=weight_bytes, num_streams=num_streams, device=device)
        smallest, quickest = min(smallest, need.total), max(quickest, 1000 / taken)
        if need.total > SPARE * memory_bytes or taken * rate > 1000:
            continue
        beside, merged = (
            decode_ms(shape, preset, need, rates, weight_bytes=weight_bytes, num_streams=num_streams, merged=is_merged)
            for is_merged in (False, True)
        )
        entry = Plan(
            preset=preset,
            quantization=quantization,
            needs=need,
            absorb_ms=taken,
            decode_ms=beside,
            merged_decode_ms=merged,
            break_even_tokens=_break_even(shape, need, num_streams * weight_bytes),
        )
        found.append((sum(_RELUCTANCE[name][value] for name, value in chosen.items()), entry))
    if not found:
        raise ConfigError(
            f"nothing fits: the smallest settings need {smallest / 1e9:.2f} GB of the {SPARE * memory_bytes / 1e9:.2f} "
            f"that may be used, and the quickest absorb {quickest:.3g} tokens a second of {rate:g}. Give more memory, "
            "a smaller model, fewer streams or a lower rate"
        )
    return min(found, key=lambda pair: (pair[0], pair[1].needs.total))[1]


def _break_even(shape: Shape, need: Needs, number_bytes: int) -> int:
    """Tokens whose keys and values take as much as a round does beside the weights; 0 for a model that keeps none."""
    per_token = shape.num_layers * shape.cache_features * number_bytes
    return -(-(need.total - need.weights) // per_token) if per_token else 0


def _preset(chosen: dict[str, Any]) -> Preset:
    context_tokens, sync_tokens = chosen["window"]
    return Preset(
        absorb=AbsorbConfig(rank=chosen["rank"], max_steps=chosen["max_steps"], checkpointing=chosen["checkpointing"]),
        stream=StreamConfig(context_tokens=context_tokens, sync_tokens=sync_tokens),
    )
