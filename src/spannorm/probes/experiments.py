"""Measurements that run their own passes: one forward and backward, or the same with one thing changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from spannorm.probes.blocks import Given, Sublayer, find_placements, intercepting
from spannorm.probes.probe import Probe
from spannorm.probes.record import Record
from spannorm.probes.statistics import exact

Loss = Callable[[], Tensor]
"""Computes a mean loss through the probed model. The caller sets the mode (training or evaluation) and autocast. The
stack runs once, without reentrant activation checkpointing."""


def measure(
    model: nn.Module,
    loss_of: Loss,
    *,
    tokens: int = 1,
    similarity: bool = True,
    rank: bool = True,
    spectrum: bool = False,
) -> Record:
    """One forward and backward pass under a `Probe`. Parameters get no gradient, so a step in progress is unchanged.

    Args:
        loss_of: computes the mean loss.
        tokens: a factor on the gradient. Give the number of predictions in the mean to get the gradient of the summed
            loss, which does not depend on the size of the batch.
        similarity, rank, spectrum: as in `Probe`.
    """
    placements = find_placements(model)
    probe = Probe(model, similarity=similarity, rank=rank, spectrum=spectrum)
    with _entry(placements.values()) as entry, probe, torch.enable_grad():
        loss = loss_of()
        torch.autograd.grad(loss, entry)
    record = probe.record()
    return replace(
        record,
        loss=loss.item(),
        gradient_rms=[tokens * g for g in record.gradient_rms],
        gradient_rms_by_stream=[[tokens * g for g in stream] for stream in record.gradient_rms_by_stream],
    )


@torch.no_grad()
def block_skip_costs(model: nn.Module, loss_of: Loss, *, blocks: Iterable[int] | None = None) -> list[float]:
    """How much the loss increases, nats per token, if one block's output is replaced by its input.

    The block's norms are skipped too. With several streams the first block still creates them, and the last still
    reads them out. One forward pass per block, and one without a skip.

    Args:
        blocks: the blocks to skip, one at a time; None means all.
    """
    placements = list(find_placements(model).values())
    whole = loss_of().item()
    costs = []
    for b in range(len(placements)) if blocks is None else blocks:
        placements[b].block = _skipped  # on the instance: it hides the class's own
        try:
            costs.append(loss_of().item() - whole)
        finally:
            del placements[b].block
    return costs


@dataclass
class UpdateSizes:
    """RMS of a parameter's change, divided by its RMS before."""

    by_parameter: dict[str, float] = field(default_factory=dict)
    """By the parameter's full name."""
    by_block: dict[str, list[float]] = field(default_factory=dict)
    """By the parameter's name inside its block, L values each; NaN if a block has no parameter of that name."""


@contextmanager
def update_sizes(model: nn.Module) -> Iterator[UpdateSizes]:
    """`with update_sizes(model) as sizes: optimizer.step()` fills `sizes` when the context ends.

    Inside the context it keeps a copy of all parameters. A parameter that was 0 has an infinite ratio, or NaN if it
    stayed 0.
    """
    sizes = UpdateSizes()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    yield sizes
    for name, parameter in model.named_parameters():
        old = exact(before.pop(name))
        ratio = (exact(parameter.detach()) - old).square().mean() / old.square().mean()
        sizes.by_parameter[name] = ratio.sqrt().item()
    blocks = list(find_placements(model))
    for b, block in enumerate(blocks):
        for name, size in sizes.by_parameter.items():
            if name.startswith(f"{block}."):
                inside = name.removeprefix(f"{block}.")
                sizes.by_block.setdefault(inside, [math.nan] * len(blocks))[b] = size


@contextmanager
def _entry(placements: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """The stream that enters block 0. It becomes a leaf if it needs no gradient, because weights may be frozen."""
    entered: list[Tensor] = []

    def before(b: int, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Given:
        if b == 0:
            x = x if x.requires_grad else x.detach().requires_grad_()
            entered.append(x)
        return x, attn, ffn

    with intercepting(placements, before):
        yield entered


def _skipped(x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
    return x
