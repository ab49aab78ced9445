"""Keys and values in tensors whose size and place do not change, for `decoding`.

Shapes: B rows, T tokens, H heads, E features of a head, C places.
"""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin


class StaticLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one block in tensors of fixed size, written at a place that the device knows."""

    is_sliding = False

    def __init__(self, place_1: Tensor, capacity: int) -> None:
        """Hold nothing, and allocate nothing yet.

        Args:
            place_1: Where a step writes; on the device.
            capacity: C.
        """
        super().__init__()
        self._place_1, self._capacity = place_1, capacity
        self.start: int | None = None
        """Where a piece of several tokens begins; None in a step."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate; zeros, because a place that holds no number would spoil a sum even with weight zero."""
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self._capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write them; return what a piece attends to, or in a step everything, filled or not."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.start is None:
            self.keys.index_copy_(2, self._place_1, key_states)
            self.values.index_copy_(2, self._place_1, value_states)
            return self.keys, self.values
        end = self.start + key_states.shape[2]
        self.keys[:, :, self.start : end] = key_states
        self.values[:, :, self.start : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def grow(self, capacity: int) -> None:
        """Move into larger tensors."""
        self._capacity = capacity
        if self.is_initialized:
            missing = (0, 0, 0, capacity - self.keys.shape[2])
            self.keys, self.values = nn.functional.pad(self.keys, missing), nn.functional.pad(self.values, missing)

    @property
    def num_bytes(self) -> int:
        """Of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size() if self.is_initialized else 0

    def get_seq_length(self) -> int:
        """What a piece finds in the cache; a step does not ask."""
        return self.start or 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a piece sees, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """C."""
        return self._capacity
