"""The last window only: what leaves it is gone (Standard-Truncation of arXiv 2604.20915)."""

from absorber.bench.methods.reader import Method, Reader, Setting


class Truncation(Method):
    """No memory at all."""

    def begin(self, setting: Setting) -> Reader:
        """Make a reader for B fresh streams."""
        return Reader(setting)
