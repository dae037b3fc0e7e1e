"""The kind of a branch: attention, another mixer of tokens, or a feed-forward. The test changes one token."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from spannorm.auditing.behaviour import Norms, strip
from spannorm.auditing.branches import Branch
from spannorm.auditing.equation import parameters_of
from spannorm.auditing.trace import CannotReplay, Node, replay

_SOFTMAX = ("_softmax", "_scaled_dot_product", "_safe_softmax", "_flash_attention", "_efficient_attention")
_ROUTING = {"topk", "sort", "index_add", "nonzero", "_grouped_mm", "one_hot", "scatter", "bincount", "histc"}


@dataclass(frozen=True)
class Sublayer:
    """One branch of a block."""

    letter: str
    """`A`, `M` or `F`."""
    module: str
    """Path in the block."""
    weights: tuple[str, ...]
    """Names of its parameters, the one that writes its output first."""
    inner_norms: tuple[str, ...]
    """What its own norms normalize: `q`, `k`, `v`, `out` (what the last matrix reads), or their module's name."""


def letter_of(branch: Branch, kind: str, batch_first: Any) -> str:
    """`A`, `M` or `F`.

    Args:
        branch: what it is.
        kind: class of its module.
        batch_first: (batch, tokens) of the input, or None.
    """
    soft = any(op.startswith(_SOFTMAX) for op in branch.ops)
    words = f"{branch.module} {kind}".lower()
    attends, by_token = re.search(r"att(n|ention)", words), re.search(r"mlp|ffn|moe|expert|feed|dense|fc", words)
    if soft and branch.outside:  # its other tokens are outside of the block
        mixes = True
    elif branch.ops & _ROUTING and (attends or by_token):  # sizes that were read from the data cannot be run again
        mixes = not by_token or bool(attends)
    else:
        tried = _mixes(branch, batch_first)
        mixes = tried if tried is not None else not by_token
    return ("A" if soft else "M") if mixes else "F"


def _mixes(branch: Branch, batch_first: Any) -> bool | None:
    """Whether one token's input affects another token's output; None if this cannot be tested."""
    reads = [r for r in branch.reads if r.value.ndim >= 3]
    if not reads or len(reads) < len(branch.reads):
        return True if any(op.startswith("_scaled_dot_product") for op in branch.ops) else None
    rows, columns = reads[0].shape[:2]
    axis = 0 if (columns, rows) == tuple(batch_first or ()) and rows != columns else 1
    generator = torch.Generator("cpu").manual_seed(0)
    given = {}
    for r in reads:
        value, size = r.value.clone(), r.value.float().std().item()
        part = value.select(axis, 0)
        part += (size * torch.randn(part.shape, generator=generator)).to(part)
        given[r] = value
    try:
        other = replay(branch.node, given)
    except CannotReplay:
        return None
    if other.shape != branch.node.shape or other.numel() % (rows * columns) or reads[0].shape[axis] < 2:
        return None
    moved = (other.float() - branch.node.value.float()).abs().reshape(rows, columns, -1)
    rest = moved.narrow(axis, 1, moved.shape[axis] - 1).max()
    return bool(rest > 1e-6 * branch.node.value.float().abs().max().clamp_min(1e-20))


def sublayers_of(branches: Iterable[tuple[Branch, str]], norms: Norms) -> tuple[Sublayer, ...]:
    """The sublayers of a block, in the order in which they ran. Branches with the same module and letter are one."""
    found: dict[tuple[str, str], Sublayer] = {}
    for branch, letter in sorted(branches, key=lambda b: b[0].node.index):
        top = _part(branch.module)
        weights = tuple(dict.fromkeys(w.name for w in branch.weights if w.name))
        inner = tuple(dict.fromkeys(_inner(branch, n.node, norms) for n in branch.inner))
        before = found.get((letter, top))
        if before is not None:
            weights = tuple(dict.fromkeys((*before.weights, *weights)))
            inner = tuple(dict.fromkeys((*before.inner_norms, *inner)))
        found[letter, top] = Sublayer(letter, top, weights, inner)
    return tuple(found.values())


def _part(path: str) -> str:
    """The part of a block that a module stands in: its first name, and an index where that is a list."""
    name, _, rest = path.partition(".")
    index = rest.partition(".")[0]
    return f"{name}.{index}" if index.isdigit() else name


def _inner(branch: Branch, node: Node, norms: Norms) -> str:
    """What a norm inside a branch normalizes."""
    name = node.module.rpartition(".")[2]
    source = strip(norms.at(node).input)  # type: ignore[union-attr]
    while source.op in ("slice", "select", "split", "split_with_sizes", "unbind", "chunk") and source.parents:
        source = strip(source.parents[0])
    last = strip(branch.node)
    read = (
        strip(last.parents[-2] if last.op == "addmm" and len(last.parents) > 2 else last.parents[0])
        if last.parents
        else last
    )
    while read.op in ("mul", "add") and read.parents and read is not node:
        read = strip(next((p for p in read.parents if p.data), read.parents[0]))
    if read is node:
        return "out"
    made = (
        next((p.name for q in source.parents for p in parameters_of(q)), "")
        if source.op in ("mm", "addmm", "bmm")
        else ""
    )
    found = re.search(r"\b(?:w|c_|to_)?([qkv])(?:_|\b)(?!.*\b[qkv]_)", f"{made.rpartition('.')[0].rpartition('.')[2]}")
    found = found or re.search(r"^([qkv])_?(?:layer)?_?norm|^([qkv])_", name)
    return next((g for g in found.groups() if g), name) if found else name
