"""The routers of a mixture of experts: their auxiliary losses, and measures of their health. PyTorch only.

`L` sparse layers, `E` experts, k of them per token; `p` is a router's softmax over all experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


def load_balancing_loss(logits: Tensor, top_k: int, counted: Tensor) -> Tensor:
    """`E·Σ_i f_i·P_i` of each sequence: 1 if the load is even, E/k if k experts have all of it.

    f_i is expert i's share of the sequence's k·T assignments, P_i the mean of p_i over its T tokens (Switch
    Transformers, arXiv 2101.03961, Eqs. 4–6, with f divided by k).

    Args:
        logits: (…, sequences, tokens, E).
        counted: (sequences, tokens), 1 for a token, 0 for padding.
    """
    p = logits.softmax(-1)
    return logits.shape[-1] / top_k * (_mean(_chosen(p, top_k), counted) * _mean(p, counted)).sum(-1)


def router_z_loss(logits: Tensor, counted: Tensor) -> Tensor:
    """Mean over each sequence's tokens of `(log Σ_i exp logit_i)²` (ST-MoE, arXiv 2202.08906, Eq. 5)."""
    return _mean(logits.logsumexp(-1, keepdim=True).square(), counted).squeeze(-1)


def _chosen(scores: Tensor, top_k: int) -> Tensor:
    """1 for each token's k highest scores, 0 elsewhere."""
    return torch.zeros_like(scores).scatter_(-1, scores.detach().topk(top_k, dim=-1).indices, 1.0)


def _mean(x: Tensor, counted: Tensor) -> Tensor:
    """(…, sequences, tokens, n) → mean over the tokens that count (…, sequences, n)."""
    return (x * counted.unsqueeze(-1)).sum(-2) / counted.sum(-1, keepdim=True).clamp_min(1)


def auxiliary_losses(
    router_logits: Sequence[Tensor], top_k: int, counted: Tensor, weights: Tensor, scope: str
) -> tuple[Tensor, Tensor]:
    """Load-balancing loss and z-loss, each summed over the layers and, with weights, over the sequences.

    If a weight is the sequence's share of the step's predictions, the sum does not depend on how the step's sequences
    are split (into accumulated batches, over processes).

    Args:
        router_logits: L times (sequences·tokens, E).
        counted: (sequences, tokens), 1 for a token, 0 for padding.
        weights: (sequences,).
        scope: `sequence`: load is balanced within each sequence. `batch`: over all sequences at once, which depends on
            the split.
    """
    if scope == "batch":
        counted, weights = counted.reshape(1, -1), weights.sum(0, keepdim=True)
    logits = torch.stack(list(router_logits)).unflatten(1, counted.shape)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mask, weights = counted.to(logits), weights.to(logits)
    balance, z = load_balancing_loss(logits, top_k, mask), router_z_loss(logits, mask)
    return (balance * weights).sum(), (z * weights).sum()


@dataclass(frozen=True)
class RoutingRecord:
    """The routers' health over some tokens, by sparse layer."""

    load: list[list[float]]
    """Each expert's share of the assignments, L × E; an even share is 1/E."""
    entropy: list[float]
    """Mean entropy of p, nats: ln E if all experts are equally likely, 0 if one is certain."""
    logit_rms: list[float]
    """RMS of the logits."""
    max_violation: list[float]
    """How far the largest load is above the even load, relative to the even load (arXiv 2408.15664)."""
    dead_experts: list[int]
    """The number of experts that got no token."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> dict[str, float]:
        """One number per measure: the mean over layers; for violation the largest, for dead experts the sum."""
        layers = len(self.load)
        return {
            "router_entropy": sum(self.entropy) / layers,
            "router_logit_rms": (sum(rms**2 for rms in self.logit_rms) / layers) ** 0.5,
            "max_violation": max(self.max_violation),
            "dead_experts": sum(self.dead_experts),
        }


class RoutingMeter:
    """Adds up the routers' statistics over several forward passes."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.sums: Tensor | None = None
        """(L, E + 3): assignments by expert, sum of the entropies, sum of the squared logits, tokens."""

    @torch.no_grad()
    def add(self, router_logits: Sequence[Tensor]) -> None:
        """Add one forward pass: L times (tokens, E)."""
        layers = []
        for logits in router_logits:
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            counts = _chosen(log_p, self.top_k).sum(0)
            entropy, square = -(log_p.exp() * log_p).sum(), logits.square().sum()
            layers.append(torch.cat([counts, torch.stack([entropy, square, counts.sum() / self.top_k])]))
        sums = torch.stack(layers).double()
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self) -> RoutingRecord:
        """The record of what was added. Then the sums start again at 0."""
        assert self.sums is not None, "nothing was added"
        counts, (entropy, square, tokens) = self.sums[:, :-3], self.sums[:, -3:].unbind(1)
        load, experts = counts / counts.sum(1, keepdim=True), counts.shape[1]
        self.sums = None
        return RoutingRecord(
            load=[[round(share, 6) for share in layer] for layer in load.tolist()],
            entropy=(entropy / tokens).tolist(),
            logit_rms=(square / tokens / experts).sqrt().tolist(),
            max_violation=(load.amax(1) * experts - 1).tolist(),
            dead_experts=(counts == 0).sum(1).tolist(),
        )
