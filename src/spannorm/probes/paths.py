"""The gradient by path: skip, attention, feed-forward. One block at a time, so that it never underflows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spannorm.errors import InputError
from spannorm.probes.blocks import Given, Sublayer, find_placements, intercepting
from spannorm.probes.statistics import power, summed

PATHS: Mapping[str, tuple[str, ...]] = {
    "total": (), "skip": ("attn", "ffn"), "without_attention": ("attn",), "without_ffn": ("ffn",),
}  # fmt: skip
"""The gradients that are followed, and the branches whose outputs are detached for each."""


@dataclass(frozen=True)
class GradientPaths:
    """Gradients at the L blocks' inputs, divided by that at the stack's output. RMS over tokens and channels.

    With several residual streams, the gradient is with respect to a change that is added to all streams at once, as a
    change of the embedding is.
    """

    log_gain: dict[str, list[float]]
    """ln of the gain from the output to block b's input: of the `total` gradient, of the `skip` path alone (both
    branches detached in all blocks), `without_attention` and `without_ffn`."""
    attention_share: list[float]
    """‖g − g₋‖²/‖g‖². g is the gradient at the block's input. g₋ is the same with attention's output detached in this
    block, from the same gradient at its output. If paths are uncorrelated, this is the share of the power that passed
    through attention."""
    ffn_share: list[float]
    """The same for the feed-forward. In SpanNorm attention's path runs through the FFN's, and counts in both."""

    def share(self, path: str) -> float:
        """The share of the power at the embedding that is missing from `path`, from end to end."""
        return -math.expm1(2 * (self.log_gain[path][0] - self.log_gain["total"][0]))


def gradient_paths(model: nn.Module, loss_of: Callable[[], Tensor]) -> GradientPaths:
    """Follow the gradient from the stack's output to its input, with all branches and with branches detached.

    The forward pass is the model's own. Backward runs one block at a time from recorded inputs. Between blocks the
    gradient is scaled to unit RMS, and the logarithm of its size is kept. So backward needs the memory of one block.

    Args:
        model: holds a whole stack of placements; no dropout (evaluation mode), no cache.
        loss_of: computes the mean loss through the model.

    Raises:
        InputError: a block run again gives another output: dropout is on, or a cache remembers the first run.
    """
    placements = list(find_placements(model).values())
    blocks, result, gradient = _recorded(placements, loss_of)
    gradients = dict.fromkeys(PATHS, gradient / _rms(gradient))
    scale = dict.fromkeys(PATHS, 0.0)
    log_gain: dict[str, list[float]] = {path: [] for path in PATHS}
    shares: dict[str, list[float]] = {"attn": [], "ffn": []}
    for placement, block in zip(reversed(placements), reversed(blocks), strict=True):
        below = _backward(placement, block, result, gradients, shares)
        result = block.x.detach()
        for path, g in below.items():
            size = _rms(g)
            scale[path] += _log(size)
            gradients[path] = g / max(size, 1e-300)
            log_gain[path].append(scale[path] + _log(_rms(summed(gradients[path]))))
    return GradientPaths(
        log_gain={path: values[::-1] for path, values in log_gain.items()},
        attention_share=shares["attn"][::-1],
        ffn_share=shares["ffn"][::-1],
    )


class _Block(NamedTuple):
    """What one block was given in the forward pass, and what its sublayers returned."""

    x: Tensor
    attn: Sublayer
    ffn: Sublayer
    outputs: dict[str, Tensor]


def _recorded(placements: list[Any], loss_of: Callable[[], Tensor]) -> tuple[list[_Block], Tensor, Tensor]:
    """Run the model forward: the record of each block, the stack's output, and the loss's gradient there."""
    blocks: list[_Block] = []
    top: list[Tensor] = []

    def before(_: int, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Given:
        blocks.append(_Block(x.detach(), attn, ffn, {}))
        return x, _noting(attn, blocks[-1].outputs, "attn"), _noting(ffn, blocks[-1].outputs, "ffn")

    def cut(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        top.append(output.detach().requires_grad_())
        return top[0]

    handle = placements[-1].register_forward_hook(cut)
    try:
        with intercepting(placements, before), torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss_of(), top)
    finally:
        handle.remove()
    return blocks, top[0].detach(), gradient


def _backward(
    placement: Any, block: _Block, result: Tensor, gradients: Mapping[str, Tensor], shares: dict[str, list[float]]
) -> dict[str, Tensor]:
    """Each path's gradient at a block's input, from that at its output `result`. Adds to the shares of the branches."""
    leaf = block.x.requires_grad_()
    below: dict[str, Tensor] = {}
    for path, detached in PATHS.items():
        # a detached branch is not computed again: its recorded output is used
        attn, ffn = (
            _replayed(block.outputs[name]) if name in detached else sublayer
            for name, sublayer in (("attn", block.attn), ("ffn", block.ffn))
        )
        with torch.enable_grad():
            output = placement(leaf, attn, ffn)
        if not torch.allclose(output.detach(), result, rtol=1e-3, atol=1e-3 * _rms(result)):
            raise InputError(
                f"block {placement.layer_idx} gives another output when it is run again: put the model in "
                "evaluation mode and turn its cache off (`use_cache=False`)."
            )
        below[path] = torch.autograd.grad(output, leaf, gradients[path], retain_graph=len(detached) == 1)[0]
        if len(detached) == 1:
            without = torch.autograd.grad(output, leaf, gradients["total"])[0]
            whole = summed(below["total"])
            shares[detached[0]].append((power(whole - summed(without)) / power(whole)).item())
    return below


def _noting(sublayer: Sublayer, outputs: dict[str, Tensor], name: str) -> Sublayer:
    def noting(x: Tensor) -> Tensor:
        output = sublayer(x)
        outputs[name] = output.detach()
        return output

    return noting


def _replayed(output: Tensor) -> Sublayer:
    return lambda x: output


def _rms(x: Tensor) -> float:
    return power(x.double()).sqrt().item()


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
