"""The placements' equations, written from the papers with torch alone, without the package.

A reference reads a `Case`: the sublayers `A` and `F`, the norm `N(x, name)`, the branch factors `ca` and `cf`, the
block index `b` and the depth `L`. It returns what the block hands on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

F64, EPS, WIDTH = torch.float64, 1e-3, 8


class Case:
    """One block's norms, gains and sublayers as plain tensors with gradients, made when they are first asked for."""

    def __init__(self, norm: str, b: int, L: int, factors: tuple[float, float] | str) -> None:
        self.norm, self.b, self.L = norm, b, L
        self.leaves: dict[str, Tensor] = {}
        self.ca: float | Tensor
        self.cf: float | Tensor
        if isinstance(factors, str):
            shape = (1,) if factors == "scalar" else (WIDTH,)
            self.ca, self.cf = self.leaf("attn_scale", *shape), self.leaf("ffn_scale", *shape)
        else:
            self.ca, self.cf = factors

    def leaf(self, name: str, *shape: int) -> Tensor:
        if name not in self.leaves:
            self.leaves[name] = torch.randn(shape, dtype=F64, requires_grad=True)
        return self.leaves[name]

    def A(self, x: Tensor) -> Tensor:
        return self.leaf("mix", 3, 3) @ torch.tanh(x @ self.leaf("proj", WIDTH, WIDTH))

    def F(self, x: Tensor) -> Tensor:
        u = x @ self.leaf("up", WIDTH, 12)
        return (u * torch.sigmoid(u)) @ self.leaf("down", 12, WIDTH)

    def N(self, x: Tensor, name: str) -> Tensor:
        weight = self.leaf(f"{name}.weight", WIDTH)
        if self.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        unit = x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
        return weight * unit + (self.leaf(f"{name}.bias", WIDTH) if self.norm == "layernorm" else 0.0)

    def sum(self, which: str, skip: Tensor, f: Tensor) -> Tensor:
        """A branch added to its skip."""
        return skip + f


def pre(k: Case, x: Tensor) -> Tensor:
    h = x + k.ca * k.A(k.N(x, "attn_norm"))
    return h + k.cf * k.F(k.N(h, "ffn_norm"))


def post(k: Case, x: Tensor) -> Tensor:
    h = k.N(x + k.ca * k.A(x), "attn_norm")
    return k.N(h + k.cf * k.F(h), "ffn_norm")


def span(k: Case, x: Tensor) -> Tensor:
    read = k.N(x, "initial_norm") if k.b == 0 else x
    h = k.N(x + k.ca * k.A(read), "attn_norm")
    return k.N(x + k.cf * k.F(h), "ffn_norm")


def b2t(k: Case, x: Tensor) -> Tensor:
    h = k.N(x + k.ca * k.A(x), "attn_norm")
    return k.N(x + h + k.cf * k.F(h), "ffn_norm")


def deepnorm(k: Case, x: Tensor) -> Tensor:
    alpha = math.sqrt(math.sqrt(2 * k.L))
    h = k.N(alpha * x + k.ca * k.A(x), "attn_norm")
    return k.N(alpha * h + k.cf * k.F(h), "ffn_norm")


def peri(k: Case, x: Tensor) -> Tensor:
    h = x + k.ca * k.N(k.A(k.N(x, "attn_norm")), "attn_output_norm")
    return h + k.cf * k.N(k.F(k.N(h, "ffn_norm")), "ffn_output_norm")


def olmo2(k: Case, x: Tensor) -> Tensor:
    h = x + k.ca * k.N(k.A(x), "attn_norm")
    return h + k.cf * k.N(k.F(h), "ffn_norm")


def hybrid(k: Case, x: Tensor) -> Tensor:
    h = x + k.ca * k.A(x)
    return k.N(h, "ffn_norm") + k.cf * k.F(k.N(h, "ffn_norm"))


def hybrid_star(k: Case, x: Tensor) -> Tensor:
    return pre(k, x) if k.b == 0 else hybrid(k, x)


