"""Decoding at the speed at which weights are read: a cache of fixed size, and a step that is recorded once.

What differs from token to token (the token, its place, how much of the cache is filled) is kept in tensors on the
device, and the memory's weights in tensors of the decoder's own. So one CUDA graph of a step serves every place in the
window and every state of the memory, and nothing has to be read back between two tokens.

`generation.Decoder` is the slow readable twin, and does what cannot be done here: models with states, sliding windows,
quantized weights. Without CUDA the same step runs without being recorded.

Shapes: B rows, T tokens, D hidden, V vocabulary, C places in the cache.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from absorber.adapter import Adapter
from absorber.backbone import Backbone, cache_argument, on_its_device
from absorber.errors import ConfigError, ContextError
from absorber.fused_text import fused
from absorber.fused_token import FusedStep, fusable, hooked
from absorber.generation import Decoder, applied, check_room
from absorber.graphs import is_plain, without_masks
from absorber.merging import converted, merge
from absorber.one_token import one_token
from absorber.static_cache import StaticLayer

Way = Literal["beside", "merged"]
"""How the memory is applied: its products beside those of the base model, or in weights of the decoder's own."""

_BLOCK = 64
_AHEAD = 16


def usable(backbone: Backbone) -> bool:
    """Whether this model can be decoded with `StaticDecoder`."""
    places = {parameter.device for parameter in backbone.model.parameters()}
    return (
        is_plain(backbone)
        and len(places) == 1
        and backbone.device.type in ("cpu", "cuda")
        and all(type(projection) is nn.Linear for projection in backbone.projections.values())
    )


def new_decoder(
    backbone: Backbone, *, read_tokens: int, capacity: int, adapter: Adapter | None = None, way: Way = "beside"
) -> "Decoder | StaticDecoder":
    """Make the quickest decoder that the model allows, for one stream.

    Args:
        backbone: The model.
        read_tokens: Largest piece given to the model at once.
        capacity: How many tokens it will have to hold; more cost a new cache.
        adapter: The memory that reads and speaks.
        way: How it is applied, where the model allows to choose.
    """
    if usable(backbone):
        return StaticDecoder(backbone, read_tokens=read_tokens, capacity=capacity, adapter=adapter, way=way)
    return Decoder(backbone, read_tokens=read_tokens, adapter=adapter)


