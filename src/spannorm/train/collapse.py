"""How far a trained model has collapsed: the rank of its streams, and what each block still contributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spannorm.probes import block_skip_costs, depth_use, measure

PARTS = {"batches": 2, "fit": 4}
"""Batches for the use of depth (one pass per block and measure), and batches for the fit of linear maps."""


def collapse(
    model: Any, sequences: Sequence[Tensor], batch_size: int, bf16: bool, fit: Sequence[Tensor] = ()
) -> dict[str, list[float]]:
    """Measure a model, in evaluation mode, on held-out sequences of token ids.

    Args:
        fit: other held-out sequences, for the linear maps of `usefulness`.

    Returns:
        By point (embedding, then after each block): `effective_rank`, `token_cosine`. By block: `layer_cosine`, and
        `skip_cost`, how much the loss increases, in nats per token, if the block is skipped. `spectrum`: singular
        values of the last block's output, divided by the largest. From the use of depth (`spannorm.probes.DepthUse`),
        on the first sequences: by block `angular_distance`, `usefulness`, `causal` (the mean of its scores on later
        blocks) and `permutation` with the next block; by point `logit_lens`, `jacobian`.
    """
    training, device = model.training, next(model.parameters()).device
    batches = torch.stack(list(sequences)).to(device).split(batch_size)
    others = torch.stack(list(fit)).to(device).split(batch_size) if fit else ()

    def loss_of(batch: Tensor) -> Tensor:
        loss: Tensor = model(batch, labels=batch).loss
        return loss

    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            record = measure(model, lambda: loss_of(batches[0]), similarity=False, spectrum=True)
            weights = [len(batch) / sum(map(len, batches)) for batch in batches]  # the last one may be shorter
            costs = block_skip_costs(
                model, lambda: sum((w * loss_of(b) for w, b in zip(weights, batches, strict=True)), torch.zeros(()))
            )
            use = depth_use(model, loss_of, batches[: PARTS["batches"]], fit=others[: PARTS["fit"]], reach=1)
    finally:
        model.train(training)
    assert record.effective_rank is not None and record.spectrum is not None
    last, depth = record.spectrum[-1], len(costs)
    return {
        "effective_rank": record.effective_rank,
        "token_cosine": record.token_cosine,
        "layer_cosine": record.layer_cosine,
        "skip_cost": costs,
        "spectrum": [float(f"{value / last[0]:.4g}") for value in last],
        "angular_distance": use.angular_distance,
        "usefulness": use.usefulness,
        "causal": use.effect_on_later(),
        "permutation": [use.permutation[b][b + 1] for b in range(depth - 1)],
        "logit_lens": use.logit_lens,
        "jacobian": use.jacobian,
    }
