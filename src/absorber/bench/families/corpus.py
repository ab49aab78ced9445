"""What the families are trained and scored on: the same tokens in the same order, and none of the scored text.

The tokenizer is a byte-level BPE that is trained on the training text alone. That text is cut into rows, in an order
that depends on the seed and on nothing else. Into a share of the rows pairs are planted: a mark, a key and a value,
three tokens that are repeated later in the row, where the value can be known; so recall can be learned.

Shapes: R rows of a step, T tokens.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from absorber.bench.data import Split, documents, read_text
from absorber.errors import BenchmarkError
from absorber.store import read_json, whole_folder, write_json
from absorber.text import cut

TRAINING_FOLDER = "novels_train"
"""Folder of the training text, in the data's."""
SEPARATOR, MARK = 0, 1
"""Tokens that begin a text, and a pair; the first of every tokenizer that is made here."""

_SPECIAL = ("<|endoftext|>", "<|pair|>")
_SLOT = 4  # a pair has three tokens, and one of text behind it
_ASKED = 4  # how often each planted pair stands in a row
_PROBES, _PROBE_CHARACTERS = 8, 80


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training tokens and their tokenizer."""

    tokenizer: Any
    """Byte-level BPE."""
    token_ids: Any
    """All training tokens, one text after another; a memory-mapped array."""
    digest: str
    """Of the training text and the tokenizer's settings."""

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return len(self.tokenizer)

    def batch(self, step: int, *, rows: int, length: int, pair_share: float, seed: int) -> Tensor:
        """The rows [R, T] of a training step; every call with the same numbers gives the same.

        Args:
            step: Which, from 0 on.
            rows: R.
            length: T; each row begins with the separator.
            pair_share: Share of the rows that have pairs.
            seed: Of order and pairs.
        """
        per_row = length - 1
        num_rows = (len(self.token_ids) - per_row) // per_row  # an epoch begins at a place of its own
        places = range(step * rows, (step + 1) * rows)
        found = np.full((rows, length), SEPARATOR, dtype=np.int64)
        for row, place in enumerate(places):
            epoch, index = divmod(place, num_rows)
            dice = np.random.default_rng([seed, epoch])
            shift, order = int(dice.integers(per_row)), dice.permutation(num_rows)
            start = shift + per_row * int(order[index])
            found[row, 1:] = self.token_ids[start : start + per_row]
            # Spread evenly, so that every step has as many as its share says.
            if int((place + 1) * pair_share) > int(place * pair_share):
                _plant(found[row, 1:], self.vocabulary, np.random.default_rng([seed, 1, place]))
        return torch.from_numpy(found)


def _plant(row: Any, vocabulary: int, dice: np.random.Generator) -> None:
    """Overwrite a quarter of a row's slots by pairs, each `_ASKED` times."""
    slots = len(row) // _SLOT
    count = max(1, slots // 4 // _ASKED)
    chosen = np.sort(dice.choice(slots, count * _ASKED, replace=False)) * _SLOT
    which = dice.permutation(np.repeat(np.arange(count), _ASKED))
    keys, values = draw_pairs(count, vocabulary, dice)
    row[chosen], row[chosen + 1], row[chosen + 2] = MARK, keys[which], values[which]


def draw_pairs(count: int, vocabulary: int, dice: np.random.Generator) -> tuple[Any, Any]:
    """Different keys, and a value for each: tokens of the text, at random."""
    keys = dice.choice(np.arange(len(_SPECIAL), vocabulary), count, replace=False)
    return keys, dice.integers(len(_SPECIAL), vocabulary, count)


# --- Reading


def read_corpus(
    data_dir: Path, folder: Path, *, vocabulary: int, split: Split, say: Callable[[str], None] = lambda line: None
) -> Corpus:
    """Read the training text, make its tokenizer and tokens once, and keep them.

    Args:
        data_dir: Folder with `novels_train/*.txt`, and the scored `novels/*.txt`.
        folder: Where tokenizer and tokens are kept.
        vocabulary: Tokens at most.
        split: The half of the scored books that must not be among the training text.
        say: Told before what takes long.

    Raises:
        BenchmarkError: If there is no training text, or scored text is among it.
    """
    texts = {
        path.stem: read_text(path)
        for path in sorted((data_dir / TRAINING_FOLDER).glob("*.txt"))
        if path.stem != "SOURCE"
    }
    if not texts:
        raise BenchmarkError(f"{data_dir} has no {TRAINING_FOLDER}/*.txt to train on; give such a folder by --data-dir")
    digest = hashlib.sha256(json.dumps([vocabulary, *texts.items()]).encode()).hexdigest()[:16]
    check_apart(texts, documents("books", data_dir, split))
    place = folder / f"corpus-{digest}"
    if not (place / "corpus.json").is_file():
        say(f"making a tokenizer of {vocabulary} tokens from {len(texts)} texts, and their tokens, once")
        core = _trained(texts.values(), vocabulary)
        with whole_folder(place, marker="corpus.json") as scratch:
            np.save(scratch / "tokens.npy", _encoded(core, texts.values()))
            core.save(str(scratch / "tokenizer.json"))
            write_json(scratch / "corpus.json", {"texts": list(texts), "vocabulary": core.get_vocab_size()})
    read_json(place / "corpus.json")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(place / "tokenizer.json"),
        bos_token=_SPECIAL[0],
        eos_token=_SPECIAL[0],
        clean_up_tokenization_spaces=False,
    )
    return Corpus(tokenizer, np.load(place / "tokens.npy", mmap_mode="r"), digest)


def check_apart(texts: dict[str, str], scored: Sequence[tuple[str, str]]) -> None:
    """Look for passages of scored texts among those trained on.

    Raises:
        BenchmarkError: If two or more of a text's are there.
    """
    read = {name: _plain(text) for name, text in texts.items()}
    for name, text in scored:
        whole = _plain(text)
        dice = random.Random(name)
        starts = [dice.randrange(max(1, len(whole) - _PROBE_CHARACTERS)) for _ in range(_PROBES)]
        probes = [whole[start : start + _PROBE_CHARACTERS] for start in starts]
        for other, body in read.items():
            if sum(probe in body for probe in probes) >= 2:
                raise BenchmarkError(
                    f"the scored book {name} is among the training text, in {other}; take it out of {TRAINING_FOLDER}"
                )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _trained(texts: Sequence[str] | Any, vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((piece for text in texts for piece in cut([text])), trainer)
    return core


def _encoded(core: Any, texts: Any) -> Any:
    kind = np.uint16 if core.get_vocab_size() <= 2**16 else np.int32

    def parts() -> Iterator[Any]:
        for text in texts:
            yield np.array([SEPARATOR], dtype=kind)
            pieces = cut([text])
            while some := list(itertools.islice(pieces, 256)):
                for encoding in core.encode_batch(some, add_special_tokens=False):
                    yield np.array(encoding.ids, dtype=kind)

    return np.concatenate(list(parts()))
