"""The recurrent layers of the families, one token, row and head at a time; gradients of the inner loss by autograd."""

import torch
from torch.nn import functional


def convolved(weight, states):
    """Each feature's last four tokens, weighted."""
    rows = []
    for token in range(len(states)):
        total = torch.zeros(states.shape[1])
        for back in range(weight.shape[2]):
            if token >= back:
                total = total + weight[:, 0, -1 - back] * states[token - back]
        rows.append(total)
    return torch.stack(rows)


def inner(x, weights, biases, norm_weight, norm_bias):
    """f of TTT for one vector."""
    states = x @ weights[0] + biases[0]
    if len(weights) == 2:
        states = functional.gelu(states, approximate="tanh") @ weights[1] + biases[1]
    return x + functional.layer_norm(states, states.shape, norm_weight, norm_bias, eps=1e-6)


def ttt(mixer, states):
    """A TTT layer over one row [T, D], in the primal form."""
    width, size = mixer.width, mixer.batch_tokens
    queries = convolved(mixer.query_convolution.weight, states @ mixer.query.weight.T)
    keys = convolved(mixer.key_convolution.weight, states @ mixer.key.weight.T)
    values = states @ mixer.value.weight.T
    rates = torch.sigmoid(states @ mixer.rate.weight.T + mixer.rate.bias) / width
    heads = []
    for head in range(mixer.heads):
        own = slice(head * width, (head + 1) * width)
        norms = mixer.norm_weight_HK[head], mixer.norm_bias_HK[head]
        start = [*(weight[head] for weight in mixer.weights), *(bias[head, 0] for bias in mixer.biases)]
        depth, rows = len(mixer.weights), []
        for begin in range(0, len(states), size):
            total = [torch.zeros_like(part) for part in start]
            for place, token in enumerate(range(begin, min(len(states), begin + size))):
                found = inner(keys[token, own], start[:depth], start[depth:], *norms)
                loss = 0.5 * (found - values[token, own]).pow(2).sum()
                gradients = torch.autograd.grad(loss, start, create_graph=True)
                total = [s + rates[token, head] * g for s, g in zip(total, gradients, strict=True)]
                factor = (1 / (place + 1) + mixer.place_L[place]).clamp(min=0)
                now = [part - factor * s for part, s in zip(start, total, strict=True)]
                rows.append(inner(queries[token, own], now[:depth], now[depth:], *norms))
            start = now
        heads.append(torch.stack(rows))
    read = functional.layer_norm(torch.cat(heads, dim=1), (states.shape[1],), *mixer.final_norm.parameters(), eps=1e-6)
    gate = functional.gelu(states @ mixer.gate.weight.T, approximate="tanh")
    return (gate * read) @ mixer.output.weight.T


def delta(mixer, states):
    """A gated delta rule over one row [T, D]."""
    width = mixer.width
    queries, keys, values = (
        functional.silu(convolved(convolution.weight, states @ projection.weight.T))
        for projection, convolution in (
            (mixer.query, mixer.query_convolution),
            (mixer.key, mixer.key_convolution),
            (mixer.value, mixer.value_convolution),
        )
    )
    writes = torch.sigmoid(states @ mixer.write.weight.T)
    forgets = torch.exp(-mixer.scale_H.exp() * functional.softplus(states @ mixer.forget.weight.T + mixer.shift_H))
    heads = []
    for head in range(mixer.heads):
        own, state, rows = slice(head * width, (head + 1) * width), torch.zeros(width, width), []
        for token in range(len(states)):
            key = keys[token, own] / keys[token, own].norm()
            query = queries[token, own] / queries[token, own].norm() / width**0.5
            state = forgets[token, head] * state
            state = state + writes[token, head] * torch.outer(key, values[token, own] - state.T @ key)
            read = state.T @ query
            rows.append(read / (read.pow(2).mean() + 1e-6).sqrt() * mixer.norm_weight_K)
        heads.append(torch.stack(rows))
    return (torch.cat(heads, dim=1) * functional.silu(states @ mixer.gate.weight.T)) @ mixer.output.weight.T
