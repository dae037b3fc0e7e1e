"""Give one object a subclass of its own class, in place."""

from __future__ import annotations

from functools import cache
from types import new_class
from typing import Any


def adopt(thing: Any, mixin: type) -> None:
    """Let `mixin` override the methods of one instance; its class keeps its name and stays a subclass of what it was.

    Not a patched method: Transformers hooks classes (checkpointing wraps `forward` when a class is made, recording asks
    `isinstance`, wrapping policies go by class name), and all of that goes on working.
    """
    own: Any = type(thing)
    thing.__class__ = adopted_class(own, mixin)


@cache
def adopted_class(base: type, mixin: type) -> Any:
    """The subclass of `base` that `mixin` overrides; one for all instances."""
    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "adopted": base,
        "__reduce__": lambda self: (_blank, (base, mixin), self.__getstate__()),
    }
    return new_class(base.__name__, (mixin, base), exec_body=lambda namespace: namespace.update(body))


def _blank(base: type, mixin: type) -> Any:
    """What pickle and deepcopy start from: a generated class is not to be found by its name."""
    cls = adopted_class(base, mixin)
    return cls.__new__(cls)
