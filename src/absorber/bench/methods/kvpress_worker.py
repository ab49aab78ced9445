"""The other side of `compressed`: a program that runs in an environment with kvpress and answers on standard output.

Nothing of Absorber is imported here, for it is not installed there. A request is one JSON object a line; so is a reply,
and where it says `shape`, float32 numbers follow as bytes.

    begin     folder, press, device, dtype      load a model
    compress  ids (rows), keep                  read each row, and keep so many entries of its cache
    extend    fork, ids (rows), in_place        read on after what is kept, or after an earlier reading
    drop      fork                              forget a reading

Shapes: B rows, T tokens, D hidden.
"""

import copy
import inspect
import json
import os
import sys
from dataclasses import dataclass
from typing import Any


@dataclass
class Row:
    """What is kept of one row."""

    cache: Any
    """Keys and values."""
    masks: list[Any]
    """Of each layer, the entries of single heads that are dropped; kvpress keeps them beside the cache."""
    length: int
    """Tokens read."""


class Desk:
    """A model and the readings that are under way."""

    def __init__(self) -> None:
        """Begin without a model."""
        self.model: Any = None
        self.press = ""
        self.readings: dict[int, list[Row]] = {}
        self.next_fork = 1

    def begin(self, folder: str, press: str, device: str, dtype: str) -> tuple[dict[str, Any], Any]:
        """Load a model."""
        import kvpress
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.press = press
        options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).to(device).eval()
        self.model.config.name_or_path = folder  # where kvzip looks for the tokenizer
        return {"kvpress": getattr(kvpress, "__version__", ""), "transformers": transformers.__version__}, None

    def compress(self, ids: list[list[int]], keep: int) -> tuple[dict[str, Any], Any]:
        """Read each row to its last token but one, drop entries, and read the last token after what is kept."""
        import torch

        self.readings = {0: [self._compressed(row, keep - 1) for row in ids]}
        states = [self._read_on(row, own[-1:]) for row, own in zip(self.readings[0], ids, strict=True)]
        kept = [self._entries(row) for row in self.readings[0]]
        return {"kept": kept}, torch.cat(states)[:, -1]

    def extend(self, fork: int, ids: list[list[int]], in_place: bool) -> tuple[dict[str, Any], Any]:
        """Read on."""
        import torch

        if in_place:
            rows, name = self.readings[fork], fork
        else:
            rows, name = copy.deepcopy(self.readings[fork]), self.next_fork
            self.next_fork += 1
            self.readings[name] = rows
        states = [self._read_on(row, own) for row, own in zip(rows, ids, strict=True)]
        return {"fork": name}, torch.cat(states)

    def drop(self, fork: int) -> tuple[dict[str, Any], Any]:
        """Forget a reading."""
        self.readings.pop(fork, None)
        return {}, None

    def _layers(self) -> list[Any]:
        return [layer.self_attn for layer in self.model.model.layers]

    def _compressed(self, ids: list[int], keep: int) -> Row:
        import torch
        from transformers import DynamicCache

        read = ids[:-1]
        cache, row = DynamicCache(config=self.model.config), torch.tensor([read], device=self.model.device)
        for layer in self._layers():
            layer.masked_key_indices = None
        if not read:
            return Row(cache, [None for _ in self._layers()], 0)
        with torch.no_grad():
            if len(read) <= keep:
                self._run(row, cache, 0)
            else:
                with make_press(self.press, len(read), keep)(self.model):
                    self.model.model(input_ids=row, **{self._name(): cache})
        return Row(cache, [getattr(layer, "masked_key_indices", None) for layer in self._layers()], len(read))

    def _read_on(self, row: Row, ids: list[int]) -> Any:
        import torch

        for layer, mask in zip(self._layers(), row.masks, strict=True):
            layer.masked_key_indices = mask
        tokens = torch.tensor([ids], device=self.model.device)
        before = copy.deepcopy(row.cache) if any(mask is not None for mask in row.masks) and len(ids) > 1 else None
        try:
            with torch.no_grad():
                states = self._run(tokens, row.cache, row.length)
        except ValueError as error:
            # kvpress looks for one key that no query of the call attends to; of fewer queries there is one.
            if before is None or "fake keys" not in str(error):
                raise
            row.cache, half = before, len(ids) // 2
            return torch.cat([self._read_on(row, ids[:half]), self._read_on(row, ids[half:])], dim=1)
        row.length += len(ids)
        return states.float()

    def _run(self, tokens: Any, cache: Any, first: int) -> Any:
        import torch

        places = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        limit = self.model.config.max_position_embeddings
        if first + tokens.shape[1] > limit:
            raise IndexError(f"the text is longer than the {limit} positions of the model")
        return self.model.model(input_ids=tokens, position_ids=places, **{self._name(): cache}).last_hidden_state

    def _name(self) -> str:
        names = inspect.signature(self.model.model.forward).parameters
        return "past_key_values" if "past_key_values" in names or "cache" not in names else "cache"

    def _entries(self, row: Row) -> float:
        """Entries of a head, in the mean over layers and heads."""
        counts = []
        for layer, mask in zip(row.cache.layers, row.masks, strict=True):
            _, heads, length, _ = layer.keys.shape
            counts.append(length - (0 if mask is None else len(mask[2]) / heads))
        return float(sum(counts) / len(counts))


def make_press(name: str, length: int, keep: int) -> Any:
    """A press that keeps so many entries of a text's."""
    import kvpress

    if name == "snapkv":
        # kvpress rounds down what is kept; the last tokens, by which the others are judged, are kept as well.
        return kvpress.SnapKVPress(compression_ratio=1 - (keep + 0.5) / length, window_size=min(64, max(1, keep // 2)))
    if name == "kvzip":
        return kvpress.KVzipPress(compression_ratio=1 - keep / length + 1e-9)
    raise ValueError(f"there is no press {name}")


def main() -> None:
    """Answer requests until there are no more."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no reply
    desk = Desk()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        states = None
        try:
            reply, states = getattr(desk, request.pop("op"))(**request)
        except Exception as error:  # whatever happens, the other side has to hear of it
            reply = {"error": f"{type(error).__name__}: {error}"}
        body = b"" if states is None else states.float().cpu().contiguous().numpy().tobytes()
        if states is not None:
            reply["shape"] = list(states.shape)
        channel.write(json.dumps(reply).encode() + b"\n" + body)
        channel.flush()


if __name__ == "__main__":
    main()
