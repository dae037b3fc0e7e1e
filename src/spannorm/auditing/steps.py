"""The steps that a sublayer runs.

A sublayer is one module in most families. In others it is a sequence, such as BART's `fc1`, an activation and `fc2`,
with dropouts between them that are functions. Or it is a module that also adds the skip; it then gets zeros as skip.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Source(NamedTuple):
    """Where a value comes from."""

    kind: str
    """`x` (what the step works on), `zeros` (like the stream, in place of a skip that a module adds itself),
    `argument` of the layer, `value`, or `output` of a module."""
    what: Any = None
    item: int = 0


class Step(NamedTuple):
    """One step of a sublayer: a module of the layer, or a dropout."""

    path: str
    """From the layer; empty for a dropout that is a function."""
    arguments: tuple[tuple[str, Source], ...] = ()
    """By name, `*0`, `*1`, … for those in order."""
    rest: bool = False
    """Whether it gets all other keyword arguments of the layer."""
    dropout: float = 0.0

    def __call__(
        self, layer: Any, x: Tensor, stream: Tensor, given: Mapping[str, Any], named: Collection[str], seen: Any
    ) -> Tensor:
        """Run it.

        Args:
            layer: whose module it is.
            x: (batch, seq, …).
            stream: what the sublayer reads.
            given: the layer's arguments by name.
            named: those that the layer's signature names.
            seen: a dictionary that keeps what modules return, by path.
        """
        if not self.path:
            return F.dropout(x, self.dropout, layer.training)
        values = {"x": x}
        args, kwargs = [], {k: v for k, v in given.items() if k not in named} if self.rest else {}
        for name, (kind, what, item) in self.arguments:
            if kind == "x":
                value: Any = values["x"]
            elif kind == "zeros":
                value = torch.zeros_like(stream)
            else:
                value = given.get(what) if kind == "argument" else what if kind == "value" else seen[what][item]
            if name.startswith("*"):
                args.append(value)
            else:
                kwargs[name] = value
        seen[self.path] = out = layer.get_submodule(self.path)(*args, **kwargs)
        return out[0] if isinstance(out, (tuple, list)) else out


@dataclass(frozen=True)
class LayerCalls:
    """How one kind of layer runs its two sublayers."""

    steps: Mapping[str, tuple[Step, ...]]
    """`attn` and `ffn` → steps in order."""
    returns: tuple[Source, ...] | None
    """What a layer returns after the stream; None if it returns only the stream."""
    unread: tuple[str, ...]
    """Arguments of the layer that were None, and that no step gets."""
    classes: tuple[tuple[str, str], ...]
    """Path of a module → the name of its class. These identify a layer of this kind."""
