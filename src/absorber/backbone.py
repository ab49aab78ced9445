"""Causal language models as the method sees them: look into one, run it and keep its hidden states.

The user's Hugging Face model stays their own object: nothing here replaces a module or changes a weight's value, and
hooks live no longer than the `with` block or call that sets them.

Shapes: B streams, T tokens, D hidden, V vocabulary.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from absorber.errors import ConfigError, ModelError

# Their kernels read the weights of `out_proj` without calling it, so neither our hooks nor PEFT's LoRA reach it.
_MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


@dataclass(frozen=True, slots=True, eq=False)
class Backbone:
    """A causal language model, with the parts that absorption needs found and named."""

    model: Any
    """The user's Hugging Face model."""
    decoder: nn.Module
    """The model without its output head: token ids to final hidden states."""
    blocks: nn.ModuleList
    """The transformer blocks, in order."""
    blocks_name: str
    """Dotted name of `blocks` in the model."""
    head: nn.Module
    """The output projection: hidden states to logits."""
    projections: dict[str, nn.Module]
    """Every linear projection inside the blocks, by its dotted name in the model."""
    max_positions: int | None
    """Positions that the model was built for; None if it names no limit."""
    logits_softcap: float | None
    """Logits x become cap * tanh(x / cap) (Gemma 2)."""
    logits_divisor: float
    """Logits are divided by this (Granite, Cohere); 1 for most."""

    @property
    def device(self) -> torch.device:
        """Where the input goes."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Project final hidden states to logits, as the model itself does, in its own type."""
        logits_BTV: Tensor = self.head(hidden_BTD.to(self.head.weight.dtype))  # type: ignore[arg-type]
        if self.logits_divisor != 1:
            logits_BTV = logits_BTV / self.logits_divisor
        if self.logits_softcap is not None:
            logits_BTV = torch.tanh(logits_BTV / self.logits_softcap) * self.logits_softcap
        return logits_BTV


def inspect(model: Any) -> Backbone:
    """Find in a Hugging Face causal language model the parts that absorption needs.

    Raises:
        ModelError: If a part is missing; the message names it.
    """
    kind = type(model).__name__

    def missing(what: str) -> ModelError:
        return ModelError(f"{kind} cannot be used: {what}. Absorber needs a decoder-only Hugging Face causal LM")

    if not hasattr(model, "config"):
        raise ModelError(f"a Hugging Face model is needed; got {kind}. Load one with absorber.load()")
    config = model.config.get_text_config()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise missing("it has no output embeddings (lm_head)")
    if getattr(config, "is_encoder_decoder", False):
        raise missing("it is an encoder-decoder")
    num_layers = getattr(config, "num_hidden_layers", None)
    # The decoder's whole stack is the outermost list with one module per layer.
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not stacks:
        raise missing(f"it has no list of {num_layers} blocks")
    blocks_name, blocks = min(stacks, key=lambda pair: pair[0].count("."))
    decoder = getattr(model, "base_model", None)
    if decoder is None or decoder is model:
        raise missing("its decoder without the output head was not found (base_model)")
    projections = {
        f"{blocks_name}.{name}": module
        for name, module in blocks.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and not (getattr(config, "model_type", None) in _MAMBA and name.endswith("out_proj"))
    }
    if not projections:
        raise missing("its blocks hold no linear projections (torch.nn.Linear or Conv1D)")
    return Backbone(
        model=model,
        decoder=decoder,
        blocks=blocks,
        blocks_name=blocks_name,
        head=head,
        projections=projections,
        max_positions=getattr(config, "max_position_embeddings", None),
        logits_softcap=getattr(config, "final_logit_softcapping", None),
        logits_divisor=_logits_divisor(config),
    )


def _logits_divisor(config: Any) -> float:
    """What a model divides its logits by; some name a divisor (Granite), some a factor (Cohere, Falcon H1)."""
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return float(getattr(config, "logits_scaling", None) or 1 / factor)


