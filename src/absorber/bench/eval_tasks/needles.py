"""A needle in a haystack in the manner of RULER's niah_single_2 (arXiv 2404.06654), with books of one's own as the hay.

One sentence with a number stands somewhere in a text of so many tokens, and is asked for behind it.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from absorber.bench.data import Kind, Split, documents
from absorber.bench.eval_tasks.documents import folder_of
from absorber.errors import BenchmarkError
from absorber.memory import Memory
from absorber.models import load_tokenizer

_TEMPLATE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{hay}\nWhat is the special magic number for {key} mentioned in the provided text?"
)
_PREFIX = "The special magic number for {key} mentioned in the provided text is"
_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_ADJECTIVES = (
    "ancient brave calm distant eager faint gentle hollow idle jolly keen lively mellow noble odd plain quiet rapid"
)
_NOUNS = (
    "anchor basket candle dragon engine falcon garden hammer island jacket kettle ladder marble needle orchard pencil"
)
_NEW_TOKENS = 32
"""As in the YAML files: they are part of the length, as in RULER."""
_SKIPPED_SHARE = 0.05


def haystacks(
    *,
    length: int,
    data_dir: Any = None,
    haystack: Kind = "books",
    split: Split = "report",
    num_samples: int = 100,
    seed: int = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    memory: str | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """Hide a number in as many texts; the same for every model with the same tokenizer.

    Args:
        length: Tokens of a text with question and answer, at most.
        data_dir: Folder with the data.
        haystack: books (novels/*.txt), encyclopedia (wikitext2/*.txt), dialogues or code.
        split: Half of the documents that is read.
        num_samples: Texts.
        seed: Of texts, numbers and places.
        tokenizer: Whose tokens are counted; those of `pretrained`, or of the base of `memory`, if left out.
        pretrained: Model of --model_args.
        memory: Memory of --model_args.

    Returns:
        `test`, with columns input, gen_prefix, value and depth, the share of the text before the needle.

    Raises:
        AbsorberError: If there is no such data, or the length holds no text.
    """
    base = Memory.provenance(memory)["base"] if memory is not None and pretrained is None else pretrained
    counting = load_tokenizer(tokenizer or base)
    texts = [text[int(len(text) * _SKIPPED_SHARE) :] for _, text in documents(haystack, folder_of(data_dir), split)]
    dice = random.Random(f"{seed} {length}")
    return {"test": Dataset.from_list([_hidden(texts, counting, length, dice) for _ in range(num_samples)])}


def found(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Say whether the number is in what was written.

    Args:
        doc: A row of `haystacks`.
        results: What was written.

    Returns:
        acc, 1 or 0.
    """
    return {"acc": float(doc["value"] in results[0])}


def _hidden(texts: Sequence[str], tokenizer: Any, length: int, dice: random.Random) -> dict[str, Any]:
    key = f"{dice.choice(_ADJECTIVES.split())} {dice.choice(_NOUNS.split())}"
    value = str(dice.randint(10**6, 10**7 - 1))
    needle, prefix = _NEEDLE.format(key=key, value=value), _PREFIX.format(key=key)
    frame = _TEMPLATE.format(hay="", key=key)
    room = length - _NEW_TOKENS - sum(_counts(tokenizer, [frame, f" {needle}", f" {prefix}"]))
    hay: list[str] = []
    for sentence, count in _counted(texts, tokenizer, dice):
        if count > room:
            break
        hay.append(sentence)
        room -= count
    if not hay:
        raise BenchmarkError(
            f"{length} tokens of this tokenizer hold no text beside question and answer; take a longer task"
        )
    place = dice.randint(0, len(hay))
    before = sum(map(len, hay[:place])) / sum(map(len, hay))
    text = _TEMPLATE.format(hay=" ".join([*hay[:place], needle, *hay[place:]]), key=key)
    return {"input": text, "gen_prefix": prefix, "value": value, "depth": round(before, 3)}


def _counted(texts: Sequence[str], tokenizer: Any, dice: random.Random) -> Iterator[tuple[str, int]]:
    """Sentences from somewhere in a document on, through the documents behind it, each with its number of tokens."""
    first = dice.randrange(len(texts))
    start = dice.randrange(max(1, len(texts[first]) * 3 // 4))
    for turn in range(len(texts) + 1):
        text = texts[(first + turn) % len(texts)][start if turn == 0 else 0 :]
        for at in range(0, len(text), 20_000):  # a whole novel is much more than is needed
            sentences = re.split(r"(?<=[.!?])\s+", " ".join(text[at : at + 20_000].split()))
            own = [sentence for sentence in sentences if sentence]
            yield from zip(own, _counts(tokenizer, [f" {sentence}" for sentence in own]), strict=True)


def _counts(tokenizer: Any, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
