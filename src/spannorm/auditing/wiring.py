"""The wiring of a block: its equation, its sublayers, and the equation's difference from the model's result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from spannorm.auditing.behaviour import Norms
from spannorm.auditing.stacks import Block
from spannorm.auditing.sublayers import Sublayer
from spannorm.auditing.trace import Node
from spannorm.auditing.writing import Writer


@dataclass(frozen=True)
class BlockWiring:
    """How one block is wired."""

    path: str
    position: int
    equation: tuple[str, ...]
    """Lines of text. The last ones are the block's output."""
    sublayers: tuple[Sublayer, ...]
    learned: tuple[str, ...]
    """Factors in the equation that the model holds, with their values; and how many constants of 1 there are."""
    residual: float | None
    """Relative difference between the equation's sum and the model's result; rounding alone is below 1e-4."""
    norms: tuple[str, ...] = field(default=())
    """Modules of the norms in the equation."""

    @property
    def text(self) -> str:
        return "; ".join(self.equation)


@torch.no_grad()
def read_block(
    block: Block, norms: Norms, types: dict[str, str], batch_first: Any = None
) -> tuple[BlockWiring, Writer]:
    """The wiring of one block.

    Args:
        block: from `find_stacks`.
        norms: one for the whole trace, so that each norm is tested once.
        types: module path → the name of its class.
        batch_first: (batch, tokens) of the input, which tells a stream (tokens, batch, width) from the usual.
    """
    writer = Writer(block, norms, types, batch_first)
    lines = writer.lines()
    ones = len(writer.reading.ones)
    learned = tuple(f"{name.rpartition('.')[2]}: {_values(node)}" for name, node in writer.learned.items())
    learned += (f"{ones} constant factor{'s' if ones > 1 else ''} of 1, not shown",) if ones else ()
    return BlockWiring(
        block.path, block.position, lines, writer.sublayers(), learned, _residual(writer), tuple(writer.norm_modules)
    ), writer


def _values(node: Node) -> str:
    v = node.value.float()
    low, high = v.min().item(), v.max().item()
    size = "one number" if v.numel() == 1 else f"{v.numel()} values"
    return f"{size}, {low:.4g}" if low == high else f"{size}, {low:.4g} … {high:.4g}"


def _residual(writer: Writer) -> float | None:
    """The equation compared with the model: the sum of its terms minus the block's output.

    None if a matrix mixes streams, because a plain sum cannot express that."""
    worst = 0.0
    for target in writer.block.leaving.values():
        total = torch.zeros_like(target.value, dtype=torch.float64)
        for t in writer.reading.terms(target):
            part = torch.ones((), dtype=torch.float64) * t.number
            factors = [f.value for f in (*t.vectors, *t.gates)] + ([] if t.atom is None else [t.atom.value])
            try:
                for f in factors:
                    part = part * (f.reshape(target.shape) if f.numel() == target.value.numel() else f).double()
                total = total + part
            except RuntimeError:
                return None
        if total.shape != target.shape:
            return None
        wanted = target.value.double()
        worst = max(worst, float((total - wanted).norm() / wanted.norm().clamp_min(1e-30)))
    return (
        None
        if worst > 1e-2 and any(t.gates for t in writer.reading.terms(next(iter(writer.block.leaving.values()))))
        else worst
    )


def types_of(model: Any) -> dict[str, str]:
    """Module path → the name of its class."""
    return {name: type(module).__name__ for name, module in model.named_modules()}
