"""The first values of a plain PyTorch model: the plan, the draw, the receipt, the optimizer's groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from arms import ARMS, TIED_ARMS, init_factor, rate_factor
from facts import FACTS
from torch import nn

from spannorm.errors import InputError
from spannorm.init import Draw, init_plan, init_receipt, init_weights_, parameter_groups, standard_normal
from spannorm.norms import build_norm
from spannorm.placements import build_placement
from spannorm.roles import Fused

WIDTH, INNER, VOCAB, DEPTH = 16, 40, 50, 4


class PlainBlock(nn.Module):
    def __init__(self, placement: str, rule: str, index: int, norm: str) -> None:
        super().__init__()
        self.placement = build_placement(
            placement, hidden_size=WIDTH, layer_idx=index, num_layers=DEPTH, depth_rule=rule, norm=norm
        )
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.self_attn.add_module(name, nn.Linear(WIDTH, WIDTH))
        self.mlp.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.mlp.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.mlp.down_proj = nn.Linear(INNER, WIDTH, bias=False)


class Plain(nn.Module):
    """A model of someone's own, with the Llama family's names."""

    def __init__(self, placement: str = "span", rule: str = "none", norm: str = "rmsnorm", tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(PlainBlock(placement, rule, i, norm) for i in range(DEPTH))
        self.norm = build_norm(norm, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def drawn(placement: str = "span", rule: str = "none", *, seed: int = 0, **options) -> Plain:
    model = Plain(placement, rule, **options)
    init_weights_(model, init_plan(model, width=WIDTH, tied=options.get("tied", False)), seed=seed)
    return model


def block_of(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("layers.") else 0


def expected_draw(name: str, placement: str, rule: str, tied: bool) -> tuple[Any, float]:
    """(mean, std) of a parameter, by hand."""
    module, leaf = name.split(".")[-2:]
    if leaf in (own := FACTS[placement].own(block_of(name), WIDTH)):
        return own[leaf]
    if leaf in ("attn_scale", "ffn_scale"):
        return {"rezero": 0.0, "layerscale": 0.1}[rule], 0.0
    if leaf == "bias":
        return 0.0, 0.0
    if "norm" in module:
        written = {"attn_output_norm": 0.283, "ffn_output_norm": 0.432, "attn_norm": 0.283, "ffn_norm": 0.432}
        gained = "gain(" in rule and module in FACTS[placement].output_norms
        return 0.5 * written[module] if gained else 1.0, 0.0
    if module == "embed_tokens":
        return 0.0, 0.25 if tied else 1.0
    return 0.0, init_factor(rule, module, block_of(name), DEPTH) * (INNER**-0.5 if module == "down_proj" else 0.25)


@pytest.mark.parametrize(("placement", "rule", "tied"), TIED_ARMS)
def test_every_parameter_is_drawn_as_the_rule_says(placement, rule, tied):
    model = drawn(placement, rule, norm="layernorm", tied=tied)
    plan = init_plan(model, width=WIDTH, tied=tied)
    assert plan.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        mean, std = expected_draw(name, placement, rule, tied)
        torch.testing.assert_close(
            torch.as_tensor(plan[name].mean), torch.as_tensor(mean).expand_as(torch.as_tensor(plan[name].mean))
        )
        assert plan[name].std == pytest.approx(std, rel=1e-12)
        if std == 0.0:
            assert torch.equal(parameter, torch.as_tensor(mean).expand_as(parameter))
        else:
            z, n = parameter.double() / std, parameter.numel()
            assert z.mean().abs() < 5 / n**0.5
            assert (z.std() - 1).abs() < 5 / (2 * n) ** 0.5
    assert not init_receipt(model, plan).mismatches


def test_each_block_follows_its_own_rule_and_what_stands_outside_follows_none():
    # eleven blocks, so that one name is the beginning of another: layers.1 and layers.10
    model = Plain()
    rules = {i: "deepnorm" if i in (0, 10) else "1/L" if i == 1 else "none" for i in range(11)}
    model.layers = nn.ModuleList(PlainBlock("span", rule, 1, "rmsnorm") for rule in rules.values())
    model.extra = nn.Module()
    model.extra.o_proj = nn.Linear(WIDTH, WIDTH)
    plan = init_plan(model, width=WIDTH)
    for i, rule in rules.items():
        for leaf in ("self_attn.v_proj", "self_attn.o_proj"):
            wanted = init_factor(rule, leaf.split(".")[1], 1, DEPTH) * 0.25
            assert plan[f"layers.{i}.{leaf}.weight"].std == pytest.approx(wanted)
    assert plan["extra.o_proj.weight"].std == pytest.approx(0.25)


def test_normal_draws_every_matrix_alike_before_the_depth_rule():
    plan = init_plan(Plain("span", "1/sqrt(L)"), width=WIDTH, base_init="normal", initializer_range=0.03)
    for name, draw in plan.items():
        halved = "o_proj.weight" in name or "down_proj" in name
        constant = draw.role in ("norm", "bias")
        assert draw.std == pytest.approx(0.0 if constant else 0.015 if halved else 0.03)


@pytest.mark.parametrize(("placement", "rule"), ARMS)
def test_arms_share_a_body_and_differ_by_std_alone(placement, rule):
    reference, arm = drawn("pre", "none"), drawn(placement, rule)
    plans = init_plan(reference, width=WIDTH), init_plan(arm, width=WIDTH)
    others = dict(arm.named_parameters())
    common = [(n, p) for n, p in reference.named_parameters() if n in others]
    assert len(common) >= 2 + 7 * DEPTH
    for name, parameter in common:
        a, b = plans[0][name], plans[1][name]
        if a.std:
            torch.testing.assert_close(parameter / a.std, others[name] / b.std)
        else:
            assert torch.equal(parameter - a.mean, others[name] - b.mean)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_one_seed_gives_one_model_and_another_seed_another():
    first, again, other = values(drawn(seed=3)), values(drawn(seed=3)), values(drawn(seed=4))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if value.std() > 0:
            # not merely different: unrelated
            pair = torch.stack([value.flatten(), other[name].flatten()])
            assert torch.corrcoef(pair)[0, 1].abs() < 5 / value.numel() ** 0.5


def test_two_tensors_of_one_model_are_unrelated():
    model = drawn()
    q, k = model.layers[0].self_attn.q_proj.weight, model.layers[1].self_attn.q_proj.weight
    assert torch.corrcoef(torch.stack([q.flatten(), k.flatten()]))[0, 1].abs() < 5 / q.numel() ** 0.5


def test_the_global_generator_has_no_say_and_is_left_alone():
    model = Plain()
    plan = init_plan(model, width=WIDTH)
    torch.manual_seed(1)
    init_weights_(model, plan)
    first = values(model)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    init_weights_(model, plan)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_a_parameter_rounds_the_draw_and_does_not_change_it(dtype):
    wide, model = drawn("span", "1/L"), Plain("span", "1/L").to(dtype)
    init_weights_(model, init_plan(model, width=WIDTH))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, wide.get_parameter(name).to(dtype))
    assert not init_receipt(model, init_plan(model, width=WIDTH)).mismatches


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_has_no_say_in_the_draw(dtype):
    # Transformers sets it while it builds a model in another dtype.
    wanted = values(drawn())
    model = Plain()
    torch.set_default_dtype(dtype)
    try:
        init_weights_(model, init_plan(model, width=WIDTH))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(wanted[n], p) for n, p in model.named_parameters())


def test_the_default_device_has_no_say_in_the_draw():
    # Building under `with torch.device("cuda")` is common; meta stands in for it on any machine.
    with torch.device("meta"):
        z = standard_normal(torch.Size([8, 8]), 0, "w")
    assert z.device.type == "cpu"
    assert torch.equal(z, standard_normal(torch.Size([8, 8]), 0, "w"))


def test_a_model_built_on_meta_device_is_planned_there_and_drawn_as_any_other():
    with torch.device("meta"):
        model = Plain("span", "layerscale")
    plan = init_plan(model, width=WIDTH)
    with pytest.raises(InputError, match=r"embed_tokens.weight is on meta device.*to_empty and init_weights_"):
        init_receipt(model, plan)
    model.to_empty(device="cpu")
    init_weights_(model, plan)
    wanted = values(drawn("span", "layerscale"))
    assert all(torch.equal(wanted[n], p) for n, p in model.named_parameters())


def test_a_prefix_is_taken_off_before_a_name_seeds():
    body, whole = drawn(), nn.Module()
    whole.model = Plain()
    init_weights_(whole, init_plan(whole, width=WIDTH), prefix="model.")
    assert all(torch.equal(p, whole.get_parameter(f"model.{n}")) for n, p in body.named_parameters())


def test_what_the_plan_does_not_name_is_left_alone():
    model = drawn(seed=1)
    before = values(model)
    name = "layers.1.mlp.up_proj.weight"
    init_weights_(model, {name: init_plan(model, width=WIDTH)[name]}, seed=2)
    assert [n for n, p in model.named_parameters() if not torch.equal(p, before[n])] == [name]


def mutate_scale(model: Plain) -> str:
    model.layers[2].mlp.down_proj.weight.data *= 1.5
    return "layers.2.mlp.down_proj.weight"


def mutate_depth(model: Plain) -> str:
    # the commonest mistake: the residual factor forgotten on one output matrix (1/√L of four blocks is 0.5)
    model.layers[0].self_attn.o_proj.weight.data *= 2
    return "layers.0.self_attn.o_proj.weight"


def mutate_mean(model: Plain) -> str:
    model.lm_head.weight.data += 0.25 * model.lm_head.weight.std()
    return "lm_head.weight"


def mutate_norm(model: Plain) -> str:
    model.layers[1].placement.ffn_norm.weight.data.zero_()
    return "layers.1.placement.ffn_norm.weight"


def mutate_one_gain(model: Plain) -> str:
    model.norm.weight.data[3] = 1.01
    return "norm.weight"


def mutate_bias(model: Plain) -> str:
    model.layers[3].self_attn.q_proj.bias.data[0] = 1e-3
    return "layers.3.self_attn.q_proj.bias"


def mutate_to_nan(model: Plain) -> str:
    model.embed_tokens.weight.data[0, 0] = math.nan
    return "embed_tokens.weight"


MUTATIONS = [mutate_scale, mutate_depth, mutate_mean, mutate_norm, mutate_one_gain, mutate_bias, mutate_to_nan]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_the_receipt_names_exactly_the_tensor_that_is_wrong(mutate):
    model = drawn("span", "1/sqrt(L)")
    plan = init_plan(model, width=WIDTH)
    assert not init_receipt(model, plan).mismatches
    wrong = mutate(model)
    receipt = init_receipt(model, plan)
    assert [row.name for row in receipt.mismatches] == [wrong]
    text = str(receipt)
    assert text.endswith("1 mismatch")
    assert [line.split()[0] for line in text.splitlines() if "✗" in line] == [wrong]


def test_the_receipt_has_a_row_for_every_tensor():
    model = drawn()
    receipt = init_receipt(model, init_plan(model, width=WIDTH))
    assert [(r.name, r.shape) for r in receipt.rows] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert str(receipt).endswith(f"{len(receipt.rows)} tensors, no mismatches")
    row = next(r for r in receipt.rows if r.name == "layers.0.mlp.down_proj.weight")
    assert row.expected == Draw("ffn_down", 0.0, INNER**-0.5)
    weight = model.layers[0].mlp.down_proj.weight.double()
    assert (row.mean, row.std) == pytest.approx((weight.mean().item(), weight.std(correction=0).item()))


def test_a_parameter_without_a_role_is_refused():
    model = Plain()
    model.adapter = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(InputError, match=r"no role is known for the parameter 'adapter.weight'.*roles=.*q_proj"):
        init_plan(model, width=WIDTH)


@pytest.mark.parametrize(("placement", "rule", "tied"), TIED_ARMS)
def test_the_optimizer_gets_every_parameter_once_with_the_rate_and_decay_of_its_role(placement, rule, tied):
    model = Plain(placement, rule, "layernorm", tied)
    got: dict[int, tuple[float, float]] = {}
    for group in parameter_groups(model, learning_rate=0.01, weight_decay=0.1):
        for parameter in group["params"]:
            assert id(parameter) not in got, "a parameter in two groups would be stepped twice"
            got[id(parameter)] = group["lr"], group["weight_decay"]
    assert got.keys() == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        leaf = name.split(".")[-2]
        inside = name.startswith("layers.") and (name.endswith("weight") or rule == "depth-mup")
        c = rate_factor(rule, leaf, block_of(name), DEPTH) if inside else 1.0
        # only matrices decay; an embedding is a table, and a tied head is that table
        decays = parameter.ndim == 2 and leaf != "embed_tokens" and not name.endswith("_mix")
        decay = 0.1 if rule == "depth-mup" else 0.1 / c
        assert got[id(parameter)] == pytest.approx((0.01 * c, decay if decays else 0.0)), name


def test_frozen_parameters_are_not_given_to_the_optimizer():
    model = Plain()
    model.lm_head.weight.requires_grad_(False)
    groups = parameter_groups(model, learning_rate=0.01, weight_decay=0.1)
    assert not any(p is model.lm_head.weight for g in groups for p in g["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters())) - 1


def test_groups_are_what_adamw_takes():
    groups = parameter_groups(Plain("span", "1/L:init+lr"), learning_rate=0.01, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    assert {(round(g["lr"], 9), round(g["weight_decay"], 9)) for g in optimizer.param_groups} == {
        (0.01, 0.1),
        (0.01, 0.0),
        (0.0025, 0.4),
    }


def test_completep_scales_adams_epsilon_in_the_blocks_alone():
    model = Plain("pre", "completep(2)")  # four blocks: L0/L is a half
    groups = parameter_groups(model, learning_rate=0.01, weight_decay=0.1, eps=1e-6)
    eps = {id(p): g.get("eps") for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert eps[id(parameter)] == (pytest.approx(5e-7) if name.startswith("layers.") else None), name
    optimizer = torch.optim.AdamW(groups, eps=1e-6)
    assert sorted({g["eps"] for g in optimizer.param_groups}) == pytest.approx([5e-7, 1e-6])


class Fused3(nn.Module):
    """Queries, keys and values of unequal size in one matrix, two groups of them; and one stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.placement = build_placement("deepnorm", hidden_size=WIDTH, layer_idx=0, num_layers=2)
        self.qkv = nn.Linear(WIDTH, 2 * (8 + 4 + 4), bias=False)
        self.out = nn.Parameter(torch.empty(32, WIDTH))


