"""Full attention over everything, up to the model's own limit."""

from torch import Tensor

from absorber.bench.methods.reader import Method, Questions, Reader, Setting

# What is scored after the text needs positions too.
_RESERVED_TOKENS = 1024


class _FullReader(Reader):
    @property
    def kept_tokens(self) -> int:
        limit = self.setting.backbone.max_positions
        return 10**9 if limit is None else limit - _RESERVED_TOKENS

    def contextless(self, questions: Questions | None = None) -> Tensor:
        return self.recent_BT


class Full(Method):
    """The reference: nothing is dropped before the model's last position, the oldest after it."""

    def begin(self, setting: Setting) -> Reader:
        """Make a reader for B fresh streams."""
        return _FullReader(setting)