class StaticDecoder:
    """B texts of one length that are read together and gone on with, in a cache whose size and place do not change."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        read_tokens: int,
        capacity: int,
        adapter: Adapter | None = None,
        way: Way = "beside",
        num_rows: int = 1,
    ) -> None:
        """Begin with nothing read, and nothing allocated.

        Args:
            backbone: A model that is `usable`.
            read_tokens: Largest piece given to the model at once, so that activations stay small.
            capacity: Places in the cache; it grows where they do not suffice.
            adapter: The memory that reads and speaks; its weights of the moment when the first token is read.
            way: How it is applied. merged: no products beside those of the model, at the price of a copy of its
                projections, rounded to their type; for one stream.
            num_rows: B.

        Raises:
            ConfigError: If several streams are to be merged.
        """
        self._backbone, self._read_tokens, self._num_rows = backbone, read_tokens, num_rows
        self._adapter, self._way = adapter, way
        if adapter is not None and way == "merged" and adapter.num_streams > 1:
            raise ConfigError(f"one stream can be merged into weights, not {adapter.num_streams}; decode them beside")
        self._capacity = -(-capacity // _BLOCK) * _BLOCK
        self.ahead = _AHEAD if backbone.device.type == "cuda" else 1
        self.release()

    def release(self) -> None:
        """Forget everything read, and give back the cache, the graph and the memory's copy."""
        self._cache, self._layers = None, list[StaticLayer]()
        self._beside: Adapter | None = None
        self._merged: dict[str, Tensor] = {}
        self._fused: FusedStep | None = None
        self._places: tuple[int, ...] = ()
        self._begin_graphs()
        self.reset()

    def _begin_graphs(self) -> None:
        """Have no step recorded, and no reading; they have the addresses of the cache in them."""
        self._graph: Any = None
        self._warm = False
        self._window: _Reading | None = None

    def reset(self) -> None:
        """Forget everything read; the cache stays where it is."""
        self.num_tokens = 0
        self._spoken = False

    # --- Reading and writing

    def read(self, token_ids: Sequence[int]) -> None:
        """Read tokens of the one row after those read before; see `read_rows`."""
        if token_ids:
            self.read_rows(torch.tensor([list(token_ids)]))

    @torch.no_grad()
    def read_rows(self, token_ids_BT: Tensor) -> None:
        """Read tokens after those read before, in pieces; a single one by the recorded step.

        Raises:
            ContextError: If that is more than the model's positions.

        After any error nothing is held as read.
        """
        num_tokens = token_ids_BT.shape[1]
        with self._all_or_nothing():
            self._prepare(num_tokens)
            token_ids_BT = token_ids_BT.to(self._backbone.device)
            if num_tokens == 1 and self.num_tokens:
                self._next_B1.copy_(token_ids_BT)
                self._go_on()
                return
            for start in range(0, num_tokens, self._read_tokens):
                self._read_piece(token_ids_BT[:, start : start + self._read_tokens])

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """On the model's device; after any error nothing is held as read."""
        try:
            with on_its_device(self._backbone):
                yield
        except BaseException:
            self.reset()
            raise

    def read_all(self, token_ids: Sequence[int]) -> None:
        """Have read these tokens and nothing else; those at the beginning that were read before are not read again."""
        held = self._history_BC[0, : self.num_tokens].tolist() if self.num_tokens else []
        same = next((at for at, pair in enumerate(zip(held, token_ids)) if pair[0] != pair[1]), len(held))  # noqa: B905
        same = min(same, len(token_ids))
        if same < self.num_tokens or not self._spoken:
            same = max(0, min(same, len(token_ids) - 1))  # the logits are of what was forgotten
            self._forget_after(same)
        self.read(token_ids[same:])

    def write(self, num_tokens: int) -> list[int]:
        """Write and read the likeliest next token of the one row, so many times."""
        written: list[int] = self.write_rows(num_tokens)[0].tolist()
        return written

    @torch.no_grad()
    def write_rows(self, num_tokens: int) -> Tensor:
        """Write and read each row's likeliest next token, so many times, without waiting for the device.

        Returns:
            [B, T], on the device.

        Raises:
            ContextError: If nothing was read, or that is more than the model's positions.
        """
        self._check_spoken()
        start = self.num_tokens
        with self._all_or_nothing():
            self._prepare(num_tokens)
            for _ in range(num_tokens):
                self._go_on()
        return self._history_BC[:, start : start + num_tokens].clone()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is read and written inside the `with` block is forgotten after it."""
        num_tokens, spoken = self.num_tokens, self._spoken
        held = (self._logits_BV.clone(), self._next_B1.clone()) if spoken else None
        try:
            yield
        finally:
            if self.num_tokens >= num_tokens:  # an error has not taken away what was there before
                self._forget_after(num_tokens)
                if held is not None:
                    self._logits_BV.copy_(held[0])
                    self._next_B1.copy_(held[1])
                    self._spoken = True

    @property
    def logits_V(self) -> Tensor:
        """Logits of the first row's token after the last one read; overwritten by the next.

        Raises:
            ContextError: If nothing was read.
        """
        return self.logits_BV[0]

    @property
    def logits_BV(self) -> Tensor:
        """The same of all rows."""
        self._check_spoken()
        return self._logits_BV

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values held."""
        return self.allocated_bytes * self.num_tokens // self._capacity

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the cache has, filled or not."""
        return sum(layer.num_bytes for layer in self._layers)

    def _check_spoken(self) -> None:
        if not self._spoken:
            raise ContextError("there is nothing to continue; append text or give a prompt first")

    # --- The step

    def _go_on(self) -> None:
        """Read the token in `_next_B1`: by replaying the step, or by running it where it is not recorded."""
        if self._graph is None and self._warm and self._backbone.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with self._way_to_logits() as logits_of_next, torch.cuda.graph(graph):
                self._step(logits_of_next)
            self._graph = graph
        if self._graph is None:
            with self._way_to_logits() as logits_of_next:
                self._step(logits_of_next)
            self._warm = True  # kernels were chosen and compiled, which a recording cannot do
        else:
            self._graph.replay()
        self.num_tokens += 1
        self._spoken = True

    @contextlib.contextmanager
    def _way_to_logits(self) -> Iterator[Callable[[], Tensor]]:
        """What reads the token in `_next_B1` inside the `with` block: few kernels, or the model with quicker parts."""
        if self._fused is not None and not hooked(self._backbone):
            fused = self._fused
            yield lambda: fused(self._next_B1, self._place_1, self._layers)[None]
            return
        with applied(self._backbone, self._beside), one_token(self._backbone, self._place_1):
            yield lambda: self._backbone.logits(self._run(self._next_B1, self._place_1[None])[:, -1])

    def _step(self, logits_of_next: Callable[[], Tensor]) -> None:
        """Read one token and find the likeliest next one: nothing here depends on a value that the host knows."""
        self._history_BC.index_copy_(1, self._place_1, self._next_B1)
        self._logits_BV.copy_(logits_of_next())
        self._next_B1.copy_(self._logits_BV.argmax(dim=-1, keepdim=True))
        self._place_1.add_(1)

    def _read_piece(self, piece_BT: Tensor) -> None:
        start, end = self.num_tokens, self.num_tokens + piece_BT.shape[1]
        if start == 0 and self._backbone.device.type == "cuda" and not hooked(self._backbone):
            self._read_window(piece_BT)
        else:
            self._fill(piece_BT, start)
        self.num_tokens, self._spoken = end, True

    def _read_window(self, window_BT: Tensor) -> None:
        """Read the first piece of a text. That of the same length as before is recorded: the window, after a round."""
        if self._window is None or self._window.ids_BT.shape != window_BT.shape:
            self._window = _Reading(window_BT.clone())
            self._fill(window_BT, 0)
            return
        self._window.ids_BT.copy_(window_BT)
        if self._window.graph is None:
            graph = torch.cuda.CUDAGraph()
            with without_masks(self._backbone), torch.cuda.graph(graph):
                self._fill(self._window.ids_BT, 0)
            self._window.graph = graph
        self._window.graph.replay()

    def _fill(self, piece_BT: Tensor, start: int) -> None:
        """Put a piece into the cache, and find the token after it: nothing here depends on what the device knows."""
        end = start + piece_BT.shape[1]
        for layer in self._layers:
            layer.start = start
        try:
            with applied(self._backbone, self._beside), fused(self._backbone):
                place_T = torch.arange(start, end, device=piece_BT.device)
                final_BTD = self._run(piece_BT, place_T[None])
        finally:
            for layer in self._layers:
                layer.start = None
        self._history_BC[:, start:end] = piece_BT
        self._logits_BV.copy_(self._backbone.logits(final_BTD[:, -1]))
        self._next_B1.copy_(self._logits_BV.argmax(dim=-1, keepdim=True))
        self._place_1.fill_(end)

    def _run(self, input_ids_BT: Tensor, position_ids_1T: Tensor) -> Tensor:
        """Run the model over tokens that follow those in the cache."""
        inputs = {"input_ids": input_ids_BT, "position_ids": position_ids_1T, "use_cache": True}
        inputs[cache_argument(self._backbone)] = self._cache
        decoder = self._backbone.decoder
        if self._merged:
            output = torch.func.functional_call(decoder, self._merged, args=(), kwargs=inputs)
        else:
            output = decoder(**inputs)
        final_BTD: Tensor = output.last_hidden_state
        return final_BTD

    # --- Its tensors

    def _prepare(self, num_tokens: int) -> None:
        """Have room for more tokens, and the memory as it is now if these are the first."""
        needed = self.num_tokens + num_tokens
        check_room(self._backbone, needed)
        if self._cache is None or needed > self._capacity:
            self._allocate(max(self._capacity, -(-needed // _BLOCK) * _BLOCK))
        if self.num_tokens == 0:
            places = tuple(weight.data_ptr() for weight in self._backbone.model.parameters())
            if places != self._places:  # the model was moved, or has other weights
                self._places, self._fused = places, None
                self._begin_graphs()
            self._place_1.zero_()
            self._take_memory()

    def _allocate(self, capacity: int) -> None:
        """Make the tensors that a step reads and writes; what the cache holds moves into the larger one."""
        place, rows = self._backbone.device, self._num_rows
        if self._cache is None:
            self._place_1 = torch.zeros(1, dtype=torch.long, device=place)
            self._next_B1 = torch.zeros(rows, 1, dtype=torch.long, device=place)
            vocabulary = int(self._backbone.head.weight.shape[0])  # type: ignore[index]
            self._logits_BV = torch.zeros(rows, vocabulary, device=place)
            self._layers = [StaticLayer(self._place_1, capacity) for _ in self._backbone.blocks]
            self._cache = Cache(layers=self._layers)
            self._history_BC = torch.zeros(rows, capacity, dtype=torch.long, device=place)
        else:
            longer_BC = self._history_BC.new_zeros(rows, capacity)
            longer_BC[:, : self._history_BC.shape[1]] = self._history_BC
            self._history_BC = longer_BC
            for layer in self._layers:
                layer.grow(capacity)
            self._begin_graphs()
        self._capacity = capacity

    def _take_memory(self) -> None:
        """Copy the memory's weights into tensors that stay where they are, so that a graph goes on being right."""
        adapter = self._adapter
        if adapter is not None and self._way == "merged":
            merge(self._backbone, adapter, self._merged)
        elif adapter is not None and self._beside is None:
            self._beside = converted(adapter, self._backbone.model.dtype)
        elif adapter is not None and self._beside is not None:
            for mine, given in zip(self._beside.parameters(), adapter.parameters(), strict=True):
                mine.copy_(given)
        if self._fused is None and self._num_rows == 1 and fusable(self._backbone):
            self._fused = FusedStep(self._backbone, self._merged, self._beside)

    def _forget_after(self, num_tokens: int) -> None:
        self.num_tokens, self._spoken = num_tokens, False
        if self._cache is not None:
            self._place_1.fill_(num_tokens)


@dataclass(slots=True)
class _Reading:
    """How a text of one length is read from its beginning."""

    ids_BT: Tensor
    """What a recorded reading reads."""
    graph: Any = None
    """None until it is read for the second time: kernels are chosen and compiled by a usual run."""
