"""Measuring a stack of blocks: signal and gradient by layer, and how alike the layers are. PyTorch only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerRecord:
    """One measurement of L blocks. Index 0 is what enters block 0, index l what leaves block l−1."""

    loss: float
    """Mean loss of the batch, nats per token."""
    signal_rms: list[float]
    """RMS of the stream over tokens and channels, L+1 values."""
    gradient_rms: list[float]
    """RMS of the stream's gradient over tokens and channels, the loss summed over tokens, L+1 values."""
    similarity: list[list[float]]
    """Cosine between the streams at two layers, mean over tokens, (L+1) × (L+1)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_layers(blocks: Sequence[nn.Module], loss_of: Callable[[], Tensor], tokens: int) -> LayerRecord:
    """Run one forward and backward pass and record every block's stream. Training is left untouched.

    Parameters get no gradient (only streams are differentiated for), so a step in progress is not disturbed. The
    caller puts the model in evaluation mode: activation checkpointing would run the hooks twice.

    Args:
        blocks: the stack's blocks in order; each takes the stream first and returns it.
        loss_of: computes the mean loss over `tokens` tokens through these blocks.
        tokens: how many predictions the mean is over.
    """
    streams: list[Tensor] = []

    def entering(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Weights may be frozen or the embedding not asked for: the stream itself is made a leaf of interest.
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        streams.append(x)
        return (x, *args[1:])

    def leaving(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        streams.append(output)

    hooks = [blocks[0].register_forward_pre_hook(entering)]
    hooks += [block.register_forward_hook(leaving) for block in blocks]
    try:
        with torch.enable_grad():
            loss = loss_of()
            gradients = torch.autograd.grad(loss, streams)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        directions = torch.stack([_directions(stream) for stream in streams])
        similarity = torch.einsum("itd,jtd->ij", directions, directions) / directions.shape[1]
        return LayerRecord(
            loss=loss.item(),
            signal_rms=[_rms(stream) for stream in streams],
            gradient_rms=[_rms(gradient) * tokens for gradient in gradients],
            similarity=[[round(c, 4) for c in row] for row in similarity.clamp(-1, 1).tolist()],
        )


def _rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def _directions(stream: Tensor) -> Tensor:
    """(batch, seq, …, hidden) → unit vectors (batch·seq, hidden); several streams are summed."""
    x = stream.float().flatten(0, 1)
    x = x.sum(1) if x.ndim == 3 else x
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
