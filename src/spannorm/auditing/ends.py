"""What happens before the first block and after the last one."""

from __future__ import annotations

from dataclasses import dataclass

from spannorm.auditing.behaviour import SAME, Norms, strip
from spannorm.auditing.stacks import Block, Stack
from spannorm.auditing.trace import Node, Trace


@dataclass(frozen=True)
class Ends:
    """A stack's two ends."""

    embedding_norm: str | None
    """The path of the norm between the embedding and block 0."""
    embedding_factor: float
    """A constant factor on the embedding."""
    embeddings: tuple[str, ...]
    """The embedding tables whose rows are added."""
    final_norm: str | None
    """The norm after the last block."""
    logit_factor: float
    soft_cap: bool
    """Whether logits pass a tanh."""
    head: str | None
    """The matrix that computes the logits."""
    tied: bool | None
    """Whether it is an embedding table."""


def read_ends(trace: Trace, stack: Stack, norms: Norms) -> Ends:
    """Read both ends of a stack from the trace."""
    first, last = stack.blocks[0], stack.blocks[-1]
    factor, norm_in, tables = _entry(first.streams[0], norms)
    norm_out, head, logit_factor, cap = _exit(trace, last, norms)
    return Ends(norm_in, factor, tables, norm_out, logit_factor, cap, head, None if head is None else head in tables)


def _entry(x: Node, norms: Norms) -> tuple[float, str | None, tuple[str, ...]]:
    """From the input of block 0 back to the embedding tables: factor of the first table, norm, tables."""
    factors: list[float] = []
    tables: dict[str, None] = {}
    found: str | None = None
    stack: list[tuple[Node, float]] = [(x, 1.0)]
    seen: set[int] = set()
    while stack:
        n, factor = stack.pop()
        if n.index in seen or len(seen) > 500:
            continue
        seen.add(n.index)
        norm = norms.at(n)
        if norm is not None:
            found = found or n.module or "a function"
            stack.append((norm.input, 1.0))
        elif n.op == "embedding":
            name = n.args[0].name if isinstance(n.args[0], Node) else ""
            tables[name] = None
            if "pos" not in name and "type" not in name and n.parents[-1].data:
                factors.append(factor)
        elif n.op in ("mul", "div"):
            numbers = [_one(a) for a in n.args[:2]]
            value = next((v for v in numbers if v is not None), 1.0) or 1.0
            data = [a for a in n.args[:2] if isinstance(a, Node) and a.data]
            stack += [(d, factor * (value if n.op == "mul" else 1 / value)) for d in data[:1]]
        else:
            stack += [(p, factor) for p in n.parents if p.data]
            tables |= dict.fromkeys(t for p in n.parents if not p.data for t in _positions(p))
    return (factors[-1] if factors else 1.0), found, tuple(t for t in tables if t)


def _positions(node: Node) -> list[str]:
    """Tables whose rows are added for any input: positions, types."""
    found, stack = [], [node]
    while stack:
        n = stack.pop()
        if n.op == "embedding" and isinstance(n.args[0], Node):
            found.append(n.args[0].name)
        elif n.op != "parameter":
            stack += n.parents
    return found


def _one(a: object) -> float | None:
    """A constant factor that is one number."""
    if isinstance(a, (int, float)):
        return float(a)
    if isinstance(a, Node) and not a.data and a.value.numel() == 1:
        return float(a.value)
    return None


def _exit(trace: Trace, last: Block, norms: Norms) -> tuple[str | None, str | None, float, bool]:
    """From the model's output back to the output of the last block."""
    ends = {t.index for t in last.targets} | {strip(t).index for t in last.targets}
    outputs = [o for o in trace.outputs if o.value.is_floating_point() and o.index >= last.end] or trace.outputs[:1]
    norm: str | None = None
    head: str | None = None
    factor, cap, before_head = 1.0, False, True
    for output in outputs[:1]:
        stack, seen = [output], set()
        while stack:
            n = stack.pop()
            if n.index in seen or n.index in ends or n.index < last.start:
                continue
            seen.add(n.index)
            found = norms.at(n)
            if found is not None and _straight(found.input, ends):
                norm = norm or n.module or "a function"
            if n.op in ("mm", "addmm", "bmm") and before_head:
                names = [
                    q.name for p in n.parents for q in (p, *p.parents) if q.op == "parameter" and q.value.ndim == 2
                ]
                head, before_head = (names[0] if names else None), False
            elif n.op in ("mul", "div") and before_head:
                value = next((v for v in map(_one, n.args[:2]) if v is not None), None)
                factor *= 1.0 if value in (None, 0.0) else value if n.op == "mul" else 1 / value  # type: ignore[operator]
            elif n.op == "tanh" and before_head:
                cap = True
            stack += [p for p in n.parents if p.data]
    return norm, head, (1.0 if cap else factor), cap


def _straight(node: Node, ends: set[int]) -> bool:
    """Whether a node is the last block's output; it may be sliced, moved or multiplied by a number."""
    while node.index not in ends:
        data = [p for p in node.parents if p.data]
        if (
            node.op not in {*SAME, "slice", "select", "mul", "div", "index", "gather", "mean", "sum", "stack", "cat"}
            or not data
        ):
            return False
        node = data[0]
    return True
