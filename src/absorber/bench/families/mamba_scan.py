"""A quicker pass of transformers' Mamba-2 mixer (arXiv 2405.21060), for whole rows and without kernels of their own.

That of transformers 5.17 holds products of chunk x chunk x heads x state for every token, which do not fit a device in
training. This one has the same weights and gives the same values; it multiplies matrices, as the paper's SSD does.

Shapes: B rows, T tokens, D hidden, H heads, P width of a head, S width of the state, N chunks, L tokens of one.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from absorber.bench.families.convolution import causal_convolution
from absorber.errors import ModelError

_CHUNK = 64


def quicken(model: Any) -> Any:
    """Let every mixer of a Mamba-2 model of our own use this pass; its weights stay where they are.

    Raises:
        ModelError: If the mixers have groups of states.
    """
    if model.config.n_groups != 1:
        raise ModelError(f"the quick pass of Mamba-2 is for one group of states; got {model.config.n_groups}")
    for block in model.base_model.layers:
        block.mixer.forward = partial(mixer_pass, block.mixer)
    return model


def mixer_pass(mixer: Any, hidden_states: Tensor, **unused: Any) -> Tensor:
    """Read rows from their beginning, without a cache and without padding."""
    inner, states = mixer.intermediate_size, mixer.ssm_state_size
    widths = [inner, inner + 2 * states, mixer.num_heads]
    gate, mixed, steps_BTH = torch.split(mixer.in_proj(hidden_states), widths, dim=-1)
    weight_DW, bias = mixer.conv1d.weight[:, 0].to(mixed.dtype), mixer.conv1d.bias
    mixed = functional.silu(causal_convolution(mixed, weight_DW, None if bias is None else bias.to(mixed.dtype)))
    values, keys_BTS, queries_BTS = torch.split(mixed, [inner, states, states], dim=-1)
    with torch.autocast(hidden_states.device.type, enabled=False):
        steps_BTH = functional.softplus(steps_BTH.float() + mixer.dt_bias.float()).clamp(*mixer.time_step_limit)
        decay_BTH = -mixer.A_log.float().exp() * steps_BTH
        values_BTHP = values.float().view(*values.shape[:2], mixer.num_heads, -1)
        written = values_BTHP * steps_BTH[..., None]
        read_BTHP = scan(queries_BTS.float(), keys_BTS.float(), written, decay_BTH)
        read_BTHP = read_BTHP + mixer.D.float()[:, None] * values_BTHP
    return mixer.out_proj(mixer.norm(read_BTHP.flatten(2), gate).to(hidden_states.dtype))  # type: ignore[no-any-return]


def scan(queries_BTS: Tensor, keys_BTS: Tensor, values_BTHP: Tensor, decay_BTH: Tensor) -> Tensor:
    """S_t = e^decay_t S_{t-1} + k_t v_t^T, read with q_t; keys and queries are those of all heads.

    Returns:
        What is read, [B, T, H, P].
    """
    num_tokens = keys_BTS.shape[1]
    chunk = min(_CHUNK, num_tokens)

    def by_chunk(states: Tensor) -> Tensor:
        missing = (0, 0) * (states.dim() - 2) + (0, -num_tokens % chunk)
        padded = functional.pad(states, missing)
        return padded.view(states.shape[0], -1, chunk, *states.shape[2:])

    queries, keys = by_chunk(queries_BTS), by_chunk(keys_BTS)  # [B, N, L, S]
    values = by_chunk(values_BTHP).transpose(2, 3)  # [B, N, H, L, P]
    total = by_chunk(decay_BTH).transpose(2, 3).cumsum(dim=-1)  # [B, N, H, L]
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=keys.device).tril()
    ratio = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    within = (ratio * (queries @ keys.mT)[:, :, None]) @ values
    left = (total[..., -1:] - total).exp()[..., None]
    gained = (keys.mT[:, :, None] @ (left * values)).unbind(1)  # [B, H, S, P] each
    remains = total[..., -1].exp()[..., None, None].unbind(1)
    state, starts = torch.zeros_like(gained[0]), []
    for gain, remain in zip(gained, remains, strict=True):
        starts.append(state)
        state = torch.addcmul(gain, remain, state)
    before = (queries[:, :, None] @ torch.stack(starts, dim=1)) * total.exp()[..., None]
    return (within + before).transpose(2, 3).flatten(1, 2)[:, :num_tokens]
