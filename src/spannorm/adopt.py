"""Give one object a subclass of its own class, in place."""

from __future__ import annotations

from functools import cache
from types import new_class
from typing import Any


def adopt(thing: Any, mixin: type) -> None:
    """Let `mixin` override the methods of one instance. Its new class has the old class's name, and is a subclass.

    A patched method would not be enough, because Transformers works with classes: checkpointing wraps `forward` when a
    class is made, recording uses `isinstance`, wrapping policies use the class name. All of these go on working.
    """
    own: Any = type(thing)
    thing.__class__ = adopted_class(own, mixin)


@cache
def adopted_class(base: type, mixin: type) -> Any:
    """The subclass of `base` with the methods of `mixin`; one for all instances."""
    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "adopted": base,
        "__reduce__": lambda self: (_blank, (base, mixin), self.__getstate__()),
    }
    return new_class(base.__name__, (mixin, base), exec_body=lambda namespace: namespace.update(body))


def _blank(base: type, mixin: type) -> Any:
    """Makes an instance for pickle and deepcopy, which cannot find a generated class by its name."""
    cls = adopted_class(base, mixin)
    return cls.__new__(cls)
