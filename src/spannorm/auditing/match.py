"""Which of our placements a wiring equals. For that, the registry's own blocks are run and read in the same way."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from spannorm.auditing.behaviour import Norms
from spannorm.auditing.ends import Ends
from spannorm.auditing.stacks import find_stacks
from spannorm.auditing.trace import run
from spannorm.auditing.wiring import BlockWiring, read_block, types_of
from spannorm.block import Block
from spannorm.placements import PLACEMENTS, Stack

_OPTIONS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "span": ({}, {"initial_norm": "none"}, {"initial_norm": "embedding"}),
    "peri": ({}, {"embedding_norm": True}),
    "parallel": ({}, {"norms": 2}),
}
_WIDTH = 16
_COUNT = {1: "one", 2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Match:
    """The name of a wiring."""

    placement: str | None
    """A name of our registry, or None."""
    nearest: str
    differs: tuple[str, ...]
    """How it differs from the nearest one; empty if it equals it."""
    options: tuple[tuple[str, Any], ...] = ()
    """Options of the nearest one."""


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o_proj = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.o_proj(torch.softmax(q @ k.mT, -1) @ v)


class _Plain(nn.Module):
    """A stack of one of our placements around plain sublayers."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, _WIDTH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inner norms, which do not show in the equation
            self.blocks = nn.ModuleList(
                Block(_Attention(), nn.Sequential(nn.Linear(_WIDTH, 24), nn.GELU(), nn.Linear(24, _WIDTH)), block)
                for block in stack.blocks(_WIDTH)
            )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x


@cache
def _read(
    kind: type, name: str, depth: int, options: tuple[tuple[str, Any], ...]
) -> tuple[tuple[str, ...], bool, bool]:
    """The equations of all blocks of one of our stacks, and its two ends: embedding norm, final norm."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        stack = Stack(name, depth, "none", dict(options))
        model = _Plain(stack)
        trace = run(model, (torch.arange(10).reshape(2, 5),))
    norms, types = Norms(), types_of(model)
    blocks = find_stacks(model, trace)[0].blocks
    return (
        tuple(_plain_letters(read_block(b, norms, types)[0].text) for b in blocks),
        stack.embedding_norm,
        stack.final_norm,
    )


def norm_roles(name: str, depth: int, options: Mapping[str, Any] | None = None) -> list[str]:
    """The names of a placement's norms, in the order in which its equation names them."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        model = _Plain(Stack(name, depth, "none", dict(options or {})))
        trace = run(model, (torch.arange(10).reshape(2, 5),))
    block = find_stacks(model, trace)[0].blocks[-1]
    return [n.rpartition(".")[2] for n in read_block(block, Norms(), types_of(model))[0].norms]


def match(blocks: Sequence[BlockWiring], ends: Ends, depth: int) -> Match:
    """Name a wiring, or say how it differs from the nearest placement.

    Args:
        blocks: all blocks in order.
        depth: blocks of the model, which some placements' constants depend on.
    """
    found = [_plain_letters(b.text) for b in blocks]
    parallel = [bool(re.fullmatch(r"x' = x \+ [AM]\(N\(x\)\) \+ F\(N\(x\)\)", _skeleton(b.text))) for b in blocks]
    scored: list[tuple[tuple[float, ...], Match]] = []
    for name, kind in PLACEMENTS.items():
        for options in _OPTIONS.get(name, ({},)):
            try:
                ours, embedding_norm, final_norm = _read(kind, name, depth, tuple(options.items()))
            except (RuntimeError, ValueError, IndexError):
                continue
            differs = _differences(found, ours, parallel)
            if bool(ends.embedding_norm) != embedding_norm:
                differs.append(
                    "the embedding is normalized" if ends.embedding_norm else "the embedding is not normalized"
                )
            if bool(ends.final_norm) != final_norm:
                differs.append("a final norm" if ends.final_norm else "no final norm")
            missing = _missing_inner(kind, blocks)
            if name == "parallel" and len(blocks[-1].norms) != options.get("norms", 1):
                continue
            near = sum(
                difflib.SequenceMatcher(None, _skeleton(a), _skeleton(b)).ratio()
                for a, b in zip(found, ours, strict=False)
            )
            wrong = sum(_unlike(a, b) for a, b in zip(found, ours, strict=False))
            extra = [f"no norm at {m} inside its sublayers" for m in missing]
            asked = sum(len(kind.inner_norms) for _ in (0,)) if not missing else 0
            score = (wrong, float(len(differs) + len(extra)), -near, -float(asked))
            scored.append(
                (score, Match(None if differs or extra else name, name, (*differs, *extra), tuple(options.items())))
            )
    return min(scored, key=lambda s: s[0])[1]


