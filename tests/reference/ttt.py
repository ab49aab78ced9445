"""Fast weights of one stream, token by token and head by head, on a Llama written out by hand."""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def heads_of(states, width):
    """A token's vector as one part per head."""
    return [states[start : start + width] for start in range(0, len(states), width)]


def learn(model, fast, context, *, sink_id, learning_rate, batch_tokens):
    """Steps over a context; returns W by layer and head, from the `fast` of the contexts before (None: zero)."""
    width = model.config.head_dim
    with torch.no_grad():
        hidden = model.model(torch.tensor([[sink_id, *context]]), output_hidden_states=True).hidden_states
    learned = []
    for number, block in enumerate(model.model.layers):
        normed = block.input_layernorm(hidden[number][0]).detach()
        keys = [heads_of(block.self_attn.k_proj.weight.detach() @ state, width) for state in normed[1:]]
        values = [heads_of(block.self_attn.v_proj.weight.detach() @ state, width) for state in normed[1:]]
        learned.append([])
        for head in range(model.config.num_key_value_heads):
            weight = torch.zeros(width, width) if fast is None else fast[number][head]
            for start in range(0, len(context), batch_tokens):
                tokens = range(start, min(len(context), start + batch_tokens))
                weight = weight.detach().requires_grad_()
                loss = torch.zeros(())
                for token in tokens:
                    key = keys[token][head] / keys[token][head].norm()
                    loss = loss + 0.5 * (weight @ key - values[token][head]).pow(2).sum()
                (gradient,) = torch.autograd.grad(loss / len(tokens), weight)
                weight = weight - learning_rate * gradient
            learned[-1].append(weight.detach())
    return learned


@torch.no_grad()
def speak(model, fast, token_ids, *, scale):
    """Logits [T, V] of a Llama whose attention also reads its fast weights."""
    width = model.config.head_dim
    shared = model.config.num_attention_heads // model.config.num_key_value_heads
    states = model.model.embed_tokens(torch.tensor(token_ids))
    cos, sin = model.model.rotary_emb(states[None], torch.arange(len(token_ids))[None])
    for number, block in enumerate(model.model.layers):
        normed, attention = block.input_layernorm(states), block.self_attn
        queries, keys, values = (
            (normed @ projection.weight.T).view(len(token_ids), -1, width)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        turned, turned_keys = apply_rotary_pos_emb(queries[None], keys[None], cos, sin, unsqueeze_dim=2)
        rows = []
        for token in range(len(token_ids)):
            parts = []
            for head in range(model.config.num_attention_heads):
                group = head // shared
                scores = turned_keys[0, : token + 1, group] @ turned[0, token, head] / width**0.5
                found = scores.softmax(dim=0) @ values[: token + 1, group]
                query = queries[token, head] / queries[token, head].norm()
                parts.append(found + scale * fast[number][group] @ query)
            rows.append(torch.cat(parts))
        states = states + torch.stack(rows) @ attention.o_proj.weight.T
        states = states + block.mlp(block.post_attention_layernorm(states))
    return model.lm_head(model.model.norm(states))
