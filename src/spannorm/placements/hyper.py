"""Placements with n streams, (batch, seq, n, hidden). Learned weights say how they are read, written and mixed."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from spannorm.errors import InputError, unknown
from spannorm.kernels import doubly_stochastic
from spannorm.norms import Norm, Scale
from spannorm.placements.base import Layout, Placement, Projection, Sublayer
from spannorm.shapes import State, Stream


def check_streams(streams: int) -> None:
    if not (isinstance(streams, int) and streams >= 1):
        raise InputError(f"`streams` must be a whole number of at least 1; got {streams!r}.")


def copies(x: Stream, streams: int) -> State:
    """The streams all start as the embedding."""
    return x.unsqueeze(-2).expand(*x.shape[:-1], streams, x.shape[-1])


def mixed(weights: Tensor, x: Stream) -> State:
    """Σ_i weights_ij x_i for each j, weights (…, n, m). Computed in the stream's dtype, also under autocast."""
    with no_autocast(x):
        return torch.matmul(weights.to(x.dtype).mT, x)


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Within the block, what is computed from `x` is computed in its own dtype."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def exact(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()


class _Hyper(Placement):
    """Common part of hyper-connections: one matrix of weights says what a sublayer reads and how streams are mixed."""

    def enter(self, x: Stream) -> State:
        return copies(x, self.options["streams"])

    def read(self, x: State) -> Stream:
        return mixed(self._weights(x, "attn")[0], x)[..., 0, :]

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        x = self._sublayer(x, attn, "attn", self.attn_norm, self.attn_scale)
        return self._sublayer(x, ffn, "ffn", self.ffn_norm, self.ffn_scale)

    def _sublayer(self, x: Stream, f: Sublayer, site: str, norm: Norm, scale: Scale) -> Stream:
        weights, write = self._weights(x, site)
        y = mixed(weights, x)
        o = write.unsqueeze(-1).to(x.dtype) * f(norm(y[..., 0, :])).unsqueeze(-2)
        return self.add(y[..., 1:, :], o, branch=scale)

    @abstractmethod
    def _weights(self, x: State, site: str) -> tuple[Tensor, Tensor]:
        """(…, n, 1 + n): weights of the sublayer's input, then of the new streams; (…, n): weights of its output."""


@final
class HyperConnections(_Hyper):
    """PreNorm with n streams: each sublayer reads, writes and mixes them with learned weights.

        R (n streams) ─ Σ α_i R_i ─ N ─ f ─ ×β_j ─(+)─ R'
        └──────────────── mixed by A ─────────────┘

    Equation: per sublayer `o = c·f(N(Σ_i α_i R_i))`, `R'_j = Σ_i A_ij R_i + β_j o`; each of α, A, β is a static value
    plus `s·tanh(N(R_i)·w)` of its stream i; each has its own vectors w and a learned scalar s.
    Ends: n copies of the embedding enter; their sum leaves; a final norm.
    Init: in sublayer k α = e_(k mod n), A = 1, β = 1; w = 0, s = 0.01. So it starts as PreNorm on equal streams.
    Source: Hyper-Connections, arXiv 2409.19606.
    Our reading: as we remember the paper, it also multiplies the std of the output matrices by √n. We do not, so that
    it starts as the same function as PreNorm. N on the streams is the model's norm (in the paper: LayerNorm).

    Args:
        streams: n.
        dynamic: whether the weights depend on the streams. False: only the static α, A and β (the paper's static form).
    """

    default_depth_rule = "1/sqrt(2L)"
    final_norm = True

    @classmethod
    def layout(cls, num_layers: int, *, streams: int = 4, dynamic: bool = True) -> Layout:
        check_streams(streams)
        return Layout({0: cls}, embedding_norm=False)

    def norms(self) -> tuple[str, ...]:
        sites = ("attn_norm", "attn_stream_norm", "ffn_norm", "ffn_stream_norm")
        return sites if self.options["dynamic"] else sites[::2]

    def gains(self) -> dict[str, Tensor]:
        n, gains = self.options["streams"], {}
        for k, site in enumerate(("attn", "ffn"), start=2 * self.layer_idx):
            gains[f"{site}_read"] = F.one_hot(torch.tensor(k % n), n).float()
            gains[f"{site}_write"], gains[f"{site}_mix"] = torch.ones(n), torch.eye(n)
            if self.options["dynamic"]:
                gains[f"{site}_dynamic_scale"] = torch.full((2,), 0.01)
        return gains

    def projections(self) -> dict[str, Projection]:
        sites = ("attn", "ffn") if self.options["dynamic"] else ()
        return {f"{site}_dynamic": Projection(self.options["streams"] + 2, self.hidden_size, 0.0) for site in sites}

    def exit(self, x: Stream) -> State:
        return x.sum(-2)

    def _weights(self, x: State, site: str) -> tuple[Tensor, Tensor]:
        weights, write = (getattr(self, f"{site}_{name}") for name in ("mix", "write"))
        weights = torch.cat((getattr(self, f"{site}_read").unsqueeze(-1), weights), dim=-1)
        if self.options["dynamic"]:
            norm, w, s = (getattr(self, f"{site}_{name}") for name in ("stream_norm", "dynamic", "dynamic_scale"))
            found = torch.tanh(F.linear(norm(x), w))
            weights, write = weights + s[0] * found[..., 1:], write + s[1] * found[..., 0]
        return weights, write


