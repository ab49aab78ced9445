"""Ways to read a stream that is longer than the window; the table that names them, and those that others add.

A package adds a method by an entry point of the group `absorber.methods`: its name is that on the command line, its
value a `Method`, or a class or function that makes one when called without arguments:

    [project.entry-points."absorber.methods"]
    mine = "my_package.methods:Mine"
"""

from importlib.metadata import EntryPoint, entry_points

from absorber.bench.methods.bm25 import BM25
from absorber.bench.methods.compressed import Compressed
from absorber.bench.methods.full import Full
from absorber.bench.methods.lora import LoRA, lora_methods
from absorber.bench.methods.reader import Method, Questions, Reader, Setting
from absorber.bench.methods.sink import Sink
from absorber.bench.methods.truncation import Truncation
from absorber.bench.methods.ttt import TTT
from absorber.errors import BenchmarkError

ENTRY_POINTS = "absorber.methods"
"""Group of the entry points that are methods."""

METHODS: dict[str, Method] = {
    "full": Full(),
    "truncation": Truncation(),
    "sink": Sink(),
    "bm25": BM25(),
    "ttt": TTT(),
    **lora_methods(),
}
"""Our own by the name on the command line. Where no method is named, these are run: others have to be asked for."""

OUTSIDE: dict[str, Compressed] = {
    "snapkv": Compressed(press="snapkv"),
    "kvzip": Compressed(press="kvzip"),
}
"""Those that need an environment of their own, and are run when asked for."""

__all__ = [
    "BM25",
    "ENTRY_POINTS",
    "METHODS",
    "OUTSIDE",
    "TTT",
    "Compressed",
    "LoRA",
    "Method",
    "Questions",
    "Reader",
    "Setting",
    "method",
    "others",
]


def method(name: str) -> Method:
    """Return the method of this name, ours or of another package, which is imported now.

    Raises:
        BenchmarkError: If there is none, or that of another package is broken.
    """
    known: dict[str, Method] = {**METHODS, **OUTSIDE}
    if name in known:
        return known[name]
    points = others()
    if name not in points:
        raise BenchmarkError(f"there is no method {name!r}; there are {', '.join([*known, *points])}")
    return _loaded(points[name])


def others() -> dict[str, EntryPoint]:
    """The methods of other packages by name, not imported; a name of ours stays ours.

    Raises:
        BenchmarkError: If two packages have one of the same name.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if found.setdefault(point.name, point).value != point.value:
            raise BenchmarkError(
                f"two packages have a method {point.name!r}: {found[point.name].value} and {point.value}; uninstall one"
            )
    return {name: point for name, point in found.items() if name not in METHODS and name not in OUTSIDE}


def _loaded(point: EntryPoint) -> Method:
    package = f" of {point.dist.name}" if point.dist else ""
    where = f"the method {point.name!r} ({point.value}{package})"
    try:
        value = point.load()
        made = value if isinstance(value, Method) else value()
    except Exception as error:  # whatever a stranger's code raises
        raise BenchmarkError(
            f"{where} cannot be loaded: {type(error).__name__}: {error}. Update or uninstall the package"
        ) from error
    if not isinstance(made, Method):
        raise BenchmarkError(
            f"{where} is {type(made).__name__}, not an absorber.bench.methods.Method; its package has to be mended"
        )
    return made
