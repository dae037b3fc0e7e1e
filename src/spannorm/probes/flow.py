"""Following each branch's output through the operations of a placement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor
from torch.overrides import TorchFunctionMode

Sum = Callable[[Tensor, float, Tensor, float], None]
"""Called for a sum with the skip and its factor, and the branch's output and its factor."""

_ADD = {"add": 1.0, "add_": 1.0, "__iadd__": 1.0, "__radd__": 1.0, "sub": -1.0, "sub_": -1.0, "__isub__": -1.0}


class Flow(TorchFunctionMode):
    """While it is active, a tensor that is computed from one branch's output alone counts as that branch's.

    For example, it may be gated, scaled or reshaped. A plain `x + f` is a sum: `on_sum` is called. If two branches are
    added to each other, the sum counts as one branch, `attn+ffn`.
    """

    def __init__(self, on_sum: Sum) -> None:
        super().__init__()
        self._on_sum = on_sum
        self._branches: dict[int, tuple[Tensor, str]] = {}  # by id; keeping the tensor keeps its id unique
        self._active = False
        self.called: set[str] = set()
        self.added: set[str] = set()

    def __enter__(self) -> Self:
        self._active = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._active = False
        super().__exit__(*error)

    def mark(self, x: Tensor, branch: str) -> None:
        """Note that `x` is a branch's; an empty name has no effect."""
        if branch:
            self._branches[id(x)] = x, branch

    def branch(self, x: Any) -> str:
        """The branch whose output `x` is; empty for none."""
        return self._branches[id(x)][1] if id(x) in self._branches else ""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Not active within the context: for the inside of a sublayer, a norm or a measurement."""
        if not self._active:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for a in (*args, *(kwargs or {}).values()) for x in (a if isinstance(a, (list, tuple)) else [a])]
        branches = {b for x in given if isinstance(x, Tensor) for b in self.branch(x).split("+") if b}
        if not branches:
            return result
        pair = [x for x in args[:2] if isinstance(x, Tensor) and x.ndim > 2]
        if func.__name__ in _ADD and len(pair) == 2 and not all(map(self.branch, pair)):
            (a, b), factor = pair, _ADD[func.__name__] * (kwargs or {}).get("alpha", 1.0)
            if self.branch(b):  # PyTorch has switched the mode off for this call
                self._on_sum(a, 1.0, b, factor)
            else:
                self._on_sum(b, factor, a, 1.0)
            return result
        for out in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(out, Tensor):
                self.mark(out, "+".join(sorted(branches)))
        return result
