"""A block's equation as text, in the usual letters.

`x` is the input, `x'` the output, `h` a state between sublayers; `N` a norm, `A` attention, `M` another mixer of
tokens, `F` a sublayer that works on each token alone, `e` an input from outside the block. Several streams are `x1`,
`x2` and so on.
"""

from __future__ import annotations

from typing import Any

from spannorm.auditing.behaviour import Norms, strip
from spannorm.auditing.branches import Branch, Reading
from spannorm.auditing.equation import ADDS, Term, parameters_of
from spannorm.auditing.stacks import Block
from spannorm.auditing.sublayers import Sublayer, letter_of, sublayers_of
from spannorm.auditing.trace import Node


class Writer:
    """Writes one block's equation."""

    def __init__(self, block: Block, norms: Norms, types: dict[str, str], batch_first: Any = None) -> None:
        self.batch_first = batch_first
        self.block, self.norms, self.types = block, norms, types
        self.reading = Reading(block, norms)
        self.names: dict[int, str] = {}
        self.branches: dict[int, tuple[Branch, str]] = {}
        self.learned: dict[str, Node] = {}
        self.norm_modules: list[str] = []
        self._collect()
        self._name()

    # what there is ----------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Follow every sum, norm and branch, going back from the block's output."""
        self.sums: dict[int, Node] = {}
        self.normed: dict[int, list[Node]] = {}  # sum → norms that read it
        self.raw: dict[int, int] = {}  # node → branches that read it as it is
        queue, done = [*self.block.leaving.values()], set()
        while queue:
            root = queue.pop()
            if root.index in done or root.index in self.reading.streams:
                continue
            done.add(root.index)
            self.sums[root.index] = root
            for term in self.reading.terms(root):
                atom = term.atom
                if atom is None or atom.index in self.reading.streams or self._component(atom):
                    continue
                queue += self._into(atom)

    def _into(self, atom: Node) -> list[Node]:
        norm = self.norms.at(atom)
        if norm is not None and self.reading.is_state(atom):
            self._reads_norm(atom)
            return [self._bare(norm.input)]
        if norm is not None:  # a norm on what a branch returned
            return [strip(norm.input)]
        if atom.index < self.block.start:
            return []
        branch = self.reading.branch(atom)
        if atom.index not in self.branches:
            self.branches[atom.index] = (
                branch,
                self._letter(branch),
            )
            more = []
            for read in branch.reads:
                bare = self._bare(read)
                norm = self.norms.at(bare)
                self.raw[bare.index] = self.raw.get(bare.index, 0) + 1
                if norm is not None:
                    self._reads_norm(bare)
                    more.append(self._bare(norm.input))
                else:
                    more.append(bare)
            return more
        return []

    def _letter(self, branch: Branch) -> str:
        return letter_of(branch, self.types.get(f"{self.block.path}.{branch.module}", ""), self.batch_first)

    def _reads_norm(self, node: Node) -> None:
        norm = self.norms.at(node)
        assert norm is not None
        readers = self.normed.setdefault(self._bare(norm.input).index, [])
        if all(node is not r for r in readers):
            readers.append(node)

    def _inside(self, root: Node, stop: set[int]) -> list[Node]:
        """The nodes within a sum, views taken off, down to those in `stop`."""
        found: dict[int, Node] = {}
        stack, seen = [root], set()
        while stack:
            n = stack.pop()
            step = None if n.index in self.reading.streams else self.reading._step(n)
            for t in step or []:
                if t.atom is not None and t.atom.index not in seen:
                    seen.add(t.atom.index)
                    bare = self._bare(t.atom)
                    found[bare.index] = bare
                    if bare.index not in stop:
                        stack.append(t.atom)
        found.pop(self._bare(root).index, None)
        return list(found.values())

    def _bare(self, node: Node) -> Node:
        """Without views and casts, and a norm without the gain of its own that follows it."""
        node = strip(node)
        if node.op == "mul" and node.index not in self.reading.streams:
            for x, g in (node.args[:2], node.args[1::-1]):
                if isinstance(x, Node) and isinstance(g, Node) and not g.data:
                    core = strip(x)
                    if self.norms.at(core) is not None and self._gain_of(core, g):
                        return core
        return node

    def _component(self, node: Node) -> str | None:
        return self.reading._part_of_stream(node)

    def _name(self) -> None:
        """Name the sums that are used more than once, and those that a sublayer reads after another one was added."""
        own = {i for t in self.block.leaving.values() for i in (t.index, strip(t).index, self._bare(t).index)}
        while True:  # a sum inside two others is one of its own
            roots = set(self.sums)
            inside: dict[int, tuple[Node, int]] = {}
            for root in self.sums.values():
                for n in self._inside(root, roots):
                    inside[n.index] = n, inside.get(n.index, (n, 0))[1] + 1
            shared = [n for n, count in inside.values() if count > 1 and n.index not in roots and self._is_sum(n)]
            if not shared:
                break
            last = max(shared, key=lambda n: n.index)
            self.sums[last.index] = last
            self.raw[last.index] = self.raw.get(last.index, 0) + 1
        used = {index: count for index, (_, count) in inside.items()}
        chosen: dict[int, Node] = {}
        for index, node in self.sums.items():
            bare = strip(node)
            if bare.index in self.reading.streams or bare.index in own or not self._holds_branch(bare):
                continue
            if used.get(bare.index, 0) or self.raw.get(index, 0) or len(self.normed.get(index, [])) > 1:
                chosen[bare.index] = bare
            else:
                for norm in self.normed.get(index, []):
                    again = used.get(norm.index, 0) + len(self.normed.get(norm.index, []))
                    if norm.index not in own and (self.raw.get(norm.index, 0) or again > 1):
                        chosen[norm.index] = norm
        for k, index in enumerate(sorted(chosen)):
            self.names[index] = "h" if len(chosen) == 1 else f"h{k + 1}"
        self.named = chosen

    def _is_sum(self, node: Node) -> bool:
        return node.op in ADDS and self._holds_branch(node) and self.reading.is_state(node)

    def _holds_branch(self, node: Node) -> bool:
        """Whether a sum has a branch in it, or a norm of one."""
        norm = self.norms.at(node)
        inside = strip(norm.input) if norm is not None else node
        terms = self.reading.terms(inside, set(self.sums) - {inside.index, node.index} or None)
        real = [t for t in terms if t.atom is not None]
        return len(real) > 1

    # writing ----------------------------------------------------------------------------------------------------------

    def lines(self) -> tuple[str, ...]:
        lines = [f"{self.names[n.index]} = {self.written(n, inside=True)}" for n in self._ordered()]
        lines += [f"{name} = {self.written(target, inside=True)}" for name, target in self.block.leaving.items()]
        return tuple(lines)

    def _ordered(self) -> list[Node]:
        return sorted(self.named.values(), key=lambda n: n.index)

    def written(self, node: Node, inside: bool = False) -> str:
        """A state as text: its name, or its sum."""
        bare = self._bare(node)
        if not inside and bare.index in self.names:
            return self.names[bare.index]
        norm = self.norms.at(bare)
        if norm is not None and bare.index not in self.reading.streams:
            return self._norm(bare)
        stop = set(self.names) - {bare.index, node.index}
        return self._sum(self.reading.terms(node, stop if stop else None))

    def _sum(self, terms: list[Term]) -> str:
        groups: dict[Any, tuple[int, str]] = {}
        for term in sorted(terms, key=self._turn):
            rank, body, key = self._atom(term)
            if body is None:
                continue
            number = f"{term.number:.4g}"
            vectors = self._vectors(term)
            gate = "".join(dict.fromkeys("G·" if _mixing(g) else "g⊙" for g in term.gates))
            factor = "" if number == "1" else "−" if number == "-1" else f"{number.replace('-', '−')}·"
            groups.setdefault((key, factor, vectors, gate), (rank, f"{factor}{vectors}{gate}{body}"))
        ordered = [text for _, text in sorted(groups.values(), key=lambda g: g[0])]
        return " + ".join(ordered).replace("+ −", "− ") or "0"

    def _turn(self, term: Term) -> tuple[bool, int]:
        """The order in which norms are named: as they ran, but feed-forwards last."""
        _, letter = self.branches.get(term.atom.index, (None, "")) if term.atom is not None else (None, "")
        return letter == "F", -1 if term.atom is None else term.atom.index

    def _vectors(self, term: Term) -> str:
        """The learned factors, without a norm's own gain."""
        vectors = list(term.vectors)
        atom = term.atom
        if atom is not None and self.norms.at(atom) is not None and vectors:
            own = [v for v in vectors if self._gain_of(atom, v)]
            vectors = [v for v in vectors if not own or v is not own[-1]]
        names = []
        for v in vectors:
            name = next((leaf.name for leaf in parameters_of(v)), v.op)
            self.learned[name] = v
            names.append(name.rpartition(".")[2])
        return "".join(f"{n}⊙" for n in names)

    def _gain_of(self, norm: Node, vector: Node) -> bool:
        """Whether a learned factor belongs to a norm: its parameter sits in the norm's module."""
        owner = norm.module
        return any(leaf.name.rpartition(".")[0] in (owner, "") or leaf.name == "?" for leaf in parameters_of(vector))

    def _atom(self, term: Term) -> tuple[int, str | None, Any]:
        """Rank in the sum, text, and a key that is equal for terms that can be merged."""
        atom = term.atom
        if atom is None:
            return 0, None, None
        bare = strip(atom)
        if atom.index in self.reading.streams or bare.index in self.reading.streams:
            text = self._stream(self.reading.streams.get(atom.index, self.reading.streams.get(bare.index, 0)))
            return 0, text, text
        part = self._component(atom)
        if part is not None:
            return 0, f"x[{part}]", part
        if bare.index in self.names:
            return 1, self.names[bare.index], bare.index
        if self.norms.at(atom) is not None:
            return (1 if self.reading.is_state(atom) else atom.index + 10), self._norm(atom), atom.index
        if atom.index < self.block.start:
            return 2, "e", strip(atom).index
        branch, letter = self.branches.get(atom.index) or (self.reading.branch(atom), "F")
        text = f"{letter}({self._reads(branch)})"
        return 10 + atom.index, text, (branch.module.partition(".")[0], text)

    def _stream(self, k: int) -> str:
        return "x" if len(self.block.streams) == 1 else f"x{k + 1}"

    def _norm(self, node: Node) -> str:
        norm = self.norms.at(node)
        assert norm is not None
        if node.module not in self.norm_modules:
            self.norm_modules.append(node.module)
        return f"N({self.written(norm.input)})"

    def _reads(self, branch: Branch) -> str:
        texts = [self.written(r) for r in sorted(branch.reads, key=lambda n: n.index)]
        texts += ["e"] if branch.outside else []
        return ", ".join(dict.fromkeys(texts)) or "·"

    def sublayers(self) -> tuple[Sublayer, ...]:
        return sublayers_of(self.branches.values(), self.norms)


def _mixing(gate: Node) -> bool:
    """Whether a gate is a matrix over streams."""
    return gate.value.ndim >= 3 and gate.shape[-1] == gate.shape[-2] and gate.shape[-1] > 1
