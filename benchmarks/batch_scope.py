"""How much the load-balancing gradient of `router_aux_scope="batch"` depends on the split of a batch.

    python benchmarks/batch_scope.py runs/moe/jobs/*/model [--recipe recipes/moe.yaml]

For each model, 32 sequences of the recipe's text at once against 4 × 8 and 16 × 2 accumulated: the length of the
difference over that of the load-balancing gradient.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from spannorm.models import SpanNormForCausalLM
from spannorm.train.data import prepare_data
from spannorm.train.recipe import load_recipe
from spannorm.train.sequences import TrainingSequences


def balancing_gradient(model: SpanNormForCausalLM, ids: Tensor, parts: int) -> Tensor:
    """The auxiliary loss's part of the gradient of token ids (batch, seq), split into `parts` passes."""
    gradients = []
    for model.config.router_aux_loss_coef in (1.0, 0.0):
        model.zero_grad()
        for part in ids.chunk(parts):
            predictions = torch.tensor(ids.numel() - len(ids))
            model(part, labels=part, num_items_in_batch=predictions, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return gradients[0] - gradients[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/moe.yaml"))
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    tokens = prepare_data(recipe.data, Path("runs/batch_scope/data"))
    sequences = TrainingSequences(tokens, recipe.train.sequence_length, 32, recipe.train.seed)
    ids = torch.stack([sequences[i]["input_ids"] for i in range(32)])
    for path in options.models:
        model = SpanNormForCausalLM.from_pretrained(path).train()
        if not model.config.num_experts:
            continue
        model.config.router_aux_scope, model.config.router_z_loss_coef = "batch", 0.0
        whole = balancing_gradient(model, ids, 1)
        apart = [((balancing_gradient(model, ids, n) - whole).norm() / whole.norm()).item() for n in (4, 16)]
        print(f"{path.parent.name:60} 4 × 8: {100 * apart[0]:5.1f} %   16 × 2: {100 * apart[1]:5.1f} %")


if __name__ == "__main__":
    main()