_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections of a module that read the same input."""


def families(backbone: Backbone) -> list[tuple[str, ...]]:
    """Names of the projections, those that read the same input together."""
    found: dict[Any, list[str]] = {}
    for name, projection in backbone.projections.items():
        parent, _, own = name.rpartition(".")
        place = next((place for place, names in enumerate(_SIBLINGS) if own in names), own)
        # Of another width than its siblings is what reads something else, as k and v of another model's states.
        found.setdefault((parent, place, num_features(projection)[0]), []).append(name)
    return [tuple(names) for names in found.values()]


@torch.no_grad()
def lay_together(model: nn.Module) -> None:
    """Lay the weights of q, k and v of each attention one behind another in memory; their values stay, bit for bit.

    Products of one input and several weights that lie so can be one product, which a GPU computes sooner. For a model
    that is the library's own as yet: what held a weight's storage goes on holding the old one, and safetensors'
    `save_model` refuses parts of one storage, which `save_pretrained` takes apart.
    """
    for module in model.modules():
        projections = [getattr(module, name, None) for name in _SIBLINGS[0]]
        if all(type(projection) is nn.Linear for projection in projections):
            weights: list[Tensor] = [projection.weight for projection in projections]  # type: ignore[union-attr]
            if len({(weight.shape[1], weight.dtype, weight.device) for weight in weights}) > 1:
                continue
            pieces = torch.split(torch.cat(weights), [len(weight) for weight in weights])
            for weight, piece in zip(weights, pieces, strict=True):
                weight.data = piece


def lying_together(weights: Sequence[Tensor]) -> Tensor | None:
    """Weights [O, I] that lie one behind another, as one; None if they do not, or are a single one."""
    first, ends = weights[0], [weight.data_ptr() + weight.nbytes for weight in weights]
    if len(weights) < 2 or ends[:-1] != [weight.data_ptr() for weight in weights[1:]]:
        return None
    kind = first.dtype, first.shape[1]
    if any(not weight.is_contiguous() or (weight.dtype, weight.shape[1]) != kind for weight in weights):
        return None
    if len({weight.untyped_storage().data_ptr() for weight in weights}) > 1:  # neighbors by chance
        return None
    outputs = sum(len(weight) for weight in weights)
    return first.detach().as_strided((outputs, first.shape[1]), first.stride())


def num_features(projection: Any) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear projection; `Conv1D` keeps them the other way round."""
    if isinstance(projection, Conv1D):
        return int(projection.nx), int(projection.nf)
    return int(projection.in_features), int(projection.out_features)


