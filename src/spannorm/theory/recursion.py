"""One block of the mean-field recursion: fields run through the placement's own equation, gradients run back.

A norm divides by the std at each position. The branches' outputs are new leaves. So every covariance, and every
gradient, follows from those of the leaves (field.py).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spannorm.norms import DyT, Norm, scaled_add
from spannorm.placements import Placement, Stack
from spannorm.scaling import Branch
from spannorm.theory.body import Attention, Body, FeedForward, Squash
from spannorm.theory.covariance import Array, Covariance, cross
from spannorm.theory.field import Field, NoRule
from spannorm.theory.mixture import Mixture

Covariances = dict[tuple[int, int], Covariance]
"""Covariance of each pair of leaves, streams or gradients. A pair that is missing is uncorrelated."""
Sublayer = Attention | FeedForward | Mixture | Squash
Coefficients = dict[int, Array]
"""One field: leaf → its coefficient by position."""


class _Norm(Norm):
    """A placement's norm, on fields."""

    name: str
    walk: Walk

    def add_norm(self, x: Any, f: Any, *, return_sum: bool, **scales: Any) -> Any:
        total = x if f is None else scaled_add(x, f, **scales)
        normed = self.walk.normalized(self.name, total) * self.weight
        return (normed, total) if return_sum else normed


class _Squash(_Norm):
    """DyT on fields: its output is a new leaf. This is possible because only a sublayer reads it."""

    def add_norm(self, x: Any, f: Any, *, return_sum: bool, **scales: Any) -> Any:
        total = x if f is None else scaled_add(x, f, **scales)
        if total.ndim == 4:
            raise NoRule("the theory has no rule for DyT over several streams")
        squashed = self.walk.squashed(self.name, total, self)
        return (squashed, total) if return_sum else squashed


