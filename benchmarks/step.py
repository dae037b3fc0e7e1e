"""A training step as every benchmark takes it: loss, backward, clipped gradients, AdamW; in bf16 on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from turns import DEVICE

from spannorm.init import parameter_groups
from spannorm.models import SpanNormForCausalLM

HALF = torch.bfloat16


def loss_of(model: Callable[..., Any], ids: Tensor, **given: Any) -> Tensor:
    """The loss of token ids (batch, seq) as their own labels."""
    with torch.autocast(DEVICE, HALF, enabled=DEVICE == "cuda"):
        return model(ids, labels=ids, **given).loss


def step_of(
    model: nn.Module, ids: Tensor, *, compiled: bool = False, adamw: dict[str, Any] | None = None, **given: Any
) -> Callable[[], None]:
    """One optimizer step as the Trainer takes it, with our groups of parameters where the model is ours.

    Args:
        ids: token ids (batch, seq), the same at every step.
        compiled: by `torch.compile`, without a break in the graph.
        adamw: which implementation of AdamW, such as `{"foreach": True}`; None takes the fused one.
        given: passed to the model, such as `use_cache=False`.
    """
    ours = isinstance(model, SpanNormForCausalLM)
    groups: Any = parameter_groups(model, learning_rate=1e-4, weight_decay=0.1) if ours else model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=1e-4, **(adamw or {"fused": True}))
    run = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> None:
        loss_of(run, ids, **given).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
