"""The causal language model's losses: cross-entropy in chunks, and what a mixture of experts adds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spannorm.errors import InputError
from spannorm.models.configuration import SpanNormConfig
from spannorm.models.experts import TopKRouter
from spannorm.routing import auxiliary_losses
from spannorm.shapes import Stream


def next_tokens(labels: Tensor) -> Tensor:
    """Labels (batch, seq) → the label of the next position (batch, seq); the last one is -100, which is ignored."""
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def chunked_loss(part_loss: Callable[[Tensor, Tensor], Tensor], hidden: Stream, targets: Tensor, chunk: int) -> Tensor:
    """Sum of the losses of chunks of `chunk` tokens. Backward computes each chunk again, so one is in memory at a time.

    Args:
        part_loss: hidden states (tokens, hidden) and targets (tokens,) → the summed loss of these tokens, divided by
            the number of tokens in the whole batch.
        hidden: (batch, seq, hidden).
        targets: (batch, seq), already shifted.
    """
    parts = zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
    return torch.stack([checkpoint(part_loss, h, y, use_reentrant=False) for h, y in parts]).sum()


def router_losses(
    config: SpanNormConfig,
    router: TopKRouter,
    router_logits: tuple[Tensor, ...],
    targets: Tensor,
    attention_mask: Tensor | None,
    num_items_in_batch: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    """Load-balancing loss and z-loss (`spannorm.routing.auxiliary_losses`), each before its coefficient.

    Args:
        router: any one of the model's.
        router_logits: of each sparse layer, (batch·seq, experts).
        targets: (batch, seq), already shifted. A sequence's weight is its share of the predictions.
        attention_mask: (batch, keys), or (batch, heads or 1, seq, keys), boolean or additive. The last `seq` keys are
            those of `targets`; before them stand a cache's or a learned prefix's.
        num_items_in_batch: predictions in the whole step; None means those in `targets`.

    Raises:
        InputError: reentrant activation checkpointing cut the routers from the graph.
    """
    if torch.is_grad_enabled() and not router_logits[0].requires_grad and router.weight.requires_grad:
        raise InputError(
            "reentrant activation checkpointing hides the routers from the auxiliary losses: use it with "
            "`use_reentrant=False`."
        )
    predictions = (targets != -100).sum(1)
    weights = predictions / (predictions.sum() if num_items_in_batch is None else num_items_in_batch)
    counted = torch.ones_like(targets) if attention_mask is None else attention_mask
    if counted.ndim == 4:  # a token counts if it may attend to itself
        own = counted[:, 0].diagonal(counted.shape[-1] - counted.shape[-2], dim1=-2, dim2=-1)
        counted = own if own.dtype == torch.bool else own == 0
    counted = counted[:, -targets.shape[1] :]
    return auxiliary_losses(router_logits, config.num_experts_per_tok, counted, weights, config.router_aux_scope)
