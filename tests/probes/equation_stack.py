"""A stack of placements, and the same stack as plain equations whose insides can be read and changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from equations import own_parameters
from facts import EPS, EQUATIONS, FACTS, WIDTH, Case
from torch import Tensor, nn

from spannorm.placements import build_placement

DEPTH, BATCH, LENGTH = 4, 2, 3
FACTORS: dict[str, Any] = {"1/sqrt(L):forward": (0.5, 0.5), "layerscale": "vector"}
"""What a depth rule multiplies the branches with at four blocks; `default` here multiplies with nothing."""
RULES = ("default", *FACTORS)

Change = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """A placement around two sublayers that are not modules."""

    def __init__(self, placement: nn.Module, attn: Change, ffn: Change) -> None:
        super().__init__()
        self.placement, self.sublayers = placement, (attn, ffn)

    def forward(self, x: Tensor) -> Tensor:
        return self.placement(x, *self.sublayers)


class OpenCase(Case):
    """A case that remembers what its norms read and its branches return, and whose branches can be changed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.change: dict[str, Change] = {}
        self.reads: dict[str, Tensor] = {}
        self.returns: dict[str, Tensor] = {}
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def sum(self, which: str, skip: Tensor, f: Tensor) -> Tensor:
        self.sums[which] = skip, f
        return super().sum(which, skip, f)

    def A(self, x: Tensor) -> Tensor:
        self.returns["attn"] = super().A(x)
        return self.change.get("attn", lambda f: f)(self.returns["attn"])

    def F(self, x: Tensor) -> Tensor:
        self.returns["ffn"] = super().F(x)
        return self.change.get("ffn", lambda f: f)(self.returns["ffn"])

    def N(self, x: Tensor, name: str) -> Tensor:
        self.reads[name] = x
        return super().N(x, name)


class EquationStack:
    """The model under test, and its equations with the same weights."""

    def __init__(self, name: str, rule: str = "default", norm: str = "rmsnorm", depth: int = DEPTH) -> None:
        self.name, self.depth = name, depth
        self.cases = [OpenCase(norm, b, depth, FACTORS.get(rule, (1.0, 1.0))) for b in range(depth)]
        self.blocks = nn.Sequential(*(self._block(case, None if rule == "default" else rule) for case in self.cases))
        self.x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
        self.target = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)

    def _block(self, case: OpenCase, rule: str | None) -> Block:
        sizes = {"hidden_size": WIDTH, "layer_idx": case.b, "num_layers": case.L}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            placement = build_placement(self.name, **sizes, depth_rule=rule, norm=case.norm, eps=EPS).double()
        with torch.no_grad():
            for name, parameter in own_parameters(placement).items():
                parameter.copy_(case.leaf(name, *parameter.shape))
        return Block(placement, Case.A.__get__(case), Case.F.__get__(case))

    def loss_at(self, y: Tensor) -> Tensor:
        return (y * self.target).sum(-1).asinh().mean()  # unlike tanh it never goes flat

    def loss(self) -> Tensor:
        """Through the model."""
        return self.loss_at(self.blocks(self.x))

    def equation(self, b: int, x: Tensor, **change: Change) -> Tensor:
        """Block b by its equation, its branches changed."""
        self.cases[b].change = change
        return EQUATIONS[self.name](self.cases[b], x)

    def points(self, **change: Change) -> list[Tensor]:
        """The L+1 points of the stack by its equations."""
        points = [self.x]
        for b in range(self.depth):
            points.append(self.equation(b, points[-1], **change))
        return points

    def reaching(self, point: Tensor) -> Tensor:
        """What of a point reaches the readout."""
        return FACTS[self.name].readout(self.cases[-1], point) if point.ndim == 4 else point

    def gradients(self, points: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(self.loss_at(points[-1]), points))


def rms(x: Tensor) -> float:
    return math.sqrt(x.square().mean().item())


def summed(x: Tensor) -> Tensor:
    """Of several streams the sum."""
    return x.sum(-2) if x.ndim == 4 else x
