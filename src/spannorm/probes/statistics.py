"""Statistics of one tensor (batch, seq, …, hidden), in fp32 or float64, outside the graph and outside autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def apart(x: Tensor) -> Iterator[None]:
    """No graph and no autocast: computations here do not change the training step, and are not rounded by autocast."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


def exact(x: Tensor) -> Tensor:
    """In fp32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def summed(x: Tensor) -> Tensor:
    """(batch, seq, hidden) as it is, (batch, seq, streams, hidden) summed over the streams; in fp32 or float64."""
    return exact(x).sum(-2) if x.ndim == 4 else exact(x)


def tokens(x: Tensor) -> int:
    return x.shape[0] * x.shape[1]


def power(x: Tensor) -> Tensor:
    """Mean square over all entries."""
    return torch.linalg.vector_norm(exact(x)).square() / x.numel()


def power_by_stream(x: Tensor) -> Tensor:
    """Mean square of each stream of (batch, seq, streams, hidden)."""
    return exact(x).square().mean((0, 1, 3))


def unit(x: Tensor) -> Tensor:
    """Each token's direction."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def token_cosine(units: Tensor) -> Tensor:
    """Mean cosine between different tokens of a sequence, from their directions; 0 if there is only one token."""
    length = units.shape[1]
    pairs = units.sum(1).square().sum(-1) - units.square().sum((1, 2))
    return pairs.mean() / max(length * (length - 1), 1)


def spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """σ/√tokens, largest first, (hidden,), and the effective rank: exp of the entropy of σ/Σσ.

    σ² are the eigenvalues of the smaller of XᵀX and XXᵀ, in fp64. This is faster than an fp32 SVD, and as exact.
    """
    rows = x.flatten(0, 1).double()
    count, width = rows.shape
    gram = rows.T @ rows if count > width else rows @ rows.T
    # the eigensolver raises on values that are not finite; a probe must report a diverged stream
    squares = torch.linalg.eigvalsh(gram) if gram.isfinite().all() else gram.diagonal() * torch.nan
    sigma = squares.flip(0).clamp_min(0.0).sqrt()
    share = sigma / sigma.sum()
    rank = -torch.special.xlogy(share, share).sum()
    padded = torch.nn.functional.pad(sigma / count**0.5, (0, width - len(sigma)))
    return padded.to(x.dtype), rank.exp().to(x.dtype)