@final
class ManifoldHyperConnections(_Hyper):
    """Hyper-connections with all weights computed from the streams and a doubly stochastic mixing matrix (mHC).

        R (n streams) ─ Σ pre_i R_i ─ N ─ f ─ ×post_j ─(+)─ R'        pre, post, comb of the n·d channels of a token
        └──────────────── mixed by comb ──────────────┘

    Equation: per sublayer, from W·unit(R), unit = RMS-normalized over all streams' channels, each `gate·logit + base`:
    `pre = σ(·) + ε`, `post = 2σ(·)`, `comb = Sinkhorn(softmax(·) + ε)` in 20 rounds; `o = c·f(N(Σ_i pre_i R_i))`,
    `R'_j = Σ_i comb_ij R_i + post_j o`.
    Ends: n copies of the embedding enter; `Σ_i (σ(gate·logit_i + base_i) + ε)·R_i` leaves; a final norm.
    Init: DeepSeek-V4's (W is drawn like other matrices, base 0, gates 1), or DepthBench's, which starts near PreNorm.
    Source: mHC, arXiv 2512.24880; Transformers' `deepseek_v4`. The second init: DepthBench, arXiv 2609.32534.
    Our reading: no depth rule; in the second init, the place of each bias.

    Args:
        streams: n.
        init: `deepseek`, or `prenorm`: W = 0, gates 0.01, biases ±8. Then in sublayer k pre is about e_(k mod n), comb
            is about 1, and post is 1.
    """

    final_norm = True
    norms_only_reads = True
    EPS, ROUNDS = 1e-6, 20

    @classmethod
    def layout(cls, num_layers: int, *, streams: int = 4, init: str = "deepseek") -> Layout:
        check_streams(streams)
        if init not in ("deepseek", "prenorm"):
            raise unknown("init", init, ["deepseek", "prenorm"])
        return Layout({0: cls}, embedding_norm=False)

    def _sites(self) -> dict[str, int]:
        """Where weights are computed, and how many kinds there: 3 (pre, post, comb), or 1 for the readout."""
        return {"attn": 3, "ffn": 3, **({"readout": 1} if self.is_last else {})}

    def gains(self) -> dict[str, Tensor]:
        n, near = self.options["streams"], self.options["init"] == "prenorm"
        gains = {}
        for k, (site, kinds) in enumerate(self._sites().items(), start=2 * self.layer_idx):
            base = torch.zeros(n if kinds == 1 else (2 + n) * n)
            if near and kinds == 3:
                read, comb = F.one_hot(torch.tensor(k % n), n), torch.eye(n).flatten()
                base = torch.cat((16.0 * read - 8.0, torch.zeros(n), 16.0 * comb - 8.0))
            gains[f"{site}_base"], gains[f"{site}_gates"] = base, torch.full((kinds,), 0.01 if near else 1.0)
        return gains

    def projections(self) -> dict[str, Projection]:
        n, scale = self.options["streams"], 0.0 if self.options["init"] == "prenorm" else 1.0
        sizes = {site: n if kinds == 1 else (2 + n) * n for site, kinds in self._sites().items()}
        return {f"{site}_weights": Projection(size, n * self.hidden_size, scale) for site, size in sizes.items()}

    def exit(self, x: Stream) -> State:
        weights = self._logits(x, "readout")[0].sigmoid() + self.EPS
        return mixed(weights.unsqueeze(-1), x)[..., 0, :].clone()  # FSDP2 does not accept a view as a module's output

    def _weights(self, x: State, site: str) -> tuple[Tensor, Tensor]:
        pre, post, comb = self._logits(x, site)
        n = self.options["streams"]
        comb = torch.softmax(comb.movedim(-1, 0).unflatten(0, (n, n)), dim=1) + self.EPS
        comb = doubly_stochastic(comb, self.ROUNDS, self.EPS).movedim((0, 1), (-2, -1))
        return torch.cat(((pre.sigmoid() + self.EPS).unsqueeze(-1), comb), dim=-1), 2.0 * post.sigmoid()

    def _logits(self, x: State, site: str) -> tuple[Tensor, ...]:
        """For each kind, (…, n) or (…, n²). At least fp32, also under autocast."""
        n = self.options["streams"]
        weights, base, gates = (getattr(self, f"{site}_{name}") for name in ("weights", "base", "gates"))
        flat, w = exact(self.unit(x, dims=2)), exact(weights).unflatten(-1, (n, self.hidden_size))
        sizes = [n, n, n * n][: len(gates)]
        with no_autocast(x):
            logits = torch.einsum("bsnd,knd->bsk", flat, w).split(sizes, dim=-1)
        return tuple(g * y + b for g, y, b in zip(gates, logits, base.split(sizes), strict=True))


