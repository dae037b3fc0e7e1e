"""The result of a probe, and the running means from which it is computed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from spannorm.values import finite


@dataclass(frozen=True)
class Record:
    """Means over all measured tokens. NaN (`None` in `to_dict`) means that nothing was measured.

    L blocks have L+1 points: point 0 is the input of block 0, point l the output of block l−1. RMS is over tokens and
    channels. With several residual streams, signals, cosines and ranks are those of the readout at that point: the
    output of the stack if it ended there. The gradient is with respect to a change that is added to all streams at
    once, as a change of the embedding is.
    """

    signal_rms: list[float]
    """RMS of the stream, L+1 values."""
    gradient_rms: list[float]
    """RMS of the loss's gradient with respect to the stream, L+1 values."""
    signal_rms_by_stream: list[list[float]]
    """RMS of each of n streams, n × (L+1). At points 0 and L there is one stream. Empty for one stream."""
    gradient_rms_by_stream: list[list[float]]
    """RMS of the gradient with respect to each of n streams, n × (L+1)."""
    variance: dict[str, list[float]]
    """Mean square of the input of each norm, by the norm's name, and of sums that no norm follows (`attn_add`,
    `ffn_add`); L values each."""
    branch_rms: dict[str, list[float]]
    """RMS of the sublayer's output; `attn` and `ffn`, L values each."""
    added_rms: dict[str, list[float]]
    """RMS of what is added to the skip, after output norm, gate and factor. A second sum of one branch is `attn_2`,
    `ffn_2`."""
    rho: dict[str, list[float]]
    """Skip–branch correlation at the sum, ρ = ⟨skip·branch⟩ / √(⟨skip²⟩⟨branch²⟩), means over tokens and channels, so
    that the sum's variance is ⟨skip²⟩ + ⟨branch²⟩ + 2ρ√(⟨skip²⟩⟨branch²⟩)."""
    unmatched: dict[str, list[int]]
    """Branches whose output the probe found in no sum, with their blocks. They are missing in `rho` and `added_rms`."""
    token_cosine: list[float]
    """Mean cosine between different tokens of a sequence, L+1 values."""
    layer_cosine: list[float]
    """Cosine between a block's input and output, L values."""
    similarity: list[list[float]] | None
    """Cosine between the streams at two points, (L+1) × (L+1), to four digits."""
    effective_rank: list[float] | None
    """exp of the entropy of σ/Σσ, σ the singular values of the stream (tokens × hidden), L+1 values."""
    spectrum: list[list[float]] | None
    """σ/√tokens, largest first, (L+1) × hidden. The sum of squares is the mean squared length of a token."""
    loss: float = math.nan
    """Mean loss, nats per token, if the probe computed it (`measure`)."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {key: finite(value) for key, value in asdict(self).items()}


@dataclass
class Means:
    """Running means by (quantity, site, index). They stay on the model's device until they are read, so that the
    program does not wait for a GPU."""

    sums: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    weights: dict[tuple[str, str, int], int] = field(default_factory=dict)

    def add(self, quantity: str, site: str, index: int, mean: Tensor, weight: int) -> None:
        """Add a mean, or an array of means, over `weight` tokens."""
        key, total = (quantity, site, index), mean.flatten() * weight
        self.sums[key] = self.sums[key] + total if key in self.sums else total
        self.weights[key] = self.weights.get(key, 0) + weight

    def read(self) -> dict[str, dict[str, dict[int, list[float]]]]:
        """quantity → site → index → mean vector, over all ranks if torch.distributed is initialized."""
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
