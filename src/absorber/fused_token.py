"""A step of one token through a whole model by few kernels: six a block, ten with a memory beside the base.

Run module by module, a token of a Llama takes fifty kernels a block, and the device idles between any two. Here the
modules are only asked for their weights. What the kernels do is said by their plain twins at the end of this file, with
which a step also runs without CUDA, for tests.

Shapes: V vocabulary; see `kernels_token` for others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from absorber import kernels, kernels_token
from absorber.adapter import Adapter
from absorber.backbone import Backbone, hooks
from absorber.kernels_token import Norm, Products
from absorber.merging import in_decoder, side_by_side
from absorber.one_token import attend_one

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUT = ("self_attn.o_proj",)
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = ("mlp.down_proj",)
_GROUPS = (_QKV, _OUT, _GATED, _DOWN)


def fusable(backbone: Backbone) -> bool:
    """Whether a model that `decoding.usable` accepts is built just as this file expects, and Triton can run."""
    config = backbone.model.config
    source = f"transformers.models.{config.model_type}.modeling_{config.model_type}"
    features = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights: list[Tensor] = [module.weight for module in (*backbone.projections.values(), backbone.head)]  # type: ignore[misc]
    return (
        kernels.usable(*weights)
        and all(type(module).__module__ == source for module in (backbone.decoder, *backbone.blocks))
        and all(_known(backbone, index) for index in range(len(backbone.blocks)))
        and config.hidden_act == "silu"
        and features & (features - 1) == 0
        and len({weight.dtype for weight in weights}) == 1
        and all(weight.is_contiguous() for weight in weights)
        and type(backbone.head) is nn.Linear
        and backbone.head.bias is None
        and (backbone.logits_softcap, backbone.logits_divisor) == (None, 1)
    )


def _known(backbone: Backbone, index: int) -> bool:
    """Whether a block has the seven projections of its file, and of each group all have biases or none."""
    at = f"{backbone.blocks_name}.{index}."
    found = {name for name in backbone.projections if name.startswith(at)}
    return found == {at + name for group in _GROUPS for name in group} and all(
        len({backbone.projections[at + name].bias is None for name in group}) == 1 for group in _GROUPS
    )


def hooked(backbone: Backbone) -> bool:
    """Whether somebody has hooks on the model's modules, or forwards of their own, which only modules run."""
    return any("forward" in vars(module) or hooks(module) for module in (*backbone.decoder.modules(), backbone.head))


@dataclass(frozen=True, slots=True)
class _Block:
    """The weights of a block, in the order in which they are read."""

    first: Norm
    qkv: Products
    of_heads: tuple[Norm, Norm] | None
    scale: float
    out: Products
    second: Norm
    gated: Products
    down: Products


class FusedStep:
    """One token in, logits out; keys and values are written into the cache on the way."""

    def __init__(self, backbone: Backbone, merged: dict[str, Tensor], beside: Adapter | None) -> None:
        """Look up all weights, whose places must not change from now on.

        Args:
            backbone: A model that is `fusable`.
            merged: Weights that hold model and memory, from `merging.merge`; empty without.
            beside: A memory in the model's type; the A of projections that share an input are moved into one tensor.
        """
        self._merged, self._beside = merged, beside
        self._backbone, self._model = backbone, _untyped(backbone.decoder)
        self._blocks = [self._block(index) for index in range(len(backbone.blocks))]
        self._norm = _norm(self._model.norm)
        self._head = Products((_untyped(backbone.head).weight,))
        quick = kernels.usable(*self._head.weights)
        self._project = kernels_token.project if quick else plain_project
        self._project_gated = kernels_token.project_gated if quick else plain_project_gated
        self._attend: Callable[..., Tensor] = kernels_token.attend_new if quick else plain_attend_new

    def __call__(self, token_11: Tensor, place_1: Tensor, layers: Sequence[Any]) -> Tensor:
        """Read a token.

        Args:
            token_11: Its id.
            place_1: Where it stands.
            layers: The cache, whose `keys` and `values` are [1, K, C, E].

        Returns:
            Logits of the next, [V], float32.
        """
        hidden_11I = self._model.embed_tokens(token_11)
        cos_11E, sin_11E = self._model.rotary_emb(hidden_11I, place_1[None])
        hidden_I = hidden_11I[0, 0]
        for block, layer in zip(self._blocks, layers, strict=True):
            qkv = self._project(hidden_I, block.qkv, norm=block.first)
            attended = self._attend(
                qkv, cos_11E[0, 0], sin_11E[0, 0], layer.keys[0], layer.values[0], place_1,
                scale=block.scale, norms=block.of_heads,
            )  # fmt: skip
            hidden_I = self._project(attended, block.out, residual_O=hidden_I)
            gated = self._project_gated(hidden_I, block.gated, block.second)
            hidden_I = self._project(gated, block.down, residual_O=hidden_I)
        return self._project(hidden_I, self._head, norm=self._norm, dtype=torch.float32)

    def _block(self, index: int) -> _Block:
        block = _untyped(self._backbone.blocks[index])
        attention = block.self_attn
        has_norms = hasattr(attention, "q_norm")
        qkv, out, gated, down = (self._products(index, group) for group in _GROUPS)
        return _Block(
            first=_norm(block.input_layernorm),
            qkv=qkv,
            of_heads=(_norm(attention.q_norm), _norm(attention.k_norm)) if has_norms else None,
            scale=attention.scaling,
            out=out,
            second=_norm(block.post_attention_layernorm),
            gated=gated,
            down=down,
        )

    def _products(self, index: int, group: tuple[str, ...]) -> Products:
        names = [f"{self._backbone.blocks_name}.{index}.{name}" for name in group]
        modules = [_untyped(self._backbone.projections[name]) for name in names]
        keys = [f"{in_decoder(self._backbone, name)}.weight" for name in names]
        weights = tuple(
            self._merged.get(key, module.weight.detach()) for key, module in zip(keys, modules, strict=True)
        )
        biases = tuple(module.bias.detach() for module in modules if module.bias is not None)
        if self._beside is None or not any(name in self._beside.down for name in names):
            return Products(weights, biases)
        down_RI, ups = side_by_side(self._beside, names, weights)
        return Products(weights, biases, down_RI, ups, self._beside.scale)


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


