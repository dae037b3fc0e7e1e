"""Depth rules and base init, held against the formulas and the goldens of the papers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spannorm.errors import InputError
from spannorm.scaling import BASE_INITS, ROLES, base_std, cut_std, depth_rule, depth_rule_names

# Written out a second time, by hand: the grammar's factors as exponent and multiple of L.
FACTORS = {
    "1/sqrt(L)": (1, 0.5), "1/sqrt(2L)": (2, 0.5), "1/L": (1, 1.0), "1/sqrt(b+1)": (1, 0.5), "1/sqrt(2(b+1))": (2, 0.5)
}  # fmt: skip
PLACES = ("", ":forward", ":init+lr", ":forward+lr", ":gain")
GRAMMAR = [f + b + w for f in FACTORS for b in ("", ":ffn") for w in PLACES]
NAMED = ["none", "deepnorm", "subln", "rezero", "layerscale", "ds-init", "wang", "torchtitan", "completep", "depth-mup"]
BODY = {"v", "attn_out", "ffn_gate", "ffn_up", "ffn_down"}
MATRICES = {"q", "k", *BODY}
INIT_ALONE = ("learning_rate", "weight_decay", "eps", "forward", "output_gain")

depths = st.integers(1, 10_000)


def expected_factor(name: str, depth: int, b: int = 0) -> float:
    multiple, exponent = FACTORS[name.split(":")[0]]
    return math.exp(-exponent * math.log(multiple * (b + 1 if "b+1" in name else depth)))


def effective(factors, role: str) -> float:
    """A role that is absent has factor 1."""
    return factors.get(role, 1.0)


def test_the_names_are_the_grammar_and_the_named_rules():
    assert sorted(depth_rule_names()) == sorted([*GRAMMAR, *NAMED])


@pytest.mark.parametrize("name", [*GRAMMAR, *NAMED])
def test_a_rule_records_its_name(name):
    assert depth_rule(name, 6).name == name


@given(name=st.sampled_from(GRAMMAR), depth=depths, part=st.floats(0, 1, exclude_max=True))
def test_a_factor_lands_where_the_suffix_says_and_nowhere_else(name, depth, part):
    b = int(part * depth)
    rule, c = depth_rule(name, depth, b), expected_factor(name, depth, b)
    forward, twin, ffn_only, gain = ":forward" in name, ":init+lr" in name, ":ffn" in name, ":gain" in name
    slowed, attn = name.endswith(":forward+lr"), 1.0 if ffn_only else c
    slow = dict.fromkeys(("q", "k", "v", "attn_out"), attn) | dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), c)

    for table, on in ((rule.forward, forward), (rule.output_gain, gain)):
        assert effective(table, "ffn") == pytest.approx(c if on else 1.0, rel=1e-12)
        assert effective(table, "attn") == pytest.approx(attn if on else 1.0, rel=1e-12)
    for role in ROLES:
        at_init = {"attn_out": attn, "ffn_down": c}.get(role, 1.0)
        assert effective(rule.init, role) == pytest.approx(1.0 if forward or gain else at_init, rel=1e-12)
        rate = at_init if twin else slow.get(role, 1.0) if slowed else 1.0
        assert effective(rule.learning_rate, role) == pytest.approx(rate, rel=1e-12)
        assert effective(rule.weight_decay, role) == pytest.approx(1 / rate, rel=1e-12)
    assert rule.learned == "" and not rule.eps


@given(depth=depths)
def test_none_changes_nothing_at_any_depth(depth):
    rule = depth_rule("none", depth)
    assert rule.learned == "" and not rule.init
    assert not any(getattr(rule, table) for table in INIT_ALONE)


@given(depth=depths)
def test_deepnorm_scales_values_and_ffn_by_beta_but_not_queries_and_keys(depth):
    rule = depth_rule("deepnorm", depth)
    assert set(rule.init) == BODY
    for factor in rule.init.values():
        assert factor**4 * 8 * depth == pytest.approx(1.0, rel=1e-12)
    assert rule.learned == "" and not any(getattr(rule, table) for table in INIT_ALONE)


@pytest.mark.parametrize(("depth", "beta"), [(12, 0.319472), (24, 0.268642), (32, 0.25)])
def test_deepnorm_beta_is_the_papers(depth, beta):
    assert depth_rule("deepnorm", depth).init["v"] == pytest.approx(beta, abs=5e-7)


@given(depth=depths)
def test_subln_scales_the_same_matrices_up_with_depth(depth):
    rule = depth_rule("subln", depth)
    assert set(rule.init) == BODY
    for factor in rule.init.values():
        assert math.exp(factor**2) == pytest.approx(2 * depth, rel=1e-9)
    assert rule.learned == "" and not any(getattr(rule, table) for table in INIT_ALONE)


@pytest.mark.parametrize(("depth", "factor"), [(12, 1.782710), (32, 2.039334)])
def test_subln_factor_is_the_papers(depth, factor):
    assert depth_rule("subln", depth).init["ffn_down"] == pytest.approx(factor, abs=5e-7)


BLOCKWISE = {
    "ds-init": (MATRICES, lambda b, L: 1 / math.sqrt(b + 1)),
    "wang": ({"attn_out", "ffn_down"}, lambda b, L: math.sqrt(10) / L),
    "torchtitan": ({"attn_out", "ffn_up", "ffn_down"}, lambda b, L: 1 / math.sqrt(2 * (b + 1))),
}


@pytest.mark.parametrize("name", BLOCKWISE)
@given(depth=st.integers(2, 500), part=st.floats(0, 1, exclude_max=True))
def test_rules_of_other_codes_scale_their_matrices_at_init_alone(name, depth, part):
    (roles, factor), b = BLOCKWISE[name], int(part * depth)
    rule = depth_rule(name, depth, b)
    for role in ROLES:
        wanted = factor(b, depth) if role in roles else 1.0
        assert effective(rule.init, role) == pytest.approx(wanted, rel=1e-12)
    assert not any(getattr(rule, table) for table in INIT_ALONE)


@given(depth=depths, width=st.integers(1, 10**5))
def test_wang_over_small_is_gpt_neoxs_std(depth, width):
    base = base_std("attn_out", width, width, width=width, base_init="small")
    std = effective(depth_rule("wang", depth).init, "attn_out") * base
    assert std == pytest.approx(2 / (depth * math.sqrt(width)), rel=1e-12)
    assert base == pytest.approx(math.sqrt(2 / (5 * width)), rel=1e-12)


@pytest.mark.parametrize(("name", "alpha"), [("completep", 1.0), ("depth-mup", 0.5)])
@given(depth=depths, base=st.one_of(st.none(), st.integers(1, 64)))
def test_completeps_table_at_both_exponents(name, alpha, depth, base):
    # arXiv 2505.01618, Table 1, m the depth over the base depth: forward m^-α, rates m^(α−1), ε m^-α, decay unchanged
    m = depth / (base or 2)
    rule = depth_rule(name if base is None else f"{name}({base})", depth)
    for branch in ("attn", "ffn"):
        assert effective(rule.forward, branch) == pytest.approx(m**-alpha, rel=1e-12)
    for role in ROLES:
        inside = role not in ("embedding", "head")
        assert effective(rule.learning_rate, role) == pytest.approx(m ** (alpha - 1) if inside else 1.0, rel=1e-12)
        assert effective(rule.eps, role) == pytest.approx(m**-alpha if inside else 1.0, rel=1e-12)
    assert not rule.init and not rule.weight_decay and not rule.output_gain


def test_output_gains_take_pangus_constants():
    rule = depth_rule("1/sqrt(L):gain(0.283,0.432)", 94)
    assert rule.output_gain == {"attn": pytest.approx(0.283 / 94**0.5), "ffn": pytest.approx(0.432 / 94**0.5)}
    assert depth_rule("1/sqrt(L):ffn:gain(0.283,0.432)", 94).output_gain == {"ffn": pytest.approx(0.432 / 94**0.5)}


@pytest.mark.parametrize("name", [
    "1/sqrt(L):gain(1)", "1/sqrt(L):gain(1,2,3)", "1/sqrt(L):gain(0,1)", "1/sqrt(L):gain(a,b)", "1/sqrt(L):forward(2)",
    "completep(0)", "completep(-1)", "completep(1,2)", "completep(nan)", "completep(inf)", "completep()", "wang(2)",
])  # fmt: skip
def test_numbers_that_a_rule_does_not_take_are_refused_in_words(name):
    with pytest.raises(InputError, match=r"takes (no numbers|\d positive numbers? in brackets, or none)\."):
        depth_rule(name, 8)


@given(depth=depths)
def test_rezero_is_one_learned_scalar_from_zero(depth):
    rule = depth_rule("rezero", depth)
    assert (rule.learned, rule.gain) == ("scalar", 0.0)
    assert not rule.init and not rule.learning_rate


@pytest.mark.parametrize(
    ("depth", "gain"), [(1, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6), (36, 1e-6), (1000, 1e-6)]
)
def test_layerscale_starts_in_three_steps(depth, gain):
    rule = depth_rule("layerscale", depth)
    assert (rule.learned, rule.gain) == ("vector", gain)
    assert not rule.init and not rule.learning_rate


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("none:ffn", "none"),
        ("none:forward", ""),  # as near to 1/L:forward as to none: naming either helps
        ("deepnorm:forward", "deepnorm"),
        ("rezero:ffn", "rezero"),
        ("1/sqrt(l)", "1/sqrt(L)"),
        ("1/sqrt(3L)", "1/sqrt("),
        ("1/sqrt(L):fnn", "1/sqrt(L):ffn"),
        ("1/sqrt(L):forward:ffn", "1/sqrt(L):f"),
        ("1/sqrt(L):ffn:ffn", "1/sqrt(L):ffn"),
        ("1/sqrt(L):forward:init+lr", "1/sqrt(L):"),
        ("1/L:init", "1/L:init+lr"),
        ("1/L:", "1/L"),
        ("deepnrom", "deepnorm"),
        ("layer_scale", "layerscale"),
    ],
)
def test_a_name_outside_the_grammar_is_refused_and_the_nearest_is_named(name, near):
    with pytest.raises(InputError) as caught:
        depth_rule(name, 4)
    message = str(caught.value)
    assert f"unknown depth rule {name!r}: did you mean '{near}" in message
    for known in (*GRAMMAR, *NAMED):
        assert known in message.split("Known: ")[1]


def test_an_empty_name_is_no_rule():
    with pytest.raises(InputError, match="unknown depth rule ''"):
        depth_rule("", 4)


@pytest.mark.parametrize("block", [-1, 4, 10**6])
@pytest.mark.parametrize("name", ["none", "1/sqrt(b+1)", "ds-init"])
def test_a_block_outside_the_model_is_refused(name, block):
    with pytest.raises(InputError, match=rf"layer_idx must lie in 0 … 3 for 4 blocks; got {block}\."):
        depth_rule(name, 4, block)


@pytest.mark.parametrize("depth", [0, -1])
@pytest.mark.parametrize("name", ["none", "1/sqrt(L)", "deepnorm", "layerscale"])
def test_a_model_without_blocks_is_refused(name, depth):
    with pytest.raises(InputError, match=f"at least 1 block.*{depth}"):
        depth_rule(name, depth)


WEIGHTS = ("q", "k", "v", "attn_out", "ffn_gate", "ffn_up", "ffn_down", "router", "projection")
sizes = st.integers(1, 10**6)


@given(role=st.sampled_from([*WEIGHTS, "head"]), fan_in=sizes, fan_out=sizes, width=sizes, tied=st.booleans())
def test_fan_in_keeps_unit_variance_through_every_matrix(role, fan_in, fan_out, width, tied):
    assert base_std(role, fan_in, fan_out, width=width, tied=tied) ** 2 * fan_in == pytest.approx(1.0, rel=1e-12)


@given(role=st.sampled_from(WEIGHTS), fan_in=sizes, fan_out=sizes, width=sizes, tied=st.booleans())
def test_xavier_stands_between_forward_and_backward(role, fan_in, fan_out, width, tied):
    std = base_std(role, fan_in, fan_out, width=width, base_init="xavier", tied=tied)
    assert std**2 * (fan_in + fan_out) / 2 == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("base_init", ["fan_in", "xavier"])
@given(width=sizes)
def test_an_embedding_has_unit_variance_as_the_blocks_read_it_and_so_has_a_logit(base_init, width):
    def std(role: str, tied: bool) -> float:
        return base_std(role, width, 32000, width=width, base_init=base_init, tied=tied)

    assert std("embedding", False) == 1.0
    # Tied to the head it has the head's std and is multiplied by √d on input.
    assert std("embedding", True) * math.sqrt(width) == pytest.approx(1.0, rel=1e-12)
    assert std("head", False) * math.sqrt(width) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("base_init", ["normal", "normal_cut"])
@given(
    role=st.sampled_from([*WEIGHTS, "head", "embedding"]),
    fan_in=sizes,
    fan_out=sizes,
    tied=st.booleans(),
    std=st.floats(1e-4, 1.0),
)
def test_normal_has_one_std_for_every_weight(base_init, role, fan_in, fan_out, tied, std):
    common = {"width": 7, "base_init": base_init, "tied": tied}
    assert base_std(role, fan_in, fan_out, initializer_range=std, **common) == std
    assert base_std(role, fan_in, fan_out, **common) == 0.02


@given(role=st.sampled_from([*WEIGHTS, "head", "embedding"]), fan_in=sizes, fan_out=sizes, width=sizes)
def test_megatron_has_one_std_for_every_weight_and_it_follows_the_width(role, fan_in, fan_out, width):
    std = base_std(role, fan_in, fan_out, width=width, base_init="megatron")
    assert std**2 * 2.5 * width == pytest.approx(1.0, rel=1e-12)


def test_megatron_at_width_2048_is_the_papers():
    assert base_std("ffn_down", 8192, 2048, width=2048, base_init="megatron") == pytest.approx(0.0139754, abs=5e-8)


def test_tiny_init_is_pangus_at_width_1024_and_32_blocks():
    tiny = {"width": 1024, "base_init": "tiny", "num_layers": 32}
    for role in ("q", "ffn_down", "router", "head"):
        assert base_std(role, 64, 128, **tiny) == 2**-8  # 1/√(2·1024·32)
    assert base_std("embedding", 1024, 50, **tiny) == 1.0
    for role in ("embedding", "head"):
        assert base_std(role, 1024, 50, tied=True, **tiny) == 2**-5


@pytest.mark.parametrize("base_init", BASE_INITS)
@pytest.mark.parametrize("role", ["norm", "bias", "gain"])
def test_norms_biases_and_gains_are_not_drawn(role, base_init):
    assert base_std(role, 64, 64, width=64, base_init=base_init) == 0.0


def test_every_role_has_a_base_std():
    assert set(ROLES) == {*WEIGHTS, "head", "embedding", "norm", "bias", "gain"}


def test_an_unknown_base_init_is_refused():
    with pytest.raises(InputError, match="unknown base_init 'fanin': did you mean 'fan_in'"):
        base_std("q", 64, 64, width=64, base_init="fanin")


def test_which_base_inits_are_cut_and_where():
    cuts = {name: cut for name, cut in BASE_INITS.items() if cut is not None}
    assert cuts == {"normal_cut": 3.0, "megatron": 3.0}
    assert set(BASE_INITS) - set(cuts) == {"fan_in", "normal", "small", "tiny", "xavier"}


@pytest.mark.parametrize("cut", [0.5, 1.0, 2.0, 3.0, 6.0])
def test_the_std_of_a_cut_normal_is_its_integral(cut):
    n = 200_000  # midpoints: the error is far below 1e-9
    z = [(i + 0.5) * cut / n for i in range(n)]
    density = [math.exp(-x * x / 2) for x in z]
    second = math.fsum(x * x * p for x, p in zip(z, density, strict=True)) / math.fsum(density)
    assert cut_std(cut) == pytest.approx(math.sqrt(second), rel=1e-9)
