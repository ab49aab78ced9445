"""Algorithms 1 and 2 of arXiv 2604.20915 with the options of docs/method.md, for one stream of a Llama."""

import copy
import math

import torch

from reference import losses


def read(run, model, token_ids, *, first, position_ids=None):
    """Return (states h^0 .. h^L, final norm, logits) at the positions from `first` on, each [T, ...]."""
    blocks_output = []
    # Hugging Face gives the last state after the final norm only, so h^L is taken from the norm's input.
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: blocks_output.append(args[0]))
    inputs = {"input_ids": torch.tensor([token_ids]), "output_hidden_states": True, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = torch.tensor([position_ids])
        inputs["attention_mask"] = torch.ones(1, len(token_ids))  # without it a jump begins another text
    output = run(model, **inputs)
    hook.remove()
    states = [*output.hidden_states[:-1], blocks_output[-1]]
    final = output.hidden_states[-1]
    return [state[0, first:] for state in states], final[0, first:], output.logits[0, first:]


def chosen_states(states, final, config):
    """The hidden states that are compared: h^0 if wanted, then the blocks' outputs, then the final norm."""
    embedding, blocks = states[0], states[1:]
    numbered = [*blocks, final]
    if config.hidden_layers is not None:
        chosen = [numbered[layer] for layer in config.hidden_layers]
    elif config.include_final_norm:
        chosen = numbered
    else:
        chosen = blocks
    return [embedding, *chosen] if config.include_embedding else chosen


def plain(model, **inputs):
    return model(**inputs)


def teacher_pass(model, lora, context, subsequent, config, sink):
    """Line 1: (hidden states to compare, [(logits, share)])."""
    token_ids = [*sink, *context, *subsequent]
    first = len(sink) + len(context)
    with torch.no_grad():
        base_states, base_final, base_logits = read(plain, model, token_ids, first=first)
        own_states, own_final, own_logits = read(lora.run, model, token_ids, first=first)
    base = chosen_states(base_states, base_final, config)
    own = chosen_states(own_states, own_final, config)
    if config.teacher == "base":
        return base, [(base_logits, 1.0)]
    if config.teacher == "memory":
        return own, [(own_logits, 1.0)]
    share = config.teacher_mixture
    mixed = [(1 - share) * b + share * o for b, o in zip(base, own, strict=True)]
    return mixed, [(base_logits, 1 - share), (own_logits, share)]


def anchor_pass(model, texts, config, sink):
    """What the base says of texts that stand alone: as `teacher_pass`, one text after another."""
    hidden, logits = [], []
    for text in texts:
        with torch.no_grad():
            states, final, text_logits = read(plain, model, [*sink, *text], first=len(sink))
        hidden.append(chosen_states(states, final, config))
        logits.append(text_logits)
    return [torch.cat(parts) for parts in zip(*hidden, strict=True)], [(torch.cat(logits), 1.0)]


def student_pass(model, lora, num_context, subsequent, config, sink, pieces):
    """The student reads Y alone, or each piece of it alone: (hidden states to compare, logits)."""
    length, hidden, logits = len(subsequent) // pieces, [], []
    for start in range(0, len(subsequent), length):
        positions = None
        if config.positions == "teacher":
            first = len(sink) + num_context + start
            positions = [*range(len(sink)), *range(first, first + length)]
        piece = [*sink, *subsequent[start : start + length]]
        states, final, piece_logits = read(lora.run, model, piece, first=len(sink), position_ids=positions)
        hidden.append(chosen_states(states, final, config))
        logits.append(piece_logits)
    return [torch.cat(parts) for parts in zip(*hidden, strict=True)], torch.cat(logits)


def student_loss(
    model, lora, num_context, subsequent, target, before, config, sink, num_generated, *, pieces=1, is_anchor=False
):
    """The distance of the student, who reads Y in pieces, to the teacher; an anchor has no next-token term."""
    if is_anchor:
        config = config.replace(positions="own")
    student, logits = student_pass(model, lora, num_context, subsequent, config, sink, pieces)
    hidden, teachers = target
    loss = torch.zeros(())
    if config.hidden_weight:
        loss = loss + config.hidden_weight * losses.hidden_distance(
            student,
            hidden,
            norm=config.norm,
            normalized=config.normalization == "teacher",
        )
    if config.kl_weight:
        loss = loss + config.kl_weight * losses.kl(logits, teachers)
    if config.next_token_weight and not is_anchor:
        loss = loss + config.next_token_weight * losses.next_token(logits, subsequent, num_generated=num_generated)
    if config.update_penalty != "none":
        size = losses.update_size(lora.products(), before, norm=config.update_penalty)
        loss = loss + config.update_penalty_weight * size
    return loss


def study_loss(model, lora, rows, sink):
    """Mean next-token loss over what is learned of all rows, each read by itself. Codes: absorber.notes."""
    picked = []
    for row in rows:
        ids = [code if code >= 0 else -2 - code for code in row if code != -1]
        learned = [code >= 0 for code in row if code != -1]
        if not ids:
            continue
        _, _, logits = read(lora.run, model, [*sink, *ids], first=len(sink))
        for place in range(1, len(ids)):
            if learned[place]:
                picked.append(-logits[place - 1].log_softmax(dim=-1)[ids[place]])
    return torch.stack(picked).mean()


def learn(model, lora, studies, config, sink):
    """Study: B of the last ranks learns the rows of each step."""
    ups = [up for name, up in lora.up.items()]
    optimizer = torch.optim.AdamW(ups, lr=config.study_learning_rate, weight_decay=0.0)
    for step, rows in enumerate(studies):
        gradients = torch.autograd.grad(study_loss(model, lora, rows, sink), ups)
        for gradient in gradients:
            gradient[:, : config.rank] = 0
        for up, gradient in zip(ups, clipped(gradients, config), strict=True):
            up.grad = gradient
        optimizer.param_groups[0]["lr"] = learning_rate(config.study_learning_rate, step, len(studies), config)
        optimizer.step()


def clipped(gradients, config):
    """The same, shrunk to the largest norm allowed."""
    length = math.sqrt(sum(gradient.pow(2).sum().item() for gradient in gradients))
    if config.gradient_clip is None or length <= config.gradient_clip:
        return gradients
    return [gradient * (config.gradient_clip / length) for gradient in gradients]


def learning_rate(peak, step, steps, config):
    """Warm-up over `warmup_steps`, then constant, or linear down to zero after the last step."""
    warm = peak * (step + 1) / (config.warmup_steps + 1) if step < config.warmup_steps else peak
    if config.schedule == "constant":
        return warm
    left = (steps - step) / max(1, steps - config.warmup_steps)
    return min(warm, peak * left)


def new_optimizer(lora, config):
    return torch.optim.AdamW(
        lora.leaves(), lr=config.learning_rate, weight_decay=config.weight_decay, eps=config.adam_epsilon
    )


def num_pieces(length, wanted):
    """The largest number up to `wanted` of equal pieces of at least two tokens."""
    even = [count for count in range(1, wanted + 1) if length % count == 0 and length // count >= 2]
    return max(even, default=1)


def absorb_context(
    model,
    lora,
    context,
    subsequent,
    config,
    *,
    sink_id,
    num_generated=0,
    optimizer=None,
    replayed=(),
    anchor_texts=(),
    studies=None,
    plan=None,
    number=1,
):
    """Algorithm 1. Trains `lora` in place; returns (losses on its own text, whether the round was rolled back).

    `studies` has for every step of study, before the others, the rows that it is on.
    `plan` has for every step "own", "anchor", or the number of a pair (X, Y) in `replayed`; all own by default.
    `number` is that of the round, from 1.
    """
    plan = plan or ["own"] * config.max_steps
    whole, judged = subsequent, config.held_out_tokens
    if num_generated or len(subsequent) < judged + 2:
        judged = 0
    subsequent = subsequent[: len(subsequent) - judged]
    sink = [sink_id] if config.sink == "shared" else []
    optimizer = optimizer or new_optimizer(lora, config)
    saved_weights = [leaf.detach().clone() for leaf in lora.leaves()]
    saved_moments = copy.deepcopy(optimizer.state_dict())
    before = [product.detach() for product in lora.products()]
    own_target = teacher_pass(model, lora, context, subsequent, config, sink)
    replay_targets = [teacher_pass(model, lora, x, y, config, sink) for x, y in replayed]
    anchor_target = anchor_pass(model, anchor_texts, config, sink) if anchor_texts else None
    row = [token for text in anchor_texts for token in text]

    def loss_at(step, kind):
        wanted = config.segments[step % len(config.segments)]
        what, pieces, generated = (context, subsequent, own_target), None, 0
        if kind == "own":
            generated = num_generated
        elif kind == "anchor":
            what, pieces = ([], row, anchor_target), len(anchor_texts)
        else:
            what = (*replayed[kind], replay_targets[kind])
        x, y, target = what
        pieces = pieces or num_pieces(len(y), wanted)
        options = {"pieces": pieces, "is_anchor": kind == "anchor"}
        return student_loss(model, lora, len(x), y, target, before, config, sink, generated, **options)

    peak = config.learning_rate
    if config.settling_rounds is not None:
        peak /= (1 + (number - 1) / config.settling_rounds) ** 0.5
    trace = []
    if studies:
        trace.append(loss_at(0, "own").item())
        learn(model, lora, studies, config, sink)
    for step in range(config.max_steps):
        loss = loss_at(step, plan[step])
        if plan[step] == "own":
            trace.append(loss.item())
            if config.threshold is not None and loss.item() < config.threshold:
                break
        if not math.isfinite(loss.item()):
            break
        gradients = torch.autograd.grad(loss, lora.leaves(), materialize_grads=True)
        if studies:  # their part is not for the text
            for down, up in zip(gradients[::2], gradients[1::2], strict=True):
                down[config.rank :], up[:, config.rank :] = 0, 0
        for leaf, gradient in zip(lora.leaves(), clipped(gradients, config), strict=True):
            leaf.grad = gradient
        optimizer.param_groups[0]["lr"] = learning_rate(peak, step, config.max_steps, config)
        optimizer.step()
    else:
        with torch.no_grad():
            trace.append(loss_at(0, "own").item())
    refused = judged and not keep_what_helps(model, lora, saved_weights, whole, judged, sink)
    undone = refused or not math.isfinite(trace[-1]) or (config.rollback == "worse" and trace[-1] > trace[0])
    if undone:
        with torch.no_grad():
            for leaf, saved in zip(lora.leaves(), saved_weights, strict=True):
                leaf.copy_(saved)
        optimizer.load_state_dict(saved_moments)
    return trace, undone


def keep_what_helps(model, lora, saved, subsequent, judged, sink):
    """Try all, a half, a quarter and nothing of the change of every weight; keep the best, return its share."""
    changed = [leaf.detach().clone() for leaf in lora.leaves()]
    tried = []
    with torch.no_grad():
        for share in (1, 0.5, 0.25, 0):
            for leaf, old, new in zip(lora.leaves(), saved, changed, strict=True):
                leaf.copy_(old + share * (new - old))
            _, _, logits = read(lora.run, model, [*sink, *subsequent], first=0)
            places = range(len(sink) + len(subsequent) - judged, len(sink) + len(subsequent))
            ids = [*sink, *subsequent]
            tried.append((-sum(logits[at - 1].log_softmax(dim=-1)[ids[at]].item() for at in places), -share))
        share = -min(tried)[1]
        for leaf, old, new in zip(lora.leaves(), saved, changed, strict=True):
            leaf.copy_(old + share * (new - old))
    return share


def deduce(next_token, absorb, token_ids, *, context_tokens, sync_tokens, eos_ids, max_new_tokens):
    """Algorithm 2 over the input and then over generated text.

    Args:
        next_token: Takes the window, returns the token after it.
        absorb: Takes X and Y.
        token_ids: The input I.
        context_tokens: n.
        sync_tokens: m.
        eos_ids: Tokens that end the generated text.
        max_new_tokens: Tokens generated at most.

    Returns:
        What was generated, and the window Z at the end.
    """
    window, written = [], []
    remaining = list(token_ids)
    while True:
        while len(window) < context_tokens + sync_tokens:
            if remaining:
                window.append(remaining.pop(0))
                continue
            if len(written) == max_new_tokens or (written and written[-1] in eos_ids):
                return written, window
            written.append(next_token(window))
            window.append(written[-1])
        absorb(window[:context_tokens], window[context_tokens : context_tokens + sync_tokens])
        for _ in range(context_tokens):
            window.pop(0)
