"""One block of the mean-field recursion: fields, sums and norms forward, gradients backward.

A field is a linear combination of *leaves*: the streams that enter the block and the branch outputs, which are
independent of all before them because their weights are fresh. A norm divides by the std by position. So any
covariance, and any gradient, follows from the leaves'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from spannorm.scaling import DepthRule
from spannorm.theory.body import Attention, Body, FeedForward
from spannorm.theory.kernel import Array, Kernel
from spannorm.theory.mixture import Mixture

Field = dict[int, Array]
"""Leaf → its coefficient by position."""
Kernels = dict[tuple[int, int], Kernel]
"""Covariance of each pair of leaves, streams or gradients; an absent pair is uncorrelated."""
Branch = Literal["attn", "ffn"]
Sublayer = Attention | FeedForward | Mixture


def cross(a: Array, b: Array) -> Kernel:
    """`a_t b_s` in a kernel's shape."""
    return np.concatenate([(a * b)[None], np.outer(a, b)])


@dataclass
class Block:
    """The block's program as it is written by a placement's recursion, and what it found on the way."""

    body: Body
    rule: DepthRule
    layer_idx: int
    num_layers: int
    streams: Kernels
    """Kernels of the entering streams, leaves 0, 1, …"""
    inner_norms: Mapping[str, str] = field(default_factory=dict)
    sites: dict[str, float] = field(default_factory=dict)
    """Variance, mean over tokens, of what each norm reads."""
    branches: list[tuple[Branch, Sublayer, Field]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.leaves = dict(self.streams)
        self.first_branch = 1 + max(i for i, _ in self.streams)
        self.outputs: list[Field] = []
        gain = self.rule.gain if self.rule.learned else None
        self.attn_scale = self.rule.attn_forward if gain is None else gain
        self.ffn_scale = self.rule.ffn_forward if gain is None else gain

    @property
    def is_first(self) -> bool:
        return self.layer_idx == 0

    @property
    def is_last(self) -> bool:
        return self.layer_idx == self.num_layers - 1

    def stream(self, index: int = 0) -> Field:
        return {index: np.ones(self.body.positions.size)}

    def scaled(self, a: Field, factor: float) -> Field:
        return {leaf: factor * c for leaf, c in a.items()}

    def add(self, a: Field, b: Field, *, skip: float = 1.0, branch: float = 1.0) -> Field:
        """`skip·a + branch·b`."""
        total = self.scaled(a, skip)
        for leaf, c in b.items():
            total[leaf] = total.get(leaf, 0.0) + branch * c
        return total

    def covariance(self, a: Field, b: Field) -> Kernel:
        total = np.zeros((self.body.positions.size + 1, self.body.positions.size))
        for i, ci in a.items():
            for j, cj in b.items():
                if (i, j) in self.leaves:
                    total += cross(ci, cj) * self.leaves[i, j]
        return total

    def norm(self, name: str, a: Field) -> Field:
        """`N(a)`; its site's variance is noted under the norm's name."""
        variance = self.covariance(a, a)[0]
        self.sites[name] = self.body.positions.mean(variance)
        std = np.sqrt(variance + self.body.eps)
        return {leaf: c / std for leaf, c in a.items()}

    def attn(self, n: Field) -> Field:
        """`A(n)`."""
        return self._branch("attn", n)

    def ffn(self, n: Field) -> Field:
        """`F(n)`."""
        return self._branch("ffn", n)

    def _branch(self, kind: Branch, n: Field) -> Field:
        common = self.body, self.rule, self.inner_norms, self.covariance(n, n)
        sublayer: Sublayer
        if kind == "attn":
            sublayer = Attention(*common)
        elif self.body.is_sparse(self.layer_idx):
            sublayer = Mixture(*common)
        else:
            sublayer = FeedForward(*common, self.body.intermediate_size)
        leaf = self.first_branch + len(self.branches)
        self.branches.append((kind, sublayer, n))
        self.leaves[leaf, leaf] = sublayer.writes
        return self.stream(leaf)

    def leave(self, *outputs: Field) -> Kernels:
        """End the program with the streams that leave the block; their kernels."""
        self.outputs = list(outputs)
        if len(outputs) == 1:
            self.sites["output"] = self.body.positions.mean(self.covariance(outputs[0], outputs[0])[0])
        return {(i, j): self.covariance(a, b) for i, a in enumerate(outputs) for j, b in enumerate(outputs)}

    def backward(self, gradients: Kernels, without: tuple[Branch, ...] = ()) -> Kernels:
        """Kernels of the gradient at the entering streams, from those at the leaving ones.

        Args:
            without: branches whose output is detached: no gradient passes them.
        """
        arriving: list[tuple[Field, Field, Kernel]] = [
            (self.outputs[i], self.outputs[j], g) for (i, j), g in gradients.items()
        ]

        def at(i: int, j: int) -> Kernel | None:
            parts = [cross(a[i], b[j]) * g for a, b, g in arriving if i in a and j in b]
            return np.sum(parts, axis=0) if parts else None

        for index in reversed(range(len(self.branches))):
            kind, sublayer, n = self.branches[index]
            leaf = self.first_branch + index
            g = at(leaf, leaf)
            if g is not None and kind not in without:
                arriving.append((n, n, sublayer.backward(g)))
        found = {(i, j): at(i, j) for i, j in self.streams}
        return {pair: k for pair, k in found.items() if k is not None}