FUSED = {"qkv": Fused(("q", "k", "v"), sizes=(8, 4, 4), groups=2), "out": Fused(("attn_out",), transposed=True)}


def test_each_part_of_a_fused_matrix_is_drawn_and_held_by_its_own_role():
    model = Fused3()
    plan = init_plan(model, roles=FUSED)
    init_weights_(model, plan)
    beta = 16**-0.25  # DeepNorm's, on V and attention-out
    rows = model.qkv.weight.unflatten(0, (2, 16))
    for part, sigma in ((rows[:, :8], 0.25), (rows[:, 8:12], 0.25), (rows[:, 12:], 0.25 * beta)):
        assert part.std().item() == pytest.approx(sigma, rel=5 / (2 * part.numel()) ** 0.5)
    assert model.out.std().item() == pytest.approx(beta * 32**-0.5, rel=5 / (2 * model.out.numel()) ** 0.5)
    assert not init_receipt(model, plan).mismatches
    with torch.no_grad():
        model.qkv.weight.view(2, 16, WIDTH)[:, 12:] /= beta
    (row,) = init_receipt(model, plan).mismatches
    assert row.name == "qkv.weight" and row.expected.role == "v"


def test_width_and_tying_are_found_where_they_are_not_given():
    assert init_plan(Plain(tied=True))["embed_tokens.weight"].std == 0.25
    assert init_plan(Plain())["embed_tokens.weight"].std == 1.0
    with pytest.raises(
        InputError, match="Linear has neither a configuration nor a placement: give init_plan a `width`"
    ):
        init_plan(nn.Linear(2, 2), roles={"weight": "q"})


def test_an_unknown_role_is_refused():
    with pytest.raises(
        InputError, match=r"roles: 'self_attn\.x' has the role 'query'; choose one of embedding, head, q"
    ):
        init_plan(Plain(), roles={"self_attn.x": "query"})


def test_ones_own_names_come_before_what_a_module_is():
    model = Plain()
    model.gamma = nn.Parameter(torch.zeros(3))
    model.table = nn.Embedding(4, WIDTH)
    plan = init_plan(model, roles={"gamma": "norm", "table": "projection"})
    assert (plan["gamma"].role, plan["gamma"].mean) == ("norm", 1.0)
    assert (plan["table.weight"].role, plan["table.weight"].std) == ("projection", 0.25)
