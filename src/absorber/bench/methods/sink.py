"""The first tokens of the stream and the last window (StreamingLLM, arXiv 2309.17453).

Positions are those inside the cache, as there. The window is read anew instead of kept from token to token, so its
keys and values have not seen what left it.
"""

import torch
from torch import Tensor

from absorber.bench.methods.reader import Method, Questions, Reader, Setting

_FIRST_TOKENS = 4


class _SinkReader(Reader):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._first_BT = self.recent_BT

    def read(self, token_ids_BT: Tensor) -> None:
        if self._first_BT.shape[1] == 0:
            self._first_BT = token_ids_BT[:, :_FIRST_TOKENS]
        super().read(token_ids_BT)

    def windowed(self, questions: Questions | None = None) -> Tensor:
        return torch.cat([self._first_BT, self.recent_BT], dim=1)

    def contextless(self, questions: Questions | None = None) -> Tensor:
        return self._first_BT


class Sink(Method):
    """Four first tokens and the window."""

    def begin(self, setting: Setting) -> Reader:
        """Make a reader for B fresh streams."""
        return _SinkReader(setting)
