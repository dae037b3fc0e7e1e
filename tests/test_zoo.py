"""Every registered placement against its equation; constants and goldens; methods that contain one another."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from arms import DEFAULT_RULE
from equations import own_parameters
from facts import EPS, EQUATIONS, F64, FACTS, WIDTH, Case
from torch import Tensor

from spannorm.errors import InputError
from spannorm.placements import PLACEMENTS, Placement, Stack, build_placement, register_placement
from spannorm.scaling import base_std

DEPTH = 4  # so that a quarter of the blocks, Mix-LN's lower ones, is one block
RULES = ("default", "none", "1/sqrt(L):forward", "1/L:ffn:forward", "rezero", "layerscale")
FACTORS: dict[str, Any] = {
    "1/sqrt(L):forward": (0.5, 0.5),
    "1/L:ffn:forward": (1.0, 0.25),
    "rezero": "scalar",
    "layerscale": "vector",
}


def new(name: str, b: int, rule: str | None = None, norm: str = "rmsnorm", depth: int = DEPTH, **options: Any):
    sizes = {"hidden_size": WIDTH, "layer_idx": b, "num_layers": depth}
    return build_placement(name, **sizes, depth_rule=rule, norm=norm, eps=EPS, **options).double()


def fill(placement: Placement, case: Case) -> dict[str, Tensor]:
    """Give the placement the case's norms and gains: all of them, and it has no others."""
    own = own_parameters(placement)
    outside = {"mix", "proj", "up", "down", "x"}
    assert set(own) == set(case.leaves) - outside
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(case.leaves[name])
    return own