def mix(k: Case, x: Tensor) -> Tensor:
    return post(k, x) if k.b < math.floor(k.L / 4) else pre(k, x)


def lns(k: Case, x: Tensor) -> Tensor:
    root = math.sqrt(k.b + 1)
    h = x + k.ca * k.A(k.N(x, "attn_norm") / root)
    return h + k.cf * k.F(k.N(h, "ffn_norm") / root)


def normformer(k: Case, x: Tensor) -> Tensor:
    h = x + k.ca * k.N(k.A(k.N(x, "attn_norm")), "attn_output_norm")
    return h + k.cf * k.F(k.N(h, "ffn_norm"))


def keel(k: Case, x: Tensor) -> Tensor:
    alpha = 1 if k.b == 0 else 2 * k.L
    h = alpha * x + k.ca * k.A(k.N(x, "attn_norm"))
    h = h if k.b == 0 else k.N(h, "attn_outer_norm")
    return k.N(alpha * h + k.cf * k.F(k.N(h, "ffn_norm")), "ffn_outer_norm")


def gpas(k: Case, x: Tensor) -> Tensor:
    def s(y: Tensor, gate: Tensor) -> Tensor:
        return y - gate * torch.sigmoid(gate) * y.detach()

    h = s(k.sum("attn", x, k.ca * k.A(k.N(x, "attn_norm"))), k.leaf("attn_gate", 1))
    return s(k.sum("ffn", h, k.cf * k.F(k.N(h, "ffn_norm"))), k.leaf("ffn_gate", 1))


def parallel(k: Case, x: Tensor) -> Tensor:
    n = k.N(x, "attn_norm")
    return x + k.ca * k.A(n) + k.cf * k.F(n)


def averaged(k: Case, x: Tensor) -> Tensor:
    i = 2 * (k.b + 1)
    f = k.ca * k.N(k.A(k.N(x, "attn_norm")), "attn_output_norm")
    h = math.sqrt((i - 1) / i) * x + f / math.sqrt(i)
    f = k.cf * k.N(k.F(k.N(h, "ffn_norm")), "ffn_output_norm")
    return math.sqrt(i / (i + 1)) * h + f / math.sqrt(i + 1)


def channel(k: Case, x: Tensor) -> Tensor:
    def added(x: Tensor, f: Tensor, site: str) -> Tensor:
        a, b, c, e = (k.leaf(f"{site}_{n}", WIDTH) for n in ("skip_gain", "skip_shift", "branch_gain", "branch_shift"))
        return k.sum(site, a * (x + b), c * (f + e))

    h = added(x, k.ca * k.A(k.N(x, "attn_norm")), "attn")
    return added(h, k.cf * k.F(k.N(h, "ffn_norm")), "ffn")


def residual(k: Case, state: Tensor) -> Tensor:
    x, d = (state, state) if k.b == 0 else (state[..., 0, :], state[..., 1, :])
    f = k.ca * k.A(x)
    d, x = d + f, k.N(x + f, "attn_norm")
    f = k.cf * k.F(x)
    d, x = d + f, k.N(x + f, "ffn_norm")
    state = torch.stack((x, d), dim=2)
    return read_out(k, state) if k.b == k.L - 1 else state


def siamese(k: Case, state: Tensor) -> Tensor:
    X, Y = (state, state) if k.b == 0 else (state[..., 0, :], state[..., 1, :])
    o = k.ca * k.A(k.N(X + k.N(Y, "attn_y_norm"), "attn_norm"))
    X, Y = k.N(X + o / math.sqrt(2 * k.b + 1), "attn_x_norm"), Y + o
    o = k.cf * k.F(k.N(X + k.N(Y, "ffn_y_norm"), "ffn_norm"))
    X, Y = k.N(X + o / math.sqrt(2 * k.b + 2), "ffn_x_norm"), Y + o
    state = torch.stack((X, Y), dim=2)
    return read_out(k, state) if k.b == k.L - 1 else state


def read_out(k: Case, state: Tensor) -> Tensor:
    return state[..., 0, :] + k.N(state[..., 1, :], "readout_norm")
