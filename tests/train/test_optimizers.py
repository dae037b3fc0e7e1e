"""Muon beside AdamW: which parameters each takes, the twin theorem under both, and resumption."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spannorm.models import SpanNormForCausalLM
from spannorm.train.data import TokenData
from spannorm.train.optimizers import Together, build_optimizer
from spannorm.train.recipe import Recipe
from spannorm.train.run import train

SETTINGS = {"learning_rate": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "epsilon": 1e-40}


def muon(model: SpanNormForCausalLM) -> Together:
    optimizer = build_optimizer(model, "muon", **SETTINGS)
    assert isinstance(optimizer, Together)
    return optimizer


def step(model: SpanNormForCausalLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randint(37, (4, 12), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    logits = model(x).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    optimizer.step()


def test_muon_takes_the_matrices_inside_blocks_and_adamw_every_other_parameter_once(tiny_config) -> None:
    model = SpanNormForCausalLM(
        tiny_config(placement="span", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    )
    names = {id(p): name for name, p in model.named_parameters()}
    taken = [[names[id(p)] for g in part.param_groups for p in g["params"]] for part in muon(model).parts]
    assert sorted(taken[0] + taken[1]) == sorted(names.values())
    assert {name.split(".")[-2] for name in taken[0]} == {"q_proj", "k_proj", "v_proj", "o_proj"}, "experts are 3-D"
    dense = SpanNormForCausalLM(tiny_config(placement="span"))
    count = sum(len(g["params"]) for g in muon(dense).parts[0].param_groups)
    assert count == 7 * dense.config.num_hidden_layers


def test_muons_first_step_is_as_long_in_every_direction_and_as_large_as_adams(tiny_config) -> None:
    model = SpanNormForCausalLM(tiny_config(placement="pre"))
    weight = model.model.layers[1].self_attn.q_proj.weight
    before = weight.detach().clone()
    step(model, muon(model), 0)
    moved = weight.detach() - (1 - 0.01 * 0.1) * before
    values = torch.linalg.svdvals(moved)
    assert values[0] < 2.5 * values[-1], "orthogonalized in five Newton–Schulz steps, singular values 0.7 to 1.2"
    assert moved.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.25), "Adam's RMS of 0.2 (arXiv 2502.16982)"


def test_the_twin_theorem_holds_under_muon(tiny_config) -> None:
    # four blocks: c = 1/2 is exact in any float, and so is the equality
    forward, twin = (
        SpanNormForCausalLM(tiny_config(placement="span", num_hidden_layers=4, depth_rule=f"1/sqrt(L):{where}"))
        for where in ("forward", "init+lr")
    )
    optimizers = [muon(forward), muon(twin)]
    for seed in range(4):
        step(forward, optimizers[0], seed)
        step(twin, optimizers[1], seed)
    for name, weight in forward.named_parameters():
        c = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.testing.assert_close(twin.get_parameter(name), c * weight, rtol=1e-5, atol=1e-7)


def test_a_saved_state_goes_on_as_if_never_saved(tiny_config) -> None:
    model = SpanNormForCausalLM(tiny_config(placement="span"))
    optimizer = muon(model)
    step(model, optimizer, 0)
    other = copy.deepcopy(model)
    loaded = muon(other)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (other, loaded)):
        for group in its.param_groups:
            group["lr"] *= 0.5  # as a schedule does
        step(one, its, 1)
    for name, weight in model.named_parameters():
        assert torch.equal(other.get_parameter(name), weight), name


def test_a_run_under_muon_learns(recipe: Recipe, tokens: TokenData, tmp_path: Path) -> None:
    t = replace(recipe.train, optimizer="muon")
    result = train(replace(recipe, train=t), tmp_path / "run", data=tokens.directory)
    assert result["val_loss"] < result["unigram_loss"] - 0.2
