"""The placements' equations, written from the papers with torch alone, without the package.

A reference reads a `Case`: the sublayers `A` and `F`, the norm `N(x, name)`, the branch factors `ca` and `cf`, the
block index `b` and the depth `L`, and where it needs them learned tensors `leaf(name, *shape)`, the `width` and the
norms' `eps`. It returns what the block hands on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

F64, EPS, WIDTH = torch.float64, 1e-3, 8


def own_parameters(placement: nn.Module) -> dict[str, nn.Parameter]:
    """A placement's parameters by the names that its equation has for them."""
    return {name.removeprefix("gains_norm.").removeprefix("matrices."): p for name, p in placement.named_parameters()}


class Case:
    """One block's norms, gains and sublayers as plain tensors with gradients, made when they are first asked for."""

    width, eps = WIDTH, EPS

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
            scale = 0.3 if name.endswith(("_mix", "_write")) else 1.0  # four streams add up
            self.leaves[name] = (scale * torch.randn(shape, dtype=F64)).requires_grad_()
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
        names = ("skip_gain", "skip_shift", "branch_gain", "branch_shift")
        a, b, c, e = (k.leaf(f"{site}_{name}", k.width) for name in names)
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


def mixed_input(k: Case, state: Tensor) -> Tensor:
    x, x_0 = (state, state) if k.b == 0 else (state[..., 0, :], state[..., 1, :])
    h = k.leaf("stream_lambda", 1) * x + k.leaf("input_lambda", 1) * x_0
    h = k.sum("attn", h, k.ca * k.A(k.N(h, "attn_norm")))
    h = k.sum("ffn", h, k.cf * k.F(k.N(h, "ffn_norm")))
    return h if k.b == k.L - 1 else torch.stack((h, x_0), dim=2)


def streams_of(k: Case, state: Tensor, n: int) -> list[Tensor]:
    return [state] * n if k.b == 0 else [state[..., i, :] for i in range(n)]


def into_streams(k: Case, site: str, R: list[Tensor], write: list[Any], o: Tensor) -> list[Tensor]:
    added = torch.stack([w * o for w in write], dim=2)
    return [k.sum(site, torch.stack(R, dim=2), added)[..., i, :] for i in range(len(R))]


def hc(k: Case, state: Tensor) -> Tensor:
    n, R = 4, streams_of(k, state, 4)
    for site, f, c in (("attn", k.A, k.ca), ("ffn", k.F, k.cf)):
        read, write, mix = k.leaf(f"{site}_read", n), k.leaf(f"{site}_write", n), k.leaf(f"{site}_mix", n, n)
        s, w = k.leaf(f"{site}_dynamic_scale", 2), k.leaf(f"{site}_dynamic", n + 2, k.width)
        t = torch.tanh(k.N(torch.stack(R, dim=2), f"{site}_stream_norm") @ w.T).unbind(2)
        u = sum((read[i] + s[0] * t[i][..., 1:2]) * R[i] for i in range(n))
        skip = [sum((mix[i, j] + s[0] * t[i][..., 2 + j, None]) * R[i] for i in range(n)) for j in range(n)]
        write = [write[j] + s[1] * t[j][..., 0:1] for j in range(n)]
        R = into_streams(k, site, skip, write, c * f(k.N(u, f"{site}_norm")))
    return sum(R) if k.b == k.L - 1 else torch.stack(R, dim=2)


def mhc_logits(k: Case, R: list[Tensor], site: str, sizes: list[int]) -> list[Tensor]:
    n = len(R)
    flat = torch.cat(R, dim=-1)
    flat = flat / torch.sqrt((flat * flat).mean(-1, keepdim=True) + k.eps)
    logits = flat @ k.leaf(f"{site}_weights", sum(sizes), n * k.width).T
    gates, base = k.leaf(f"{site}_gates", len(sizes)), k.leaf(f"{site}_base", sum(sizes))
    return [g * y + b for g, y, b in zip(gates, logits.split(sizes, -1), base.split(sizes), strict=True)]


