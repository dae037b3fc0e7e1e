"""Signal and gradient by block at init: measured, and predicted by the theory for the same stack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module

from spannorm.auditing.stacks import Stack
from spannorm.auditing.trace import undisturbed
from spannorm.probes.statistics import power


@dataclass(frozen=True)
class Signal:
    """RMS over tokens and channels, at the input of each block and at the output of the last."""

    signal_rms: tuple[float, ...]
    gradient_rms: tuple[float, ...]
    """Of the loss by the stream; empty where there is none."""

    @property
    def growth(self) -> float:
        """What leaves the last block over what enters block 0."""
        first, last = self.signal_rms[0], self.signal_rms[-1]
        return last / first if first else math.nan

    @property
    def gradient_ratio(self) -> float | None:
        """The gradient that reaches block 0's input over the one at the last block's output."""
        if not self.gradient_rms or not self.gradient_rms[-1]:
            return None
        return self.gradient_rms[0] / self.gradient_rms[-1]


def measure(model: nn.Module, stack: Stack, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Signal:
    """One forward and backward pass. No parameter's `.grad` is touched.

    The loss is the cross entropy of the model's output with random targets. If the output has no classes, it is the
    mean square.
    """
    paths = [b.path for b in stack.blocks]
    wanted = {id(m): n for n, m in model.named_modules() if n in paths}
    shape = stack.blocks[0].streams[0].shape
    found: list[Tensor] = []
    last: list[Tensor] = []

    def enters(module: nn.Module, given: Any, named: Any = None) -> None:
        if id(module) in wanted:
            stream = next((t for t in _tensors((given, named or {})) if t.shape == shape), None)
            if stream is not None:
                found.append(stream)

    def leaves(module: nn.Module, given: Any, out: Any) -> None:
        if id(module) in wanted:
            last[:] = [next((t for t in _tensors(out) if t.shape == shape), torch.empty(0))]

    handles: list[Any] = []
    with undisturbed(model), torch.enable_grad():
        for module in model.modules():
            if id(module) in wanted:
                handles.append(module.register_forward_pre_hook(enters, with_kwargs=True))
        handles.append(nn_module.register_module_forward_hook(leaves))
        try:
            out = model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        streams = [*found, *(t for t in last if t.numel())]
        if not streams:
            return Signal((), ())
        signal = tuple(math.sqrt(float(power(s.detach()))) for s in streams)
        graded = [s for s in streams if s.requires_grad]
        target = next((t for t in _tensors(out) if t.is_floating_point() and t.requires_grad), None)
        if len(graded) < len(streams) or target is None:
            return Signal(signal, ())
        gradients = torch.autograd.grad(_loss(target), graded, allow_unused=True)
    if any(g is None for g in gradients):
        return Signal(signal, ())
    return Signal(signal, tuple(math.sqrt(float(power(g))) for g in gradients))


def _loss(out: Tensor) -> Tensor:
    classes = out.shape[-1]
    if classes < 2:
        return out.float().square().mean()
    generator = torch.Generator("cpu").manual_seed(0)
    targets = torch.randint(classes, (out.numel() // classes,), generator=generator).to(out.device)
    return F.cross_entropy(out.float().reshape(-1, classes), targets)


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, Mapping):
        return [t for v in found.values() for t in _tensors(v)]
    if isinstance(found, (tuple, list)):
        return [t for v in found for t in _tensors(v)]
    return []
