"""Where a model's blocks begin and end: lists of modules in which each reads the output of the one before."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from spannorm.auditing.behaviour import Norms, strip
from spannorm.auditing.trace import Call, Node, Trace


@dataclass(eq=False, repr=False)
class Block:
    """One block of the trace: its inputs and outputs."""

    path: str
    position: int
    start: int
    end: int
    streams: list[Node]
    targets: list[Node]

    @property
    def leaving(self) -> dict[str, Node]:
        """What the equation's last lines say, by name: `x'`, or `x1'` and so on for several tensors, or `x[0]'` and so
        on for one tensor that holds several streams one by one."""
        if len(self.targets) > 1:
            return {f"x{k + 1}'": t for k, t in enumerate(self.targets)}
        target = strip(self.targets[0])
        if target.op == "stack":
            return {f"x[{k}]'": part for k, part in enumerate(target.parents)}
        return {"x'": self.targets[0]}


@dataclass(eq=False, repr=False)
class Stack:
    """Blocks in the order in which they ran. A block that runs several times appears several times."""

    path: str
    blocks: list[Block]


def find_stacks(model: nn.Module, trace: Trace) -> list[Stack]:
    """Every stack of a model that is not part of another one, in the order they ran."""
    lists = [n for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 0]
    chains: dict[str, list[Call]] = {}
    for path in lists:
        calls = [c for c in trace.calls if c.path.rpartition(".")[0] == path]
        if calls and all(c.inputs and c.outputs for c in calls):
            chains[path] = sorted(calls, key=lambda c: c.start)
    merged = _interleaved(chains)
    found = [Stack(path, blocks) for path, groups in merged.items() if len(groups) > 1 and (blocks := _blocks(groups))]
    real = [s for s in found if _has_skip(s)] or found
    alike = [s for s in real if len(s.blocks) > 1 and (_of_one_kind(model, s) or not _inside_another(s, real))] or real
    kept = [s for s in alike if not _holds_others(s, alike)]
    kept = [s for s in kept if not _inside_another(s, kept)]
    return sorted(kept, key=lambda s: s.blocks[0].start)


def _has_skip(stack: Stack) -> bool:
    """Whether a block adds something to its input, because a sequence of plain layers is no stack of blocks."""
    from spannorm.auditing.equation import Sums

    block = stack.blocks[len(stack.blocks) // 2]
    sums = Sums(block, Norms())
    return any(sums.is_state(strip(node)) for node in block.leaving.values())


def _inside_another(stack: Stack, others: list[Stack]) -> bool:
    return any(stack.path.startswith(f"{o.path}.") for o in others)


def _of_one_kind(model: nn.Module, stack: Stack) -> bool:
    """Whether a list inside a list holds modules of one class: blocks of a stage, not the sublayers of a block."""
    return len({type(model.get_submodule(b.path)) for b in stack.blocks}) == 1


def _holds_others(stack: Stack, others: list[Stack]) -> bool:
    """Whether a stack's parts are stacks themselves, such as stages that hold blocks."""
    inner = [o for o in others if o is not stack and o.path.startswith(f"{stack.path}.")]
    return len({o.path.removeprefix(f"{stack.path}.").partition(".")[0] for o in inner}) * 2 > len(
        {b.path for b in stack.blocks}
    )


def _interleaved(chains: dict[str, list[Call]]) -> dict[str, list[list[Call]]]:
    """Lists of equal length whose modules run in turns are one stack: block i is module i of all of them."""
    done: dict[str, list[list[Call]]] = {}
    for path, calls in chains.items():
        parent = path.rpartition(".")[0]
        beside = [
            p for p in chains if p.rpartition(".")[0] == parent and len(chains[p]) == len(calls) and len(calls) > 1
        ]
        turns = [p for p in beside if chains[p][0].start < calls[1].start and calls[0].start < chains[p][1].start]
        if len(turns) > 1:
            if parent not in done:
                rows = [sorted(row, key=lambda c: c.start) for row in zip(*(chains[p] for p in turns), strict=True)]
                done[parent] = rows
        else:
            done[path] = [[c] for c in calls]
    return dict(sorted(done.items(), key=lambda item: len(item[0].split("."))))


def _blocks(groups: list[list[Call]]) -> list[Block]:
    streams: list[list[Node]] = [[]]
    for before, here in pairwise(groups):
        found = [n for n in here[0].inputs if n.value.is_floating_point() and n.value.ndim >= 2
                 and _comes_from(n, before[0].start, before[-1])]  # fmt: skip
        streams.append([n for n in _distinct(found) if n.shape[:2] == found[0].shape[:2]])
    if not all(streams[1:]):
        return []
    shapes = [n.shape for n in streams[1]]
    first = groups[0][0].inputs
    places = [i for i, n in enumerate(groups[1][0].inputs) if any(n is s for s in streams[1])]
    if len(first) == len(groups[1][0].inputs):
        streams[0] = _distinct([first[i] for i in places])
    else:
        streams[0] = _distinct([n for n in first if n.value.is_floating_point() and n.shape in shapes][: len(shapes)])
    if not streams[0]:
        return []
    blocks = []
    for i, calls in enumerate(groups):
        again = groups[i + 1] if i + 1 < len(groups) else None
        if again is not None and _position(again[0]) > _position(calls[0]):
            targets, end = streams[i + 1], again[0].start
        else:  # the last one, or the last before the stack runs again
            targets, end = _left(calls[-1].outputs, shapes), calls[-1].end
        path = calls[0].path if len(calls) == 1 else calls[0].path.rpartition(".")[0].rpartition(".")[0]
        if targets:
            blocks.append(Block(path, _position(calls[0]), calls[0].start, end, streams[i], targets))
    return blocks


def _position(call: Call) -> int:
    """A block's index, the last part of its path; of stages named otherwise 0."""
    last = call.path.rpartition(".")[2]
    return int(last) if last.isdigit() else 0


def _left(outputs: list[Node], shapes: list[torch.Size]) -> list[Node]:
    """The last block's output: with the shape of the streams, or of their readout."""
    same = [n for n in outputs if n.shape in shapes]
    alike = [n for n in outputs if n.shape[:2] == shapes[0][:2] and n.shape[-1] == shapes[0][-1]]
    return _distinct((same or alike)[: len(shapes)])


def _distinct(nodes: list[Node]) -> list[Node]:
    """Each tensor once: neither twice nor beside a view of itself, nor a part beside its whole."""
    kept: list[Node] = []
    for node in nodes:
        if not any(strip(node) is strip(k) for k in kept):
            kept.append(node)
    return kept


def _comes_from(node: Node, start: int, before: Call) -> bool:
    """Whether a tensor was computed from the results of a call."""
    stack, seen = [node], set()
    while stack:
        n = stack.pop()
        if n.index in seen:
            continue
        seen.add(n.index)
        if any(n is o for o in before.outputs):
            return True
        if n.index >= start and n.data:
            stack += n.parents
    return False
