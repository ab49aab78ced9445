"""Made-up books for the families to be trained and scored on, small enough for seconds."""

import random

SMALL = {
    "size": "tiny",
    "tokens": 4 * 128 * 6,
    "row_tokens": 128,
    "step_tokens": 256,
    "vocabulary": 300,
    "pair_share": 0.5,
    "num_streams": 2,
    "scored_tokens": 128,
    "passage_tokens": 16,
    "distances": [10, 60],
    "num_pairs": 2,
    "context_tokens": 16,
    "sync_tokens": 32,
}
"""Settings of a run that takes seconds."""


def write_books(folder):
    """Write `novels_train` and `novels` into a folder."""
    for name, count, seed in (("novels_train", 3, 0), ("novels", 4, 100)):
        place = folder / name
        place.mkdir(parents=True)
        (place / "SOURCE.txt").write_text("made up")
        for number in range(count):
            (place / f"book_{number}.txt").write_text(_text(seed + number, 6000), encoding="utf-8")
    return folder


def _text(seed, length):
    dice = random.Random(seed)
    names = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 7))) for _ in range(150)]
    lines, total = [], 0
    while total < length:
        lines.append(" ".join(dice.choices(names, k=9)).capitalize() + ".\n")
        total += len(lines[-1])
    return "".join(lines)
