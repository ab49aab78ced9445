"""Ways to read a stream that is longer than the window; the table that names them."""

from absorber.bench.methods.bm25 import BM25
from absorber.bench.methods.full import Full
from absorber.bench.methods.lora import LoRA, lora_methods
from absorber.bench.methods.reader import Method, Questions, Reader, Setting
from absorber.bench.methods.sink import Sink
from absorber.bench.methods.truncation import Truncation
from absorber.bench.methods.ttt import TTT
from absorber.errors import BenchmarkError

METHODS: dict[str, Method] = {
    "full": Full(),
    "truncation": Truncation(),
    "sink": Sink(),
    "bm25": BM25(),
    "ttt": TTT(),
    **lora_methods(),
}
"""By the name on the command line."""

__all__ = ["BM25", "METHODS", "TTT", "LoRA", "Method", "Questions", "Reader", "Setting", "method"]


def method(name: str) -> Method:
    """Return the method of this name.

    Raises:
        BenchmarkError: If there is none.
    """
    if name not in METHODS:
        raise BenchmarkError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
