"""Full attention over everything, up to the model's own limit."""

from torch import Tensor

from absorber.bench.methods.reader import Method, Questions, Reader, Setting


class _FullReader(Reader):
    @property
    def kept_tokens(self) -> int:
        return self.setting.most_tokens

    def contextless(self, questions: Questions | None = None) -> Tensor:
        return self.recent_BT


class Full(Method):
    """The reference: nothing is dropped before the model's last position, the oldest after it."""

    def begin(self, setting: Setting) -> Reader:
        """Make a reader for B fresh streams."""
        return _FullReader(setting)
