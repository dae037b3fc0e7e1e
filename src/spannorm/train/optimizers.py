"""The optimizers of a run: AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from spannorm.init import matrices_of_blocks, parameter_groups

OPTIMIZERS = ("adamw", "muon")


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> torch.optim.Optimizer:
    """The optimizer `name` over `parameter_groups` of the model. Depth rules scale the learning rate and Adam's ε.

    Muon (Jordan et al. 2024) steps along the orthogonalized momentum. The step's size is matched to AdamW's RMS
    (Moonlight, arXiv 2502.16982), so that one learning rate and one decay fit both. Muon updates the 2-D matrices in
    blocks; AdamW updates embedding, head, norms, router and the experts' stacked matrices.
    """
    groups = parameter_groups(model, learning_rate=learning_rate, weight_decay=weight_decay, eps=epsilon)

    def adamw(of: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(of, betas=betas, eps=epsilon, fused=True)

    if name == "adamw":
        return adamw(groups)
    matrices = {id(parameter) for parameter in matrices_of_blocks(model)}
    muon, rest = (
        [{**g, "params": ps} for g in groups if (ps := [p for p in g["params"] if (id(p) in matrices) == inside])]
        for inside in (True, False)
    )
    for group in muon:
        group.pop("eps", None)  # Muon's eps has another meaning: it protects a division by the momentum's norm
    return Together([torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"), adamw(rest)])


class Together(torch.optim.Optimizer):
    """Several optimizers as one. It shares their groups, so that a schedule can set each group's learning rate."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
