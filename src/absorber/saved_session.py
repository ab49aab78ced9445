"""A session on disk: a folder with its memory, its window and its random state, written whole or not at all."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from absorber.errors import MemoryFileError, SessionNotFoundError
from absorber.lessons import Anchors, Past
from absorber.memory import Memory
from absorber.notes import Notes
from absorber.store import read_json, recover, whole_folder, write_json
from absorber.stream import Stream

FORMAT = 4
STATE = "session.json"
_MEMORY = "memory"
_OPTIMIZER = "optimizer.safetensors"

Moments = dict[int, dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSession:
    """What a session consists of, beside the model."""

    memory: Memory
    """Its memory; `memory` in the folder, like that of `Memory.save`."""
    window_ids: list[int]
    """Z."""
    behind_ids: list[int]
    """What left the window last, as far as the teacher still reads it."""
    pending_ids: list[int]
    """Given, but not yet in the window."""
    sources: dict[str, int]
    """Tokens read of each named source."""
    replay_ids: list[list[list[int]]]
    """Earlier rounds, each as X and Y."""
    studied_codes: list[list[list[list[int]]]]
    """Notes of earlier rounds, each as passages and questions, as `study` codes them."""
    anchor_ids: list[list[int]] | None
    """Texts on which the model should stay as it is, if they are written already."""
    random_state: Tensor
    """State of the generator, uint8."""
    moments: Moments
    """State of the optimizer by number of the weight; empty if it is not carried over rounds."""

    @classmethod
    def of(cls, stream: Stream, memory: Memory, *, sources: dict[str, int], random_state: Tensor) -> Self:
        """Collect it from a stream, the only one of its batch, and what the session itself has."""
        optimizer = stream.optimizer
        return cls(
            memory=memory,
            window_ids=stream.window_BT[0].tolist(),
            behind_ids=stream.behind_BT[0].tolist(),
            pending_ids=stream.pending_BT[0].tolist(),
            replay_ids=[
                [past.context_BN[0].tolist(), past.subsequent_BM[0].tolist()] for past in stream.reservoir.items
            ],
            studied_codes=[[part[0].tolist() for part in notes] for notes in stream.studied.items],
            anchor_ids=None if stream.anchors is None else stream.anchors.texts_QA.tolist(),
            sources=sources,
            random_state=random_state,
            moments={} if optimizer is None else optimizer.state_dict()["state"],
        )

    def put_back(self, stream: Stream) -> None:
        """Bring a new stream to where the saved one was.

        Raises:
            ValueError, KeyError, TypeError, RuntimeError: If what was read does not fit together.
        """
        if len(self.window_ids) > self.memory.stream.window_tokens:
            raise ValueError(f"its window has {len(self.window_ids)} tokens")
        stream.window_BT = torch.tensor([self.window_ids], dtype=torch.long)
        stream.behind_BT = torch.tensor([self.behind_ids], dtype=torch.long)
        stream.pending_BT = torch.tensor([self.pending_ids], dtype=torch.long)
        stream.reservoir.items = [
            Past(torch.tensor([context], dtype=torch.long), torch.tensor([subsequent], dtype=torch.long))
            for context, subsequent in self.replay_ids
        ]
        stream.studied.items = [Notes.of(*parts, config=self.memory.config) for parts in self.studied_codes]
        stream.anchors = None if self.anchor_ids is None else Anchors(torch.tensor(self.anchor_ids))
        if stream.optimizer is not None and self.moments:
            _check_moments(self.moments, self.memory.adapter.parameters())
            stream.optimizer.load_state_dict({**stream.optimizer.state_dict(), "state": self.moments})


def write(folder: str | os.PathLike[str], saved: SavedSession) -> None:
    """Write a session, in place of an older one.

    Raises:
        MemoryFileError: If something that is not a session stands there, or it cannot be written.
    """
    from safetensors.torch import save_file

    with whole_folder(Path(folder), marker=STATE) as scratch:
        (scratch / _MEMORY).mkdir()
        saved.memory.write(scratch / _MEMORY)
        write_json(
            scratch / STATE,
            {
                "format": FORMAT,
                "window": saved.window_ids,
                "behind": saved.behind_ids,
                "pending": saved.pending_ids,
                "replay": saved.replay_ids,
                "notes": saved.studied_codes,
                "anchors": saved.anchor_ids,
                "sources": saved.sources,
                "random_state": saved.random_state.numpy().tobytes().hex(),
            },
        )
        if saved.moments:
            flat = {f"{index}.{name}": value for index, entry in saved.moments.items() for name, value in entry.items()}
            save_file(flat, scratch / _OPTIMIZER)


def read(folder: str | os.PathLike[str], model: Any) -> SavedSession:
    """Read what `write` wrote.

    Raises:
        SessionNotFoundError: If there is no session.
        MemoryFileError: If it is damaged.
        MemoryMismatchError: If it is of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = Path(folder)
    if not is_session(place):
        raise SessionNotFoundError(f"there is no session in {place}; give a folder that a session was saved to")
    content = read_json(place / STATE)
    memory = Memory.load(place / _MEMORY, model)
    try:
        if content["format"] > FORMAT:
            raise MemoryFileError(
                f"{place} has format {content['format']}; this version reads up to {FORMAT}. Install a newer absorber"
            )
        moments: Moments = {}
        if (place / _OPTIMIZER).is_file():
            for key, value in load_file(place / _OPTIMIZER).items():
                index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = value
        return SavedSession(
            memory=memory,
            window_ids=_token_ids(content["window"], model),
            behind_ids=_token_ids(content.get("behind", []), model),
            pending_ids=_token_ids(content["pending"], model),
            # Format 2 had passages behind each Y, which were learned in another way.
            replay_ids=[[_token_ids(part, model) for part in kept[:2]] for kept in content["replay"]],
            # Before format 4 there were passages alone, in another form; they are no longer studied again.
            studied_codes=[
                [[_codes(row, model) for row in part] for part in notes] for notes in content.get("notes", [])
            ],
            anchor_ids=None if content["anchors"] is None else [_token_ids(row, model) for row in content["anchors"]],
            sources={str(name): int(count) for name, count in content["sources"].items()},
            random_state=torch.tensor(list(bytes.fromhex(content["random_state"])), dtype=torch.uint8),
            moments=moments,
        )
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise MemoryFileError(f"{place} is damaged: {error}. Restore a copy, or start anew") from error


def _codes(values: list[int], model: Any) -> list[int]:
    _token_ids([-2 - code if code < -1 else max(code, 0) for code in values], model)
    return values


def _token_ids(values: list[Any], model: Any) -> list[int]:
    vocabulary = model.get_input_embeddings().num_embeddings
    if not all(isinstance(value, int) and 0 <= value < vocabulary for value in values):
        raise ValueError("a token id is outside the model's vocabulary")
    return values


def _check_moments(moments: Moments, weights: Sequence[Tensor]) -> None:
    for index, entry in moments.items():
        for name, value in entry.items():
            if value.dim() and value.shape != weights[index].shape:
                raise ValueError(f"the optimizer's {name} of weight {index} has shape {tuple(value.shape)}")


def is_session(folder: str | os.PathLike[str]) -> bool:
    """Whether a session was saved to this folder."""
    recover(Path(folder))
    return (Path(folder) / STATE).is_file()


def saved_base(folder: str | os.PathLike[str]) -> str:
    """Name of the base model that a saved session or memory needs, read without a model.

    Raises:
        MemoryFileError: If the folder is neither.
    """
    place = Path(folder)
    return str(Memory.provenance(place / _MEMORY if is_session(place) else place)["base"])
