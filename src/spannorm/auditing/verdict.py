"""The verdict: at most ten sentences with numbers, the most costly first."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spannorm.auditing.shrink import EXPERTS

if TYPE_CHECKING:
    from spannorm.auditing.draws import Row
    from spannorm.auditing.inspection import Audit

LINES = 10


@dataclass(frozen=True)
class Sentence:
    """One line."""

    off: bool
    """Whether it is a fault; with `--strict` it makes the exit code 1."""
    text: str


def verdict(found: Audit) -> list[Sentence]:
    """The most costly first, and faults before notes."""
    looks = (_recovered, _depth, _swapped, _zeros, _drift, _outlook, _epsilons, _precision, _signal, _embedding)
    lines = [sentence for look in looks for sentence in look(found)]
    ordered = [s for s in lines if s.off] + [s for s in lines if not s.off]
    return ordered[:LINES] or [Sentence(False, "nothing found that is off")]


def _recovered(found: Audit) -> Iterator[Sentence]:
    worst = max((b.residual for b in found.main.blocks if b.residual is not None), default=0.0)
    if not math.isfinite(worst) or worst > 1e-2:
        yield Sentence(False, f"the equation below leaves {worst:.1%} of what a block returns unexplained")


def _outputs(found: Audit) -> list[Row]:
    if isinstance(found.init, str):
        return []
    return [r for r in found.init if r.role in ("attention-out", "mixer-out", "FFN-down") and len(r.shape) > 1]


def _numbers(row: Row) -> str:
    stds = ", ".join(f"{std:.4f}" for std in row.std_by_depth.values())
    return f"std {stds} at {_listed(list(row.std_by_depth))} blocks"


def _listed(depths: list[int]) -> str:
    return ", ".join(map(str, depths[:-1])) + (" and " if len(depths) > 1 else "") + str(depths[-1])


def _depth(found: Audit) -> Iterator[Sentence]:
    rows = [r for r in _outputs(found) if r.depth_exponent is not None]
    if not rows:
        return
    scaled = [r for r in rows if r.depth_exponent]
    plain = [r for r in rows if not r.depth_exponent]
    if scaled and plain:
        for role in dict.fromkeys(r.role for r in plain):
            row = next(r for r in plain if r.role == role)
            other = next((r for r in scaled if r.role != role), scaled[0])
            whose = other.role if other.role != role else f"{role} ({other.name})"
            what = role if other.role != role else f"{role} ({row.name})"
            yield Sentence(
                True,
                f"{what} is not depth-scaled although {whose} is: {_numbers(row)}, beside {_numbers(other)} "
                f"(∝ L^{other.depth_exponent:.2f})",
            )
    elif scaled:
        words = ", ".join(f"{r.role} ∝ L^{r.depth_exponent:.2f}" for r in {r.role: r for r in scaled}.values())
        yield Sentence(False, f"the output matrices are drawn smaller with depth: {words}")
    else:
        names = " nor ".join(dict.fromkeys(r.role for r in plain))
        yield Sentence(
            False, f"{'neither ' if ' nor ' in names else 'no '}{names} is depth-scaled: {_numbers(plain[0])}"
        )


def _swapped(found: Audit) -> Iterator[Sentence]:
    """A depth-scaled input matrix, in a sublayer whose output matrix is not depth-scaled."""
    if isinstance(found.init, str):
        return
    rows = {r.role: r for r in reversed(found.init) if len(r.shape) > 1 and r.depth_exponent is not None}
    for reads, writes in (("attention-in", "attention-out"), ("FFN-in", "FFN-down"), ("mixer-in", "mixer-out")):
        a, b = rows.get(reads), rows.get(writes)
        if a and b and a.depth_exponent and a.depth_exponent < 0 and not b.depth_exponent:
            yield Sentence(
                True,
                f"{reads} is depth-scaled and {writes} is not, where it is the output that adds up: {a.name} "
                f"{_numbers(a)} (∝ L^{a.depth_exponent:.2f}), {b.name} {_numbers(b)}",
            )


def _zeros(found: Audit) -> Iterator[Sentence]:
    if isinstance(found.init, str):
        return
    for row in found.init:
        if len(row.shape) < 2 or not row.constant or row.role in ("norm", "bias"):
            continue
        if row.role in ("attention-out", "mixer-out", "FFN-down") and row.mean == 0:
            yield Sentence(False, f"{row.name} starts at zero: its branch adds nothing at first")
        elif row.mean == 0 and (re.search(r"router|expert_gate", row.name) or row.shape[0] <= EXPERTS):
            yield Sentence(False, f"{row.name} starts at zero: what it chooses between starts equal")
        elif row.mean == 0 and row.role in ("attention-in", "FFN-in", "embedding", "head"):
            yield Sentence(True, f"{row.name} ({row.role}) starts at zero: what it projects is lost until it learns")
        elif row.mean == 0 and row.role != "other":
            yield Sentence(False, f"{row.name} ({row.role}) starts at zero")


def _drift(found: Audit) -> Iterator[Sentence]:
    for row in _outputs(found):
        if row.block_exponent is not None:
            yield Sentence(False, f"{row.name} changes from block to block: std ∝ (b+1)^{row.block_exponent:.2f}")


def _outlook(found: Audit) -> Iterator[Sentence]:
    o = found.outlook
    if o is None:
        return
    advice = f"; depth rule {o.advised} would keep it" if o.advised else ""
    if o.gradient_in_block_0 > 2:
        advice += f"; block 0 alone makes ×{o.gradient_in_block_0:.3g} of it, since the embedding is small"
    if o.growth is not None:
        advice += f"; the stream grows ×{o.growth:.3g}"
    yield Sentence(
        "explodes" in o.words or "decays" in o.words.partition(";")[0],
        f"theory of {o.placement} at {o.depth} blocks and this init: {o.words}{advice}",
    )


def _epsilons(found: Audit) -> Iterator[Sentence]:
    block = {n for b in found.main.blocks for n in b.norms}
    from spannorm.auditing.draws import pattern

    names = {pattern(n) for n in block} | (
        {pattern(found.main.ends.final_norm)} if found.main.ends.final_norm else set()
    )
    values = {n.name: n.epsilon for n in found.norms if n.name in names and n.epsilon is not None and n.kind != "L2"}
    different = sorted(set(values.values()))
    if len(different) > 1 and different[-1] > 1.5 * max(different[0], 1e-12):
        words = ", ".join(f"{name} {value:.1g}" for name, value in values.items())
        yield Sentence(True, f"the norms of one stack have different ε: {words}")


def _precision(found: Audit) -> Iterator[Sentence]:
    low = [n.name for n in found.norms if n.fp32 is False]
    if low:
        yield Sentence(False, f"statistics in bf16, not fp32, in a model in bf16: {', '.join(low[:4])}")


def _signal(found: Audit) -> Iterator[Sentence]:
    s = found.signal
    if s is None or len(s.signal_rms) < 2:
        return
    blocks = len(s.signal_rms) - 1
    ratio = "" if s.gradient_ratio is None else f", and the gradient reaches block 0 at ×{s.gradient_ratio:.3g}"
    small = "the small model" if found.shrunk else "this model"
    yield Sentence(False, f"measured in {small}, {blocks} blocks: the stream grows ×{s.growth:.3g}{ratio}")


def _embedding(found: Audit) -> Iterator[Sentence]:
    ends = found.main.ends
    if ends.tied is not None:
        words = "embedding and head are one matrix" if ends.tied else "embedding and head are two matrices"
        factor = f"; the embedding is multiplied by {ends.embedding_factor:.4g}" if ends.embedding_factor != 1 else ""
        yield Sentence(False, words + factor)
