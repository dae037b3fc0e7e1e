"""Placements as a user writes them, with what the package's own do not need: streams, gains, projections, gates."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from spannorm import Placement, Projection

STREAMS = 4


@final
class Hyper(Placement):
    """PreNorm on four streams that learned matrices mix, with a read that looks at the streams (hyper-connections)."""

    default_depth_rule = "1/sqrt(2L)"
    final_norm = True

    def gains(self) -> dict[str, Tensor]:
        gains = {"dynamic_gain": torch.tensor(0.01)}
        for site, k in (("attn", 2 * self.layer_idx), ("ffn", 2 * self.layer_idx + 1)):
            gains[f"{site}_read"] = F.one_hot(torch.tensor(k % STREAMS), STREAMS).float()
            gains[f"{site}_write"] = torch.ones(STREAMS)
            gains[f"{site}_mix"] = torch.eye(STREAMS)
        return gains

    def projections(self) -> dict[str, Projection]:
        return {f"{site}_dynamic": Projection(1, self.hidden_size, scale=0.0) for site in ("attn", "ffn")}

    def enter(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2).expand(*x.shape[:-1], STREAMS, x.shape[-1])

    def exit(self, x: Tensor) -> Tensor:
        return x.sum(-2)

    def _sublayer(self, x: Tensor, f: Any, site: str, norm: Any, scale: Any) -> Tensor:
        read, write, mix, dynamic = (getattr(self, f"{site}_{k}") for k in ("read", "write", "mix", "dynamic"))
        weights = read + self.dynamic_gain * torch.tanh(F.linear(x, dynamic)).squeeze(-1)
        o = f(norm(torch.einsum("bsnd,bsn->bsd", x, weights)))
        return self.add(torch.einsum("bsnd,nm->bsmd", x, mix), write[:, None] * o.unsqueeze(-2), branch=scale)

    def block(self, x: Tensor, attn: Any, ffn: Any) -> Tensor:
        x = self._sublayer(x, attn, "attn", self.attn_norm, self.attn_scale)
        return self._sublayer(x, ffn, "ffn", self.ffn_norm, self.ffn_scale)


@final
class Gated(Placement):
    """PreNorm with learned gates, plain sums, and a stream that is scaled while its gradient is not."""

    final_norm = True

    def gains(self) -> dict[str, Tensor]:
        return {
            "gate": torch.tensor(0.5),
            "shrink": torch.tensor(0.25),
            "channels": torch.full((self.hidden_size,), 2.0),
        }

    def block(self, x: Tensor, attn: Any, ffn: Any) -> Tensor:
        h = x + self.gate * attn(self.attn_norm(x))
        h = h - self.shrink * h.detach()
        return h + self.channels * ffn(self.ffn_norm(h))


@final
class Mixed(Placement):
    """A projection that is drawn, and two branches that meet before the stream."""

    final_norm = True

    def projections(self) -> dict[str, Projection]:
        return {"own": Projection(self.hidden_size, self.hidden_size, scale=0.5)}

    def block(self, x: Tensor, attn: Any, ffn: Any) -> Tensor:
        n = self.attn_norm(x)
        return x + (attn(n) + ffn(self.ffn_norm(F.linear(x, self.own))))