def _plain_letters(text: str) -> str:
    """Replace every sublayer by S, because a placement does not depend on the kind of its sublayers.

    Mixers with the same input become one S, and so do feed-forwards with the same input."""
    text = re.sub(r"\bM\(", "A(", text)
    text = re.sub(r"(([AF])\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\))(?: \+ \2\(\3\))+", r"\1", text)
    return re.sub(r"\b[AF]\(", "S(", text)


def _unlike(a: str, b: str) -> float:
    """0 if two equations differ only in factors, ½ if each of their lines does the same, otherwise 1."""
    a, b = _skeleton(a), _skeleton(b)
    return 0.0 if a == b else 0.5 if _step(a)[0] is not None and _step(a)[0] == _step(b)[0] else 1.0


def _skeleton(text: str) -> str:
    """An equation without its factors."""
    return re.sub(r"[\d.e−-]+·|\w+⊙|[gG][⊙·]", "", text)


def _step(text: str) -> tuple[str | None, int]:
    """What each line of an equation does to the state before it, if all lines do the same; and the number of lines.

    PreNorm is two times `p + S(N(p))`, whatever else a sublayer reads from outside.
    """
    before, steps = "x", set()
    lines = text.replace(", e)", ")").split("; ")
    for line in lines:
        name, _, sum_ = line.partition(" = ")
        steps.add(re.sub(rf"\b{before}\b", "p", sum_))
        before = name
    step = steps.pop() if len(steps) == 1 else None
    return (step if step and not re.search(r"\b[xh]\d*\b", step) else None), len(lines)


def _differences(found: Sequence[str], ours: Sequence[str], parallel: Sequence[bool]) -> list[str]:
    groups: dict[str, list[int]] = {}
    for b, (a, wanted) in enumerate(zip(found, ours, strict=False)):
        if a == wanted:
            continue
        if parallel[b]:
            said = "parallel: attention and feed-forward read the same x"
            said += "" if _skeleton(a) == a else f", with factors: {a}"
        elif _skeleton(a) == _skeleton(wanted):
            said = f"factors: {a}"
        elif _step(_skeleton(a))[0] is not None and _step(_skeleton(a))[0] == _step(_skeleton(wanted))[0]:
            count = _step(a)[1]
            said = f"{_COUNT.get(count, count)} sublayer{'s' if count > 1 else ''} a block"
            said += "" if _skeleton(a) == a else f", with factors: {a}"
        else:
            said = a
        groups.setdefault(said, []).append(b)
    whole = len(found)
    return [said if len(at) == whole else f"{said} (blocks {ranges(at)})" for said, at in groups.items()]


def ranges(at: Sequence[int]) -> str:
    """0, 1, 2, 5 → `0–2, 5`."""
    parts: list[list[int]] = []
    for b in at:
        if parts and b == parts[-1][-1] + 1:
            parts[-1].append(b)
        else:
            parts.append([b])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)


def _missing_inner(kind: Any, blocks: Sequence[BlockWiring]) -> list[str]:
    """The norms inside sublayers that a placement declares and a model does not have."""
    have = [{(s.letter, n) for s in b.sublayers for n in s.inner_norms} for b in blocks]
    wanted = {"q": ("A", "q"), "k": ("A", "k"), "v": ("A", "v"), "attn_out": ("A", "out"), "ffn_down": ("F", "out")}
    return [role for role in kind.inner_norms if role in wanted and not all(wanted[role] in h for h in have)] + [
        role for role in kind.inner_norms if role not in wanted
    ]
