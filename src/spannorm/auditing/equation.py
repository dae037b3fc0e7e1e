"""The equation of a block, read from the trace: its output as a sum of its inputs, norms and branches.

An expression is a sum of terms. Each term is a product of factors (numbers, learned vectors, gates that depend on the
data) and an atom. An atom is a stream, a norm of an expression, a branch that reads expressions, or an input from
outside the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spannorm.auditing.behaviour import SAME, Norms, strip
from spannorm.auditing.stacks import Block
from spannorm.auditing.trace import Node

WEIGHTED = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm", "linear", "matmul", "embedding",
            "_scaled_mm", "mv", "addmv", "einsum"}  # fmt: skip
ADDS = {"add", "sub", "rsub", "lerp", "addcmul", "sum"}


@dataclass(eq=False, repr=False)
class Term:
    """factor × atom."""

    number: float
    vectors: tuple[Node, ...]
    """Learned factors, in order from the sum inwards."""
    gates: tuple[Node, ...]
    """Factors that depend on the data."""
    atom: Node | None
    """None for a learned bias."""

    def times(self, number: float = 1.0, vectors: tuple[Node, ...] = (), gates: tuple[Node, ...] = ()) -> Term:
        return Term(number * self.number, vectors + self.vectors, gates + self.gates, self.atom)


class Sums:
    """The sums in one block, and which of its tensors are states.

    Args:
        block: streams in, streams out.
        norms: those of the whole trace.
    """

    def __init__(self, block: Block, norms: Norms) -> None:
        self.block, self.norms = block, norms
        self.width = block.streams[0].shape[-1]
        self.size = block.streams[0].value.numel()
        self.streams = {n.index: k for k, n in enumerate(block.streams)}
        for k, n in enumerate(block.streams):
            self.streams.setdefault(strip(n).index, k)
        self._terms: dict[int, list[Term]] = {}
        self._state: dict[int, bool] = {}
        self._own: dict[int, bool] = {}
        self.ones: set[int] = set()
        """Products with a constant that is 1: a multiplier at its default."""
        self.visited: dict[int, Node] = {}
        for target in block.leaving.values():
            self._visit(target)

    # sums -----------------------------------------------------------------------------------------------------------

    def terms(self, node: Node, stop: set[int] | None = None) -> list[Term]:
        """A node as a sum; at nodes in `stop` (not the node itself) the sum goes no deeper."""
        if stop is None and node.index in self._terms:
            return self._terms[node.index]
        found = self._expand(node, stop)
        if stop is None:
            self._terms[node.index] = found
        return found

    def _expand(self, node: Node, stop: set[int] | None) -> list[Term]:
        step = None if node.index in self.streams else self._step(node)
        if step is None:
            return [Term(1.0, (), (), node)]
        found = []
        for term in step:
            child = term.atom
            if child is None or (stop is not None and child.index in stop):
                found.append(term)
            else:
                found += [t.times(term.number, term.vectors, term.gates) for t in self.terms(child, stop)]
        return found

    def _step(self, node: Node) -> list[Term] | None:
        """One step of a sum inwards; None at an atom."""
        if node.index < self.block.start or not node.data or not node.parents:
            return None
        if self.norms.at(node) is not None:
            return None
        op, args = node.op, node.args
        if op in ADDS | {"mul", "div", "neg"} and self._inside_sublayer(node):
            return None
        whole = strip(args[0]) if op in ("select", "unbind") else node
        if (
            whole.op == "stack" and whole is not node and whole.index >= self.block.start
        ):  # opened and taken apart again
            k = node.item if node.item is not None else args[2]
            return [Term(1.0, (), (), whole.parents[k])]
        if op in SAME and node.parents:
            return [Term(1.0, (), (), node.parents[-1] if op == "copy" else node.parents[0])]
        if op in ("add", "sub", "rsub"):
            a, b = args[:2]
            alpha = float(node.kwargs.get("alpha", args[2] if len(args) > 2 else 1.0))
            signs = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[op]
            terms = [self._addend(x, s) for x, s in ((a, signs[0]), (b, signs[1]))]
            return [t for t in terms if t is not None]
        if op == "neg":
            return [Term(-1.0, (), (), args[0])]
        if op in ("mul", "div"):
            return self._product(node, op)
        if op == "lerp":
            a, b, w = args[:3]
            if not isinstance(w, Node):
                return [Term(1.0 - w, (), (), a), Term(float(w), (), (), b)]
            return None
        if op == "addcmul" and isinstance(args[1], Node) and isinstance(args[2], Node):
            value = float(node.kwargs.get("value", 1.0))
            for f, x in ((args[1], args[2]), (args[2], args[1])):
                if not f.data:
                    return [Term(1.0, (), (), args[0]), Term(value, (f,), (), x)]
            return None
        return self._over_streams(node)

    def _inside_sublayer(self, node: Node) -> bool:
        """Whether sums and factors are inside a sublayer: all in one child of the block, and without a state."""
        if node.index not in self._own:
            self._own[node.index] = False  # while it is worked out
            child = self._child(node)
            data = [p for p in node.parents if p.data]
            self._own[node.index] = bool(child) and all(
                self._child(strip(p)) == child and p.index >= self.block.start and not self._leads_to_state(p)
                for p in data
            )
        return self._own[node.index]

    def _child(self, node: Node) -> str:
        prefix = f"{self.block.path}."
        return node.module[len(prefix) :].partition(".")[0] if node.module.startswith(prefix) else ""

    def _leads_to_state(self, node: Node) -> bool:
        """Whether only sums and factors are between a state, or a norm, and a node."""
        stack, seen = [node], set()
        while stack:
            n = stack.pop()
            if n.index in self.streams or self.norms.at(n) is not None or self._part_of_stream(n) is not None:
                return True
            if n.index in seen or n.index < self.block.start:
                continue
            seen.add(n.index)
            if n.op in SAME | ADDS | {"mul", "div", "neg"}:
                stack += [p for p in n.parents if p.data]
            elif n.op == "bmm" and n.args[0].shape[-1] <= 16 and n.shape[-1] == self.width:  # mixes streams
                stack.append(n.args[1])
        return False

    def _addend(self, x: Any, sign: float) -> Term | None:
        if isinstance(x, Node) and x.data:
            return Term(sign, (), (), x)
        return None if not isinstance(x, Node) else Term(sign, (x,), (), None)

    def _product(self, node: Node, op: str) -> list[Term] | None:
        a, b = node.args[:2]
        if op == "div" and node.kwargs.get("rounding_mode"):
            return None
        for x, f in ((a, b), (b, a)) if op == "mul" else ((a, b),):
            if not (isinstance(x, Node) and x.data):
                continue
            if not isinstance(f, Node):
                if float(f) == 1.0:
                    self.ones.add(node.index)
                return [Term(float(f) if op == "mul" else 1 / float(f), (), (), x)]
            if not f.data:
                number = _number(f)
                if number is not None:
                    return [Term(number if op == "mul" else 1 / number, (), (), x)] if number else None
                return [Term(1.0, (f,), (), x)] if op == "mul" else None
        if op == "mul" and isinstance(a, Node) and isinstance(b, Node):
            for x, g in ((a, b), (b, a)):
                if g.value.numel() < x.value.numel() and bool((g.value == 1).all()):  # a mask that masks nothing
                    return [Term(1.0, (), (), x)]
                if self._is_gate(g, x, node):
                    return [Term(1.0, (), (g,), x)]
        return None

    def _is_gate(self, g: Node, x: Node, product: Node) -> bool:
        """Whether g is a weight on x outside a sublayer. x is a state or a sublayer's output."""
        if g.value.numel() >= x.value.numel() and g.shape[-1:] == x.shape[-1:] and self._is_sum_of_states(g):
            return False
        if self._is_sum_of_states(x):
            return True
        channels = x.shape[-1] if x.value.ndim else 0
        wide = channels == self.width or (channels > 8 and self.width % channels == 0)
        return product.module == self.block.path and g.value.numel() <= x.value.numel() and wide

    def _over_streams(self, node: Node) -> list[Term] | None:
        """Sums over several streams, and matrices that mix them."""
        first = node.parents[0] if node.parents else None
        if first is None or self.block.streams[0].value.ndim < 4:
            return None
        if node.op in ("sum", "mean") and first.shape[-1:] == (self.width,) and node.shape[-1:] == (self.width,):
            return [Term(1.0, (), (), first)] if self._is_sum_of_states(first) else None
        if node.op in ("bmm", "mm") and node.shape[-1] == self.width:
            mix, x = node.args[:2]
            if mix.shape[-1] <= 16 and self._is_sum_of_states(x):
                return [Term(1.0, (), (mix,), x)]
        return None

    # states -----------------------------------------------------------------------------------------------------------

    def is_state(self, node: Node) -> bool:
        """Whether a node is a stream, a sum that holds one, or a norm of such."""
        if node.index in self._state:
            return self._state[node.index]
        self._state[node.index] = False  # where it leads back to itself
        norm = self.norms.at(node) if node.index not in self.streams else None
        if node.index in self.streams:
            answer = True
        elif norm is not None:
            answer = norm.size >= min(self.width, 8) and self.is_state(strip(norm.input))
        else:
            answer = self._is_sum_of_states(node)
        self._state[node.index] = answer
        return answer

    def _is_sum_of_states(self, node: Node) -> bool:
        if node.index in self.streams:
            return True
        for t in self.terms(node):
            atom = t.atom
            if atom is None or atom is node:
                continue
            if atom.index in self.streams or self._part_of_stream(atom) is not None:
                return True
            norm = self.norms.at(atom)
            if norm is not None and self.is_state(strip(norm.input)):
                return True
        return self._part_of_stream(node) is not None or (
            self.norms.at(node) is not None and self.is_state(strip(self.norms.at(node).input))  # type: ignore[union-attr]
        )

    def _part_of_stream(self, node: Node) -> str | None:
        """The name of one of several streams carried in one tensor."""
        node = strip(node)
        if node.op in ("select", "unbind", "split", "slice", "split_with_sizes", "chunk", "index") and node.parents:
            whole = strip(node.parents[0])
            if whole.index in self.streams and whole.value.ndim >= 4 and node.shape[-1] == self.width:
                k = node.item if node.item is not None else node.args[2] if len(node.args) > 2 else 0
                return str(k)
        return None

    def _visit(self, node: Node) -> None:
        """Record every sum and every norm, going back from the block's output."""
        stack = [node]
        while stack:
            n = stack.pop()
            if n.index in self.visited or n.index < self.block.start or n.index in self.streams:
                continue
            norm = self.norms.at(n)
            if norm is not None:
                self.visited[n.index] = n
                if self.is_state(strip(norm.input)):
                    stack.append(norm.input)
                continue
            step = self._step(n)
            if step is None:
                continue
            self.visited[n.index] = n
            stack += [t.atom for t in step if t.atom is not None]


def parameters_of(node: Node) -> list[Node]:
    """The parameters that a node is made of, where it does not depend on the data."""
    stack, found, seen = [node], [], set()
    while stack:
        n = stack.pop()
        if n.index in seen or n.data:
            continue
        seen.add(n.index)
        if n.op == "parameter":
            found.append(n)
        stack += n.parents
    return found


def _number(f: Node) -> float | None:
    """A constant factor that is one number; what the model holds, learned or a buffer, stays what it is."""
    if parameters_of(f):
        return None
    value = f.value
    if value.numel() == 1 or (value.numel() and bool((value == value.flatten()[0]).all())):
        return float(value.flatten()[0])
    return None