def same(actual: list[Tensor], wanted: list[Tensor], names: list[str]) -> None:
    for name, a, w in zip(names, actual, wanted, strict=True):
        assert w.abs().max() > 1e-7, f"{name}: nothing to compare"
        torch.testing.assert_close(a, w, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_every_registered_placement_has_an_equation_here():
    assert list(EQUATIONS) == list(PLACEMENTS)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_each_block_and_all_its_gradients_are_those_of_the_equation(name, rule, norm):
    for b in range(DEPTH):
        case = Case(norm, b, DEPTH, FACTORS.get(rule, (1.0, 1.0)))
        x = case.leaf("x", 2, 3, *FACTS[name].state(b), WIDTH)
        expected = EQUATIONS[name](case, x)
        placement = new(name, b, None if rule == "default" else rule, norm)
        own = fill(placement, case)
        actual = placement(x, case.A, case.F)
        upstream = torch.randn_like(expected)
        theirs = torch.autograd.grad(expected, list(case.leaves.values()), upstream)
        ours = torch.autograd.grad(actual, [own.get(n, t) for n, t in case.leaves.items()], upstream)
        same([actual, *ours], [expected, *theirs], [f"block {b} output", *case.leaves])


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("rule", ["default", "layerscale"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_whole_stack_and_all_its_gradients_are_those_of_the_equations(name, rule, depth):
    cases = [Case("rmsnorm", b, depth, FACTORS.get(rule, (1.0, 1.0))) for b in range(depth)]
    x = torch.randn(2, 3, WIDTH, dtype=F64, requires_grad=True)
    expected = x
    for case in cases:
        expected = EQUATIONS[name](case, expected)
    actual, ours, theirs, names = x, [x], [x], ["x"]
    for b, case in enumerate(cases):
        placement = new(name, b, None if rule == "default" else rule, depth=depth)
        own = fill(placement, case)
        actual = placement(actual, case.A, case.F)
        ours += [own.get(n, t) for n, t in case.leaves.items()]
        theirs += list(case.leaves.values())
        names += [f"block {b} {n}" for n in case.leaves]
    assert actual.shape == x.shape
    upstream = torch.randn_like(expected)
    same(
        [actual, *torch.autograd.grad(actual, ours, upstream)],
        [expected, *torch.autograd.grad(expected, theirs, upstream)],
        ["output", *names],
    )


@pytest.mark.parametrize("b", [0, 2])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_read_is_what_attention_is_given_but_for_the_norm_and_its_factor(name, b):
    placement = new(name, b)
    for key, parameter in own_parameters(placement).items():
        if key not in ("attn_norm.weight", "initial_norm.weight"):  # their gains would turn what they read
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    given: list[Tensor] = []
    x = torch.randn(2, 3, *FACTS[name].state(b), WIDTH, dtype=F64)
    placement(x, lambda n: given.append(n) or torch.tanh(n), torch.tanh)
    read = placement.read(placement.enter(x) if b == 0 else x)
    assert read.shape == (2, 3, WIDTH)
    cosine = torch.nn.functional.cosine_similarity(given[0], read, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("depth", "alpha"), [(12, 2.213364), (24, 2.632148), (32, 2.828427)])
def test_deepnorm_alpha_is_the_papers_at_every_block(depth, alpha):
    for b in (0, depth // 2, depth - 1):
        assert new("deepnorm", b, depth=depth).alpha == pytest.approx(alpha, abs=5e-7)


def test_layernorm_scaling_at_the_32nd_layer_is_the_papers():
    assert new("lns", 31, depth=32).factor == pytest.approx(0.176777, abs=5e-7)


def test_keels_skip_factor_is_the_number_of_sublayers_and_1_in_block_0():
    assert [new("keel", b, depth=32).alpha for b in (0, 1, 31)] == [1.0, 64.0, 64.0]
    assert [new("keel", b, depth=32, alpha=7.0).alpha for b in (0, 1, 31)] == [1.0, 7.0, 7.0]
    for alpha in (1.0, 0.5, -3.0, float("nan")):
        with pytest.raises(InputError, match=r"alpha.* must be (above 1|a finite number)"):
            new("keel", 1, alpha=alpha)


def test_hybridnorms_own_base_init_is_the_papers():
    base = PLACEMENTS["hybrid"].recommended_base_init
    assert base_std("q", 2048, 2048, width=2048, base_init=base) == pytest.approx(0.0139754, abs=5e-8)


@pytest.mark.parametrize("name", [name for name, fact in FACTS.items() if fact.constant])
@pytest.mark.parametrize("depth", [1, 2, 1000])
def test_constants_are_floats_at_every_depth_and_no_part_of_the_state(name, depth):
    attribute, formula = FACTS[name].constant
    for b in {0, depth // 2, depth - 1}:
        placement = new(name, b, depth=depth)
        value = getattr(placement, attribute)
        assert type(value) is float
        assert value == pytest.approx(formula(b, depth), rel=1e-12)
        assert all("norm" in key for key in placement.state_dict())
        assert not list(placement.buffers())


def share(one: Placement, other: Placement) -> None:
    """The same random norms in both."""
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, 1.0, 0.3)
    other.load_state_dict(one.state_dict())


def assert_equal_blocks(one: Placement, other: Placement) -> None:
    share(one, other)
    x = torch.randn(2, 3, WIDTH, dtype=F64)
    assert torch.equal(one(x, torch.tanh, torch.sin), other(x, torch.tanh, torch.sin))


@pytest.mark.parametrize("rule", ["none", "1/sqrt(L):forward"])
@pytest.mark.parametrize("depth", [1, 3, 4, 7, 8, 12])
@pytest.mark.parametrize("a", [0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
def test_mix_is_postnorm_below_and_prenorm_above(a, depth, rule):
    # exact: the fractions here times the depths, in integers
    lower = (round(a * 100) * depth) // 100
    for b in range(depth):
        block = new("mix", b, rule, depth=depth, post_fraction=a)
        parent = "post" if b < lower else "pre"
        assert type(block) is PLACEMENTS[parent]
        assert_equal_blocks(new(parent, b, rule, depth=depth), block)


def test_mix_needs_a_final_norm_unless_it_is_postnorm_throughout():
    assert [Stack("mix", DEPTH, options={"post_fraction": a}).final_norm for a in (0.0, 0.25, 0.75, 1.0)] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("a", [-0.01, 1.01, float("nan")])
def test_mix_refuses_a_fraction_that_is_none(a):
    with pytest.raises(InputError, match=r"post_fraction.* must (lie in \[0, 1\]|be a finite number)"):
        new("mix", 0, post_fraction=a)


# Where a method says that a block of it is a block of another, from the same sublayers.
EQUAL_BLOCKS = [("lns", 0, "pre"), ("hybrid_star", 0, "pre"), ("subln", 0, "pre"), ("subln", 3, "pre")]
EQUAL_BLOCKS += [("hybrid_star", b, "hybrid") for b in (1, 2, 3)]


@pytest.mark.parametrize("rule", ["none", "1/sqrt(L):forward"])
@pytest.mark.parametrize(("name", "b", "parent"), EQUAL_BLOCKS)
def test_a_block_that_is_another_methods_block_computes_the_same(name, b, parent, rule):
    assert_equal_blocks(new(parent, b, rule), new(name, b, rule))


def test_keels_skip_alone_keeps_its_direction():
    # with both branches off, only the skip's direction is left: α cancels in the norm
    placement = new("keel", 2)
    for norm in placement.children():
        norm.eps = 0.0
    x = torch.randn(2, 3, WIDTH, dtype=F64)
    unit = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(placement(x, torch.zeros_like, torch.zeros_like), unit)


DISCOURAGED = [("lns", rule, "undoes LayerNorm Scaling") for rule in ("1/sqrt(L)", "1/L:ffn", "1/sqrt(2L):init+lr")]
DISCOURAGED += [("lns", "deepnorm", "undoes"), ("subln", "deepnorm", "not to be mixed"), ("deepnorm", "subln", "mixed")]


@pytest.mark.parametrize(("name", "rule", "reason"), DISCOURAGED)
def test_a_discouraged_pair_warns_once_a_stack_with_its_source_and_runs(name, rule, reason):
    with pytest.warns(UserWarning, match=rf"{reason}.*arXiv") as caught:
        first = new(name, 0, rule)
    assert len(caught) == 1
    assert f"with depth rule {rule!r}" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new(name, 1, rule)
    assert first(torch.randn(1, 2, WIDTH, dtype=F64), torch.tanh, torch.tanh).shape == (1, 2, WIDTH)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_no_other_pair_warns(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in (None, "none", "1/sqrt(L):forward", "1/L:ffn:forward", "rezero", "layerscale", DEFAULT_RULE[name]):
            new(name, 0, rule)


def test_a_taken_name_is_refused_and_the_same_again_is_not():
    with pytest.raises(InputError, match="'span' is taken"):
        register_placement("span", PLACEMENTS["pre"])
    before = dict(PLACEMENTS)
    register_placement("span", PLACEMENTS["span"])
    assert before == PLACEMENTS


@pytest.mark.parametrize(
    ("fraction", "depth", "lower"), [(0.29, 100, 29), (0.57, 100, 57), (0.58, 50, 29), (0.25, 7, 1)]
)
def test_mix_counts_its_lower_blocks_exactly(fraction: float, depth: int, lower: int) -> None:
    kinds = [
        type(build_placement("mix", hidden_size=2, layer_idx=i, num_layers=depth, post_fraction=fraction)).__name__
        for i in range(depth)
    ]
    assert kinds == ["PostNorm"] * lower + ["PreNorm"] * (depth - lower)