def mhc(k: Case, state: Tensor) -> Tensor:
    n, R, eps = 4, streams_of(k, state, 4), 1e-6
    for site, f, c in (("attn", k.A, k.ca), ("ffn", k.F, k.cf)):
        pre, post, comb = mhc_logits(k, R, site, [n, n, n * n])
        comb = comb.view(*comb.shape[:2], n, n).exp()
        comb = comb / comb.sum(-1, keepdim=True) + eps
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
        for _ in range(19):
            comb = comb / (comb.sum(-1, keepdim=True) + eps)
            comb = comb / (comb.sum(-2, keepdim=True) + eps)
        u = sum((1 / (1 + torch.exp(-pre[..., i, None])) + eps) * R[i] for i in range(n))
        skip = [sum(comb[..., i, j, None] * R[i] for i in range(n)) for j in range(n)]
        write = [2 / (1 + torch.exp(-post[..., j, None])) for j in range(n)]
        R = into_streams(k, site, skip, write, c * f(k.N(u, f"{site}_norm")))
    state = torch.stack(R, dim=2)
    return mhc_readout(k, state) if k.b == k.L - 1 else state


def mhc_readout(k: Case, state: Tensor) -> Tensor:
    n = state.shape[2]
    (pre,) = mhc_logits(k, [state[..., i, :] for i in range(n)], "readout", [n])
    return sum((1 / (1 + torch.exp(-pre[..., i, None])) + 1e-6) * state[..., i, :] for i in range(n))


def gated_read(k: Case, R: list[Tensor], site: str) -> tuple[Tensor, Tensor]:
    n, r = len(R), k.width // 8
    normed = [k.N(x, f"{site}_{i}_norm") for i, x in enumerate(R)]
    flat = torch.cat(normed, dim=-1)
    inside = flat @ k.leaf(f"{site}_down", r, n * k.width).T / n
    gates = torch.sigmoid(inside * torch.sigmoid(inside) @ k.leaf(f"{site}_up", n * k.width, r).T)
    return sum(gates[..., i * k.width : (i + 1) * k.width] * x for i, x in enumerate(normed)) / n, flat


def gated(k: Case, state: Tensor) -> Tensor:
    n, R = 4, streams_of(k, state, 4)
    for site, f, c in (("attn", k.A, k.ca), ("ffn", k.F, k.cf)):
        u, flat = gated_read(k, R, site)
        w = 2 * torch.sigmoid(flat @ k.leaf(f"{site}_write", n, n * k.width).T / n)
        R = into_streams(k, site, R, [w[..., i, None] for i in range(n)], c * f(u))
    state = torch.stack(R, dim=2)
    return gated_readout(k, state) if k.b == k.L - 1 else state


def gated_readout(k: Case, state: Tensor) -> Tensor:
    return gated_read(k, [state[..., i, :] for i in range(state.shape[2])], "readout")[0]


def attended(k: Case, sources: list[Tensor], site: str, form: str = "paper") -> Tensor:
    q = k.leaf(f"{site}_query", k.width)
    unit = [v / torch.sqrt((v * v).mean(-1, keepdim=True) + k.eps) for v in sources]
    logits = [(u @ q)[..., None] / (math.sqrt(k.width) if form == "inkling" else 1) for u in unit]
    total = sum(y.exp() for y in logits)
    return sum(y.exp() / total * v for y, v in zip(logits, unit if form == "inkling" else sources, strict=True))


def sources_of(k: Case, state: Tensor) -> list[Tensor]:
    return [state] if k.b == 0 else [state[..., i, :] for i in range(state.shape[2])]


def attnres(k: Case, state: Tensor) -> Tensor:
    v = sources_of(k, state)
    v.append(k.ca * k.A(k.N(attended(k, v, "attn") if k.b else v[0], "attn_norm")))
    v.append(k.cf * k.F(k.N(attended(k, v, "ffn"), "ffn_norm")))
    return attended(k, v, "readout") if k.b == k.L - 1 else torch.stack(v, dim=2)


def attnres_block(k: Case, state: Tensor, groups: int = 8, form: str = "paper") -> Tensor:
    v = sources_of(k, state)
    f = k.ca * k.A(k.N(attended(k, v, "attn", form) if k.b else v[0], "attn_norm"))
    if k.b % math.ceil(k.L / groups) == 0:
        v.append(f)
    else:
        v[-1] = k.sum("attn", v[-1], f)
    v[-1] = k.sum("ffn", v[-1], k.cf * k.F(k.N(attended(k, v, "ffn", form), "ffn_norm")))
    return attended(k, v, "readout", form) if k.b == k.L - 1 else torch.stack(v, dim=2)


def sources_readout(k: Case, state: Tensor) -> Tensor:
    return attended(k, [state[..., i, :] for i in range(state.shape[2])], "readout")
