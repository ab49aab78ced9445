"""The tree of errors: each defined in one file, drawn in its docstring with its status, and public."""

import importlib
import pkgutil
import re

import absorber
from absorber import AbsorberError, errors


def subclasses(kind):
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_error_is_defined_here_drawn_and_public():
    for module in pkgutil.walk_packages(absorber.__path__, "absorber."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    drawn = {
        name: (len(indent) // 4, int(status))
        for indent, name, status in re.findall(r"^([ │├└─]*)(\w+Error) +(\d{3})", errors.__doc__, re.MULTILINE)
    }
    found = {AbsorberError, *subclasses(AbsorberError)}
    assert {kind.__name__ for kind in found} == set(drawn)
    for kind in found:
        assert kind.__module__ == "absorber.errors"
        depth = len(kind.__mro__) - len(AbsorberError.__mro__)
        assert drawn[kind.__name__] == (depth + 1, kind.status)
        assert getattr(absorber, kind.__name__) is kind
        assert kind.__name__ in absorber.__all__
        assert kind.__doc__


def test_the_order_of_the_tree_is_the_drawing():
    """A child stands below its parent: walking the drawing gives the classes' own parents."""
    above = []
    for indent, name in re.findall(r"^([ │├└─]*)(\w+Error) +\d{3}", errors.__doc__, re.MULTILINE):
        above[len(indent) // 4 - 1 :] = [name]
        parent = above[-2] if len(above) > 1 else "Exception"
        assert getattr(errors, name).__base__.__name__ == parent