def fingerprint(model: Any) -> str:
    """Identify the base model: SHA-256 of its geometry and of samples of its embedding and its vectors.

    The samples are rounded to bfloat16, so that the same weights in float32 and bfloat16 agree, and leave out the
    large matrices, so that a quantized copy agrees as well.
    """
    config = model.config.get_text_config()
    facts = [
        getattr(config, key, None)
        for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    ]
    digest = hashlib.sha256(repr(facts).encode())
    table = model.get_input_embeddings().weight
    rows = torch.linspace(0, table.shape[0] - 1, 64, device=table.device).long()
    samples = [table[rows, :16]]
    samples += [weight for name, weight in model.named_parameters() if weight.dim() == 1 and "lora_" not in name]
    for sample in samples:
        digest.update(sample.detach().to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def sink_token(model: Any, tokenizer: Any) -> int:
    """Return the id of the token that starts plain text, which serves as attention sink.

    It is the document separator `<|endoftext|>` where the tokenizer has one, because there `bos_token` may start a
    chat turn (SmolLM2), then `bos_token`, then `eos_token`.

    Raises:
        ModelError: If the tokenizer has none of them.
    """
    vocabulary = tokenizer.get_vocab()
    candidates = [vocabulary.get("<|endoftext|>"), tokenizer.bos_token_id, tokenizer.eos_token_id]
    candidates.append(model.config.get_text_config().eos_token_id)
    for candidate in candidates:
        if isinstance(candidate, int):
            return candidate
    raise ModelError("the tokenizer has no <|endoftext|>, bos_token or eos_token to begin a text with; set bos_token")


def eos_tokens(model: Any, tokenizer: Any = None) -> set[int]:
    """Return the ids that end a generated text: the model's, the tokenizer's and the document separator."""
    found: set[int] = set()
    for place in (tokenizer, model.config.get_text_config(), getattr(model, "generation_config", None)):
        ids = getattr(place, "eos_token_id", None)
        if ids is not None:
            found.update(ids if isinstance(ids, Sequence) else [ids])
    separator = None if tokenizer is None else tokenizer.get_vocab().get("<|endoftext|>")
    return found | ({separator} if separator is not None else set())


def vocabulary(tokenizer: Any, model: Any) -> list[str]:
    """Return each token as text; the model's vocabulary may be larger."""
    known = range(min(model.get_input_embeddings().num_embeddings, len(tokenizer)))
    texts: list[str] = tokenizer.batch_decode([[token_id] for token_id in known])
    return texts


def sentence_breaks(texts: Sequence[str], size: int) -> Tensor:
    """Say of each token whether a sentence may begin after it: it ends one, or a line.

    Args:
        texts: From `vocabulary`.
        size: V.

    Returns:
        [V], bool.
    """
    breaks_V = torch.zeros(size, dtype=torch.bool)
    for token_id, text in enumerate(texts):
        breaks_V[token_id] = "\n" in text or text.rstrip("\"'”’)] ").endswith((".", "!", "?", "。", "！", "？"))
    return breaks_V


# --- Running it -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode with frozen weights; afterwards every flag is as it was, exceptions included."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def checkpointed(backbone: Backbone, *, active: bool = True) -> Iterator[None]:
    """Let a pass inside the `with` block keep no more of a block than its input (arXiv 1604.06174).

    The backward pass, which may come later, runs the block again; what is attached to its projections must be attached
    then as well.

    Args:
        backbone: The model; nothing of this is left on it.
        active: If not, nothing is done.
    """
    from torch.utils.checkpoint import checkpoint

    blocks: list[Any] = list(backbone.blocks) if active else []
    try:
        for block in blocks:
            # No dropout is at work, and a graph being recorded cannot look at the state of the random numbers.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states at some positions."""

    layers: tuple[Tensor, ...]
    """The chosen ones, each [B, T, D]; see `forward_states`."""
    final_BTD: Tensor
    """After the final norm: what the output head reads."""

    def rejoined(self, num_streams: int) -> "States":
        """Put the pieces of each stream's text, which were rows of their own, one after another again."""

        def join(states: Tensor) -> Tensor:
            return states.reshape(num_streams, -1, states.shape[-1])

        return States(layers=tuple(join(layer) for layer in self.layers), final_BTD=join(self.final_BTD))


def on_its_device(backbone: Backbone) -> contextlib.AbstractContextManager[Any]:
    """Let the model's GPU be the current one inside the `with` block, as kernels and recordings need it."""
    return torch.cuda.device(backbone.device) if backbone.device.type == "cuda" else contextlib.nullcontext()


def hooks(module: nn.Module) -> list[Any]:
    """All but those that transformers leaves behind to collect hidden states, which sleep until it asks for some."""
    found = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in found if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"]


def altered_by_others(*modules: nn.Module) -> bool:
    """Whether somebody else than this library has hooks on some of these modules, or forwards of their own."""
    functions = [
        function
        for module in modules
        for function in (*hooks(module), *([vars(module)["forward"]] if "forward" in vars(module) else []))
    ]
    return any(not str(getattr(function, "__module__", "")).startswith("absorber.") for function in functions)


def forward_states(
    backbone: Backbone,
    input_ids_BT: Tensor,
    *,
    first: int = 0,
    layers: Sequence[int] = (),
    position_ids_BT: Tensor | None = None,
) -> States:
    """Run the decoder and keep the hidden states from position `first` on.

    Args:
        backbone: The model.
        input_ids_BT: Token ids [B, T].
        first: First position to keep; earlier ones are run but not kept.
        layers: Hidden states to keep, in this order: -1 the embedding, 0 .. L-1 the outputs of the blocks, L the
            final norm (which `States.final_BTD` always holds).
        position_ids_BT: Position ids, if not 0, 1, 2, ...

    Raises:
        ConfigError: If position ids are given to a model that takes none.
    """
    if position_ids_BT is not None and "position_ids" not in signature(backbone.decoder.forward).parameters:
        raise ConfigError(
            f"{type(backbone.model).__name__} takes no position ids, so positions cannot be 'teacher'; use 'own'"
        )
    num_layers = len(backbone.blocks)
    kept: dict[int, Tensor] = {}
    handles = []

    def keeper(index: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            kept[index] = (output[0] if isinstance(output, tuple) else output)[:, first:]

        return keep

    def keep_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        kept[-1] = (args[0] if args else kwargs["hidden_states"])[:, first:]

    try:
        for index in layers:
            if index == -1:
                handles.append(backbone.blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True))
            elif index < num_layers:
                handles.append(backbone.blocks[index].register_forward_hook(keeper(index)))
        extra = {}
        if position_ids_BT is not None:
            # Without a mask transformers takes a jump of the positions for the beginning of another text.
            extra = {"position_ids": position_ids_BT, "attention_mask": torch.ones_like(input_ids_BT)}
        output = backbone.decoder(input_ids=input_ids_BT, use_cache=False, **extra)
    finally:
        for handle in handles:
            handle.remove()
    final_BTD = output.last_hidden_state[:, first:]
    return States(
        layers=tuple(final_BTD if index == num_layers else kept[index] for index in layers), final_BTD=final_BTD
    )


def read_on(backbone: Backbone, input_ids_BT: Tensor, cache: Any) -> tuple[Tensor, bool]:
    """Run the decoder over tokens that follow those in a cache, which takes them in.

    Returns:
        Final hidden states [B, T, D], and whether the model keeps such a cache at all.
    """
    # What is recurrent (Mamba) takes in several tokens rightly only at the beginning.
    begun = any(any(getattr(layer, "has_previous_state", {}).values()) for layer in cache.layers)
    if begun and input_ids_BT.shape[1] > 1:
        parts = [read_on(backbone, token_B1, cache)[0] for token_B1 in torch.split(input_ids_BT, 1, dim=1)]
        return torch.cat(parts, dim=1), True
    name = cache_argument(backbone)
    output = backbone.decoder(input_ids=input_ids_BT, use_cache=True, **{name: cache})
    return output.last_hidden_state, getattr(output, name, None) is not None


def cache_argument(backbone: Backbone) -> str:
    """What transformers called past_key_values is cache from 5.24 on."""
    return "cache" if "cache" in signature(backbone.decoder.forward).parameters else "past_key_values"


def with_sink(sink_id: int | None, *parts: Tensor) -> Tensor:
    """Join token ids [B, ...] along time, after one sink token if there is one."""
    if sink_id is not None:
        parts = (parts[0].new_full((parts[0].shape[0], 1), sink_id), *parts)
    return torch.cat(parts, dim=1)


def check_positions(backbone: Backbone, num_tokens: int) -> None:
    """Refuse an input that is longer than the model's positions.

    Raises:
        ConfigError: If it is.
    """
    if backbone.max_positions is not None and num_tokens > backbone.max_positions:
        raise ConfigError(
            f"a window of {num_tokens} tokens (context_tokens + sync_tokens + sink) is larger than the "
            f"{backbone.max_positions} positions of the model; make context_tokens or sync_tokens smaller"
        )


def base_name(model: Any) -> str:
    """Return the name under which `load` finds this model again."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
