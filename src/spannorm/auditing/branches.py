"""The branches of a block: a sublayer's output, and the inputs from which it was computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from spannorm.auditing.behaviour import SAME, Norm, Norms, strip
from spannorm.auditing.equation import ADDS, WEIGHTED, Sums, parameters_of
from spannorm.auditing.stacks import Block
from spannorm.auditing.trace import Node


@dataclass(eq=False, repr=False)
class Branch:
    """A sublayer's output and its inputs."""

    module: str
    """Its path in the block."""
    node: Node
    reads: list[Node]
    """States and norms of states."""
    outside: list[Node]
    """Its inputs from before the block."""
    inner: list[Norm]
    """Norms inside."""
    ops: set[str]
    weights: list[Node] = field(default_factory=list)
    """Parameters between its input and its output, the last one first."""


class Reading(Sums):
    """The expressions of one block, its branches too; the arguments are those of `Sums`."""

    def __init__(self, block: Block, norms: Norms) -> None:
        super().__init__(block, norms)
        self._branches: dict[int, Branch] = {}

    def branch(self, node: Node) -> Branch:
        """The inputs from which a branch's output was computed."""
        if node.index not in self._branches:
            self._branches[node.index] = self._search(node)
        return self._branches[node.index]

    def _search(self, node: Node) -> Branch:
        found = Branch(self._module_of(node), node, [], [], [], set())
        stack, seen = [node], {node.index}
        while stack:
            stack.sort(key=lambda n: n.index)
            n = stack.pop()
            if n is not node and self._stops(n, found):
                continue
            found.ops.add(n.op)
            norm = self.norms.at(n)
            if norm is not None and n is not node:
                found.inner.append(norm)
            for p in n.parents:
                if p.op == "parameter":
                    found.weights.append(p)
                if p.index not in seen:
                    seen.add(p.index)
                    if p.data:
                        stack.append(p)
                    elif p.op != "parameter":
                        found.weights += [q for q in parameters_of(p) if q not in found.weights]
        return found

    def _stops(self, n: Node, found: Branch) -> bool:
        """At what a branch reads; notes it."""
        if n.op == "parameter":
            return True
        bare = strip(n)
        if self._part_of_stream(n) is not None:
            _once(found.reads, bare)
            return True
        if n.index in self.streams or bare.index in self.streams:
            _once(found.reads, self.block.streams[self.streams.get(n.index, self.streams.get(bare.index, 0))])
            return True
        if n.index < self.block.start:
            if (
                n.value.is_floating_point()
                and n.value.ndim > 2
                and n.shape[-1] == self.width
                and bare.op != "parameter"
            ):
                _once(found.outside, bare)
            return True
        norm = self.norms.at(n)
        if norm is not None and self.is_state(n):
            _once(found.reads, n)
            return True
        if n.op in SAME or n.value.numel() * 8 < self.size:
            return False
        if n.op in ("mul", "div") and self._child(n) != found.module.partition(".")[0] and self._scaled_state(n):
            _once(found.reads, n)
            return True
        if (n.index in self.visited and n.op in ADDS | {"mul"} and self.is_state(n)) or self._residual(n):
            _once(found.reads, n)
            return True
        return False

    def _scaled_state(self, n: Node) -> bool:
        """Whether a node is a state times a number."""
        step = self._step(n)
        return bool(step) and step[0].number != 1.0 and step[0].atom is not None and self.is_state(step[0].atom)  # type: ignore[index]

    def _residual(self, n: Node) -> bool:
        """Whether a node is a skip plus a branch with weights. It is a state even if it never leaves the block."""
        if n.op not in ADDS or n.value.numel() != self.size or not self._is_sum_of_states(n):
            return False
        return any(t.atom is not None and not self.is_state(t.atom) and self._weighted(t.atom) for t in self.terms(n))

    def _weighted(self, node: Node) -> bool:
        stack, seen = [node], set[int]()
        while stack:
            n = stack.pop()
            if n.op in WEIGHTED:
                return True
            if n.index in seen or n.index < self.block.start or n.index in self.streams or len(seen) > 400:
                continue
            seen.add(n.index)
            norm = self.norms.at(n)
            if norm is not None and self.is_state(n):
                continue
            stack += [p for p in n.parents if p.data]
        return False

    def _module_of(self, node: Node) -> str:
        """The part of the block (a child module) in which an output was computed."""
        prefix = f"{self.block.path}."
        stack, steps = [node], 0
        while stack and steps < 50:
            n = stack.pop(0)
            steps += 1
            if n.module.startswith(prefix):
                return n.module[len(prefix) :]
            stack += [p for p in n.parents if p.data and p.index >= self.block.start]
        return ""


def _once(found: list[Node], node: Node) -> None:
    if all(node is not f for f in found):
        found.append(node)