class Walk:
    """One block: the constructor follows the signal forward, `backward` follows a gradient back.

    Args:
        streams: covariances of the entering streams, leaves 0, 1, …

    Raises:
        NoRule: an operation of the placement that a field cannot go through.
    """

    def __init__(self, body: Body, stack: Stack, layer_idx: int, streams: Covariances) -> None:
        self.body, self.layer_idx, self.streams, self.leaves = body, layer_idx, streams, dict(streams)
        self.first_branch = 1 + max(i for i, _ in streams)
        self.sites: dict[str, float] = {}
        """Mean variance over tokens of each norm's input, and of the block's output (`output`) if it is one stream."""
        self.branches: list[tuple[str, Sublayer, Coefficients]] = []
        """The origin of each new leaf, in order: attn, ffn, or a DyT norm; and its input's gradient coefficients."""
        if body.norm == "dyt" and body.qk_norm:
            raise NoRule("the theory has no rule for DyT on queries and keys")
        with torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about rules that the authors of a placement discourage
            self.placement: Placement = stack.block(layer_idx, hidden_size=1)
        self.placement.double()
        for name in self.placement.norms():
            norm: Any = self.placement.get_submodule(name)
            norm.__class__, norm.name, norm.walk = _Squash if isinstance(norm, DyT) else _Norm, name, self
        self.placement.unit = self._unit  # type: ignore[method-assign]
        with torch.no_grad():
            enters = [self._leaf(i) for i in range(self.first_branch)]
            opened = layer_idx > 0 and self.placement.enter(enters[0]).ndim == 4  # block 0 creates the streams itself
            x = torch.stack(enters, dim=-2) if opened else enters[0]
            try:
                left: Any = self.placement(x, lambda n: self._branch("attn", n), lambda n: self._branch("ffn", n))
            except NoRule as error:
                raise NoRule(f"placement {stack.placement!r}: {error}.") from None
            streams_out = left.unbind(-2) if left.ndim == 4 else (left,)
        self.outputs = [_parts(f)[1] for f in streams_out]
        values = [_parts(f)[0] for f in streams_out]
        self.leaving = {
            (i, j): self.covariance(a, b)
            for i, a in enumerate(values)
            for j, b in enumerate(values)
            if i == j or any((k, m) in self.leaves for k in a for m in b)
        }
        if len(values) == 1:
            self.sites["output"] = body.positions.mean(self.leaving[0, 0][0])

    def _leaf(self, index: int) -> Any:
        leaves = self.first_branch + 2 + (self.body.norm == "dyt") * len(self.placement.norms())
        coefficients = torch.zeros(2, leaves, self.body.positions.size, 1, dtype=torch.float64)
        coefficients[:, index] = 1.0
        return coefficients.flatten(0, 1).as_subclass(Field)

    def covariance(self, a: Coefficients, b: Coefficients) -> Covariance:
        """The covariance of two fields."""
        total = np.zeros((self.body.positions.size + 1, self.body.positions.size))
        for i, ci in a.items():
            for j, cj in b.items():
                if (i, j) in self.leaves:
                    total += cross(ci, cj) * self.leaves[i, j]
        return total

    def normalized(self, name: str, x: Any) -> Any:
        """A field, or each of several streams, divided by its std. The variance is recorded under the norm's name."""
        streams = x.unbind(-2) if x.ndim == 4 else (x,)
        variances = [self.covariance(v, v)[0] for v in (_parts(f)[0] for f in streams)]
        self.sites[name] = float(np.mean([self.body.positions.mean(v) for v in variances]))
        normed = [self._divided(f, v) for f, v in zip(streams, variances, strict=True)]
        return torch.stack(normed, dim=-2) if x.ndim == 4 else normed[0]

    def squashed(self, name: str, x: Any, norm: Any) -> Any:
        """A field through DyT. The variance of its input is recorded under the norm's name."""
        value, slope = _parts(x)
        covariance = self.covariance(value, value)
        self.sites[name] = self.body.positions.mean(covariance[0])
        return self._opened(name, Squash(norm, covariance), slope)

    def _opened(self, kind: str, source: Sublayer, slope: Coefficients) -> Any:
        """A new leaf."""
        leaf = self.first_branch + len(self.branches)
        self.branches.append((kind, source, slope))
        self.leaves[leaf, leaf] = source.writes
        return self._leaf(leaf)

    def _unit(self, x: Any, dims: int = 1) -> Any:
        """Each of several streams divided by its RMS, or by the RMS of all streams (`dims` = 2)."""
        streams = x.unbind(-2)
        powers = [self.covariance(v, v)[0] for v in (_parts(f)[0] for f in streams)]
        powers = powers if dims == 1 else [np.mean(powers, axis=0)] * len(powers)
        return torch.stack([self._divided(f, power) for f, power in zip(streams, powers, strict=True)], dim=-2)

    def _divided(self, x: Any, power: Array) -> Any:
        std = torch.from_numpy(np.sqrt(power + self.body.eps))[:, None]
        return (x.as_subclass(Tensor) / std).as_subclass(Field)

    def _branch(self, kind: Branch, n: Any) -> Any:
        if any(kind == earlier for earlier, *_ in self.branches):
            raise NoRule(f"the theory knows one call of each sublayer, and {kind} is called twice")
        value, slope = _parts(n)
        common = self.body, self.placement.rule, self.placement.inner_norms, self.covariance(value, value)
        sublayer: Sublayer
        if kind == "attn":
            sublayer = Attention(*common)
        elif self.body.is_sparse(self.layer_idx):
            sublayer = Mixture(*common)
        else:
            sublayer = FeedForward(*common, self.body.intermediate_size)
        return self._opened(kind, sublayer, slope)

    def backward(self, gradients: Covariances, without: tuple[Branch, ...] = ()) -> Covariances:
        """Covariances of the gradient at the entering streams, from those at the leaving ones.

        Args:
            without: branches whose output is detached, so that no gradient passes through them.
        """
        found: Covariances = {}

        def arrive(a: Coefficients, b: Coefficients, g: Covariance) -> None:
            for i, ai in a.items():
                for j, bj in b.items():
                    part = cross(ai, bj) * g
                    found[i, j] = found[i, j] + part if (i, j) in found else part

        for (i, j), g in gradients.items():
            arrive(self.outputs[i], self.outputs[j], g)
        for index in reversed(range(len(self.branches))):
            kind, sublayer, n = self.branches[index]
            leaf = self.first_branch + index
            if (leaf, leaf) in found and kind not in without:
                arrive(n, n, sublayer.backward(found[leaf, leaf]))
        return {(i, j): k for (i, j), k in found.items() if max(i, j) < self.first_branch}


def _parts(f: Any) -> list[Coefficients]:
    """The coefficients of a field's value, and those of its gradient."""
    coefficients = f.as_subclass(Tensor).numpy()
    halves = coefficients.reshape(2, -1, coefficients.shape[1])
    used = halves.any(axis=2).tolist()
    return [{i: c for i, c in enumerate(half) if here[i]} for half, here in zip(halves, used, strict=True)]
