"""Read standard input for as long as it lasts; every hundredth line, say what has just happened: [MODEL] [FOLDER]"""

import sys
from pathlib import Path

import absorber

model, tokenizer = absorber.load(sys.argv[1] if len(sys.argv) > 1 else None)
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "stream-session")

if folder.exists():
    session = absorber.Session.resume(folder, model, tokenizer)
else:
    stream = absorber.StreamConfig(context_tokens=128, sync_tokens=256)
    session = absorber.Session(model, tokenizer, stream=stream)

with session:
    for number, line in enumerate(sys.stdin, start=1):
        session.append(line)  # absorbs what leaves the window
        if number % 100 == 0:
            answer = session.ask("What has just happened?", max_new_tokens=40)
            print(f"{session.num_tokens} tokens, cache {session.cache_bytes} bytes: {answer}")
    session.save(folder)