@final
class GatedResidual(Placement):
    """n streams. Each sublayer reads them through a gate per channel, and writes to each with its own weight.

        R (n streams) ─ N ─ mean_i g_i⊙ ─ f ─ ×w_i ─(+)─ R'        g, w of the normed streams of a token
        └───────────────────────────────────────────┘

    Equation: per sublayer `R̂_i = N_i(R_i)`, `g = σ(W_up silu(W_down R̂ / n))`, `w = 2σ(W_in R̂ / n)`,
    `R'_i = R_i + w_i·c·f(mean_i g_i⊙R̂_i)`: the gated mean replaces the sublayer's norm.
    Ends: n copies of the embedding enter; one more gated mean leaves; it replaces the final norm.
    Init: gains 1; N(0, 0.02²).
    Source: arXiv 2608.30320; Transformers' `qwen4_exp`.
    Our reading: no depth rule. W_down has d/8 rows.

    Args:
        streams: n.
        rank: rows of W_down; None means an eighth of the hidden size.
    """

    final_norm = False

    @classmethod
    def layout(cls, num_layers: int, *, streams: int = 4, rank: int | None = None) -> Layout:
        check_streams(streams)
        if rank is not None and rank < 1:
            raise InputError(f"gated's `rank` must be at least 1; got {rank}. Leave it out for an eighth of the width.")
        return Layout({0: cls}, embedding_norm=False)

    def _sites(self) -> tuple[str, ...]:
        return ("attn", "ffn", "readout") if self.is_last else ("attn", "ffn")

    def norms(self) -> tuple[str, ...]:
        return tuple(f"{site}_{i}_norm" for site in self._sites() for i in range(self.options["streams"]))

    def projections(self) -> dict[str, Projection]:
        flat = self.options["streams"] * self.hidden_size
        rank = self.options["rank"] or max(1, self.hidden_size // 8)
        found = {}
        for site in self._sites():
            found[f"{site}_down"], found[f"{site}_up"] = Projection(rank, flat), Projection(flat, rank)
            if site != "readout":
                found[f"{site}_write"] = Projection(self.options["streams"], flat)
        return found

    def enter(self, x: Stream) -> State:
        return copies(x, self.options["streams"])

    def exit(self, x: Stream) -> State:
        return self._gated(self._normed(x, "readout"), "readout")

    def read(self, x: State) -> Stream:
        return self._gated(self._normed(x, "attn"), "attn")

    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> Stream:
        x = self._sublayer(x, attn, "attn", self.attn_scale)
        return self._sublayer(x, ffn, "ffn", self.ffn_scale)

    def _sublayer(self, x: Stream, f: Sublayer, site: str, scale: Scale) -> Stream:
        normed = self._normed(x, site)
        write = 2.0 * torch.sigmoid(F.linear(normed.flatten(-2), getattr(self, f"{site}_write")) / x.shape[-2])
        o = write.unsqueeze(-1).to(x.dtype) * f(self._gated(normed, site)).unsqueeze(-2)
        return self.add(x, o, branch=scale)

    def _normed(self, x: State, site: str) -> State:
        norms: Any = [self.get_submodule(f"{site}_{i}_norm") for i in range(x.shape[-2])]
        return torch.stack([norm(stream) for norm, stream in zip(norms, x.unbind(-2), strict=True)], dim=-2)

    def _gated(self, normed: Stream, site: str) -> State:
        down, up = (getattr(self, f"{site}_{name}") for name in ("down", "up"))
        gates = torch.sigmoid(F.linear(F.silu(F.linear(normed.flatten(-2), down) / normed.shape[-2]), up))
        return (gates.unflatten(-1, normed.shape[-2:]) * normed).mean(-2)
