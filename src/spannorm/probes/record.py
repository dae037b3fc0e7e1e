"""What a probe hands back, and the running means it is made of."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from spannorm.values import finite


@dataclass(frozen=True)
class Record:
    """Means over the tokens of everything measured. NaN (`None` in `to_dict`) where nothing was.

    L blocks have L+1 points: point 0 is what enters block 0, point l what leaves block l−1. RMS is over tokens and
    channels. Of several residual streams, signals, cosines and ranks are those of what reaches the readout: what the
    stack would hand on if it ended there. Their gradient is that of a push on all at once, as the embedding gives it.
    """

    signal_rms: list[float]
    """RMS of the stream, L+1 values."""
    gradient_rms: list[float]
    """RMS of the loss's gradient by the stream, L+1 values."""
    signal_rms_by_stream: list[list[float]]
    """The same for each of n streams, n × (L+1); they are one at point 0 and L. Empty for one stream."""
    gradient_rms_by_stream: list[list[float]]
    """The same for each of n streams, n × (L+1)."""
    variance: dict[str, list[float]]
    """Mean square by site: what each norm reads, by the norm's name, and sums that no norm follows (`attn_add`,
    `ffn_add`); L values each."""
    branch_rms: dict[str, list[float]]
    """RMS of what the sublayer returns; `attn` and `ffn`, L values each."""
    added_rms: dict[str, list[float]]
    """RMS of what is added to the skip: output norm, gate and factor included. A second sum of one branch is `attn_2`,
    `ffn_2`."""
    rho: dict[str, list[float]]
    """Skip–branch correlation at the sum, ρ = ⟨skip·branch⟩ / √(⟨skip²⟩⟨branch²⟩), means over tokens and channels, so
    that the sum's variance is ⟨skip²⟩ + ⟨branch²⟩ + 2ρ√(⟨skip²⟩⟨branch²⟩)."""
    unmatched: dict[str, list[int]]
    """Branches whose output the probe found in no sum, with their blocks: `rho` and `added_rms` do not have them."""
    token_cosine: list[float]
    """Mean cosine between different tokens of a sequence, L+1 values."""
    layer_cosine: list[float]
    """Cosine between a block's input and output, L values."""
    similarity: list[list[float]] | None
    """Cosine between the streams at two points, (L+1) × (L+1), to four digits."""
    effective_rank: list[float] | None
    """exp of the entropy of σ/Σσ, σ the singular values of the stream (tokens × hidden), L+1 values."""
    spectrum: list[list[float]] | None
    """σ/√tokens, largest first, (L+1) × hidden: the squares add up to the mean squared length of a token."""
    loss: float = math.nan
    """Mean loss, nats per token, where the probe computed it (`measure`)."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {key: finite(value) for key, value in asdict(self).items()}


@dataclass
class Means:
    """Running means by (quantity, site, index), on the model's device until they are read: nothing waits for a GPU."""

    sums: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    weights: dict[tuple[str, str, int], int] = field(default_factory=dict)

    def add(self, quantity: str, site: str, index: int, mean: Tensor, weight: int) -> None:
        """Take in a mean, or an array of means, over `weight` tokens."""
        key, total = (quantity, site, index), mean.flatten() * weight
        self.sums[key] = self.sums[key] + total if key in self.sums else total
        self.weights[key] = self.weights.get(key, 0) + weight

    def read(self) -> dict[str, dict[str, dict[int, list[float]]]]:
        """quantity → site → index → mean vector, over all ranks where torch.distributed is initialized."""
        keys = sorted(self.sums)  # the same on every rank
        if not keys:
            return {}
        device = self.sums[keys[0]].device
        sums = [self.sums[key].to(device) for key in keys]
        flat = torch.cat([*sums, sums[0].new_tensor([self.weights[key] for key in keys])])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(flat)
        means: dict[str, dict[str, dict[int, list[float]]]] = {}
        *vectors, weights = flat.cpu().double().split([*(len(s) for s in sums), len(keys)])
        read = dict(zip(keys, zip(vectors, weights, strict=True), strict=True))
        for quantity, site, index in self.sums:  # in the order of the data flow
            vector, weight = read[quantity, site, index]
            means.setdefault(quantity, {}).setdefault(site, {})[index] = (vector / weight).tolist()
        return means
