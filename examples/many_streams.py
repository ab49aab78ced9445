"""Absorb several texts at once: one batch, and for every row a LoRA of its own: many_streams.py MODEL FILE FILE ..."""

import sys
from pathlib import Path

import torch

import absorber
from absorber.adapter import Adapter
from absorber.backbone import inspect, sink_token
from absorber.stream import Stream

model, tokenizer = absorber.load(sys.argv[1])
texts = [Path(name).read_text(encoding="utf-8") for name in sys.argv[2:]]
rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
length = min(len(row) for row in rows)  # the streams of a batch advance together

config = absorber.AbsorbConfig(max_steps=4, rank=16)
window = absorber.StreamConfig(context_tokens=64, sync_tokens=128)
backbone = inspect(model)
adapter = Adapter.fresh(backbone, config, num_streams=len(rows))


def report(rounds: list[absorber.Round]) -> None:
    print(f"round {rounds[0].number}:", *(f"{line.loss_before:.3f} -> {line.loss_after:.3f}" for line in rounds))


stream = Stream(backbone, adapter, config, window, sink_id=sink_token(model, tokenizer), on_round=report)
stream.append(torch.tensor([row[:length] for row in rows]))

first = adapter.stream(0)  # a stream's own weights, which `attached` gives to the model
with first.attached(backbone), torch.no_grad():
    print("logits with the first memory:", tuple(model(stream.window_BT[:1].to(model.device)).logits.shape))
