"""Absorb a text file into a memory, and continue a sentence with it: absorb_a_book.py FILE FOLDER [MODEL]"""

import sys

import absorber

path, folder, source = sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None
model, tokenizer = absorber.load(source)

# Short windows and few steps suit a CPU; leave both out for the default.
config = absorber.AbsorbConfig(max_steps=8, learning_rate=1e-4)
stream = absorber.StreamConfig(context_tokens=128, sync_tokens=256)


def report(now: absorber.Progress) -> None:
    if now.finished:
        print(f"round {now.num_rounds}: loss {now.finished.loss_before:.3f} -> {now.finished.loss_after:.3f}")


with open(path, encoding="utf-8") as text:
    memory = absorber.absorb(model, tokenizer, text, config, stream, progress=report)
memory.save(folder)

prompt = tokenizer("On the next morning", return_tensors="pt").to(model.device)
with memory.applied_to(model):
    written = model.generate(**prompt, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))