def _untyped(module: Any) -> Any:
    return module


# --- The plain twins of the kernels ----------------------------------------------------------------------------


def plain_project(
    x_I: Tensor,
    products: Products,
    *,
    norm: Norm | None = None,
    residual_O: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute residual + W norm(x) + b + s B A norm(x); the twin of `kernels_token.project`."""
    result_O = torch.cat(_applied(x_I, products, norm))
    if residual_O is not None:
        result_O = result_O + residual_O
    return result_O.to(dtype or x_I.dtype)


def plain_project_gated(x_I: Tensor, products: Products, norm: Norm) -> Tensor:
    """Compute silu(gate) * up; the twin of `kernels_token.project_gated`."""
    gate_O, up_O = _applied(x_I, products, norm)
    return (nn.functional.silu(gate_O) * up_O).to(x_I.dtype)


def plain_attend_new(
    qkv: Tensor,
    cos_E: Tensor,
    sin_E: Tensor,
    keys_KCE: Tensor,
    values_KCE: Tensor,
    place_1: Tensor,
    *,
    scale: float,
    norms: tuple[Norm, Norm] | None = None,
) -> Tensor:
    """Turn queries and key, write key and value, attend; the twin of `kernels_token.attend_new`."""
    key_heads, _, features = keys_KCE.shape
    heads = qkv.float().view(-1, features)
    query_HE, key_KE, value_KE = torch.split(heads, [len(heads) - 2 * key_heads, key_heads, key_heads])
    if norms is not None:
        query_HE, key_KE = _normed(query_HE, norms[0]), _normed(key_KE, norms[1])
    query_HE, key_KE = (_turned(states, cos_E, sin_E) for states in (query_HE, key_KE))
    keys_KCE.index_copy_(1, place_1, key_KE[:, None].to(keys_KCE.dtype))
    values_KCE.index_copy_(1, place_1, value_KE[:, None].to(values_KCE.dtype))
    out_HE = attend_one(query_HE[None], keys_KCE[None].float(), values_KCE[None].float(), place_1, scale)
    return out_HE.flatten().to(qkv.dtype)


def _turned(states_HE: Tensor, cos_E: Tensor, sin_E: Tensor) -> Tensor:
    first, second = states_HE.chunk(2, dim=1)
    return states_HE * cos_E + torch.cat([-second, first], dim=1) * sin_E


def _applied(x_I: Tensor, products: Products, norm: Norm | None) -> list[Tensor]:
    """What each projection makes of the input, in float32."""
    x_I = x_I.float() if norm is None else _normed(x_I.float(), norm)
    results = [weight.float() @ x_I for weight in products.weights]
    for result_O, bias_O in zip(results, products.biases, strict=False):
        result_O += bias_O
    if products.down_RI is not None:
        lows = (products.down_RI.float() @ x_I).chunk(len(results))
        for result_O, up_OR, low_R in zip(results, products.ups, lows, strict=True):
            result_O += products.scale * (up_OR.float() @ low_R)
    return results


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:], norm.gain.float(), norm.eps)
