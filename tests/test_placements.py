"""Every placement against its equation, written here in float64 with nothing from the package."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from arms import ARMS, FULL, rules_of
from equations import own_parameters
from facts import FACTS
from torch import Tensor

from spannorm.errors import InputError
from spannorm.placements import PLACEMENTS, Placement, Stack, build_placement, placement_options

WIDTH, DEPTH, EPS = 8, 4, 1e-3
POSITIONS = {"first": 0, "middle": 2, "last": DEPTH - 1}
F64 = torch.float64

# What a rule multiplies the branches with in the forward pass at block b of four, by hand: (attention, FFN).
FORWARD = {
    "1/sqrt(L)": lambda b: 0.5,
    "1/sqrt(2L)": lambda b: 1 / math.sqrt(8),
    "1/L": lambda b: 0.25,
    "1/sqrt(b+1)": lambda b: 1 / math.sqrt(b + 1),
    "completep": lambda b: 0.5,  # a base depth of 2
    "depth-mup": lambda b: 1 / math.sqrt(2),
}


def forward_factors(rule: str, b: int) -> tuple[float, float]:
    word, *more = rule.removesuffix("+lr").split(":")  # +lr slows the steps alone
    if more[-1:] != ["forward"] and word not in ("completep", "depth-mup"):
        return 1.0, 1.0
    c = FORWARD[word](b)
    return (1.0 if "ffn" in more else c), c


class Reference:
    """One block, its norms and its two sublayers as plain tensors with gradients."""

    def __init__(self, norm: str, learned: str, rule: str, b: int = 0) -> None:
        self.norm = norm
        self.leaves: dict[str, Tensor] = {}
        for name in ("attn_norm", "ffn_norm", "initial_norm"):
            self.leaf(f"{name}.weight", WIDTH)
            if norm == "layernorm":
                self.leaf(f"{name}.bias", WIDTH)
        self.ca, self.cf = forward_factors(rule, b)
        if learned:
            shape = (1,) if learned == "scalar" else (WIDTH,)
            self.ca, self.cf = (self.leaf(f"gains_norm.{n}_scale", *shape) for n in ("attn", "ffn"))
        self.mix, self.proj = self.leaf("mix", 3, 3), self.leaf("proj", WIDTH, WIDTH)
        self.up, self.down = self.leaf("up", WIDTH, 12), self.leaf("down", 12, WIDTH)
        self.x = self.leaf("x", 2, 3, WIDTH)

    def leaf(self, name: str, *shape: int) -> Tensor:
        self.leaves[name] = torch.randn(shape, dtype=F64, requires_grad=True)
        return self.leaves[name]

    def A(self, x: Tensor) -> Tensor:
        return self.mix @ torch.tanh(x @ self.proj)

    def F(self, x: Tensor) -> Tensor:
        u = x @ self.up
        return (u * torch.sigmoid(u)) @ self.down

    def N(self, x: Tensor, name: str) -> Tensor:
        weight = self.leaves[f"{name}.weight"]
        if self.norm == "rmsnorm":
            return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
        x = x - x.mean(-1, keepdim=True)
        return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) + self.leaves[f"{name}.bias"]

    def pre(self) -> Tensor:
        h = self.x + self.ca * self.A(self.N(self.x, "attn_norm"))
        return h + self.cf * self.F(self.N(h, "ffn_norm"))

    def post(self) -> Tensor:
        h = self.N(self.x + self.ca * self.A(self.x), "attn_norm")
        return self.N(h + self.cf * self.F(h), "ffn_norm")

    def span(self, initial_norm: bool) -> Tensor:
        read = self.N(self.x, "initial_norm") if initial_norm else self.x
        h = self.N(self.x + self.ca * self.A(read), "attn_norm")
        return self.N(self.x + self.cf * self.F(h), "ffn_norm")


def new(name: str, rule: str | None = None, layer_idx: int = 1, norm: str = "rmsnorm", **options: Any) -> Placement:
    placement = build_placement(
        name,
        hidden_size=WIDTH,
        layer_idx=layer_idx,
        num_layers=DEPTH,
        depth_rule=rule,
        norm=norm,
        eps=EPS,
        **options,
    )
    return placement.double()


def stream(name: str) -> Tensor:
    """What a middle block reads."""
    return torch.randn(2, 3, *FACTS[name].state(1), WIDTH, dtype=F64)


def compare(placement: Placement, reference: Reference, expected: Tensor) -> None:
    """Outputs and the gradient of every tensor agree, and the placement has no parameter the equation lacks."""
    own = dict(placement.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            assert parameter.shape == reference.leaves[name].shape
            parameter.copy_(reference.leaves[name])
    actual = placement(reference.x, reference.A, reference.F)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    used = {n: t for n, t in reference.leaves.items() if "norm" not in n or n in own}
    upstream = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, list(used.values()), upstream)
    ours = torch.autograd.grad(actual, [own.get(n, t) for n, t in used.items()], upstream)
    for name, wanted, got in zip(used, theirs, ours, strict=True):
        assert wanted.abs().max() > 1e-6, f"{name} has no gradient to compare"
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("rule", rules_of("pre"))
@pytest.mark.parametrize("name", FULL)
def test_output_and_all_gradients_are_those_of_the_equation(name, rule, norm, position):
    placement = new(name, rule, POSITIONS[position], norm)
    reference = Reference(norm, {"rezero": "scalar", "layerscale": "vector"}.get(rule, ""), rule, POSITIONS[position])
    if name == "span":
        expected = reference.span(initial_norm=position == "first")
    else:
        expected = {"pre": reference.pre, "post": reference.post}[name]()
    compare(placement, reference, expected)


@pytest.mark.parametrize("layer_idx", range(DEPTH))
@pytest.mark.parametrize("initial_norm", ["attention", "embedding", "none"])
def test_the_readings_of_spannorms_first_block_differ_in_block_0_only(initial_norm, layer_idx):
    placement = new("span", "none", layer_idx, initial_norm=initial_norm)
    reference = Reference("rmsnorm", "", "none")
    compare(placement, reference, reference.span(initial_norm == "attention" and layer_idx == 0))
    # Whether the model norms the embedding is a fact of the stack: every block must say the same.
    assert placement.embedding_norm == (initial_norm == "embedding")


def test_spannorm_reads_attention_through_a_norm_in_block_0_by_default():
    assert isinstance(new("span", layer_idx=0).initial_norm, type(new("span").attn_norm))


def test_spannorms_second_skip_starts_at_the_blocks_input():
    # With attention's norm silenced h = 0, so that all of x' but F(0) comes over the second skip.
    # In PostNorm that skip starts at h, and nothing of x is left.
    x = torch.randn(2, 3, WIDTH, dtype=F64)
    outputs = {}
    for name in ("span", "post"):
        placement = new(name, "none")
        with torch.no_grad():
            placement.attn_norm.weight.zero_()
        outputs[name] = placement(x, torch.tanh, torch.zeros_like)
    torch.testing.assert_close(outputs["span"], x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS))
    assert outputs["post"].abs().max() < 1e-12  # a gain of zero is held 2^-60 away from it


@pytest.mark.parametrize("name", PLACEMENTS)
def test_sublayers_are_opaque_and_called_once_each_attention_first(name):
    calls: list[str] = []

    def sublayer(who: str):
        def call(x: Tensor) -> Tensor:
            calls.append(who)
            return torch.zeros_like(x)

        return call

    new(name)(stream(name), sublayer("attn"), sublayer("ffn"))
    assert calls == ["attn", "ffn"]


@pytest.mark.parametrize("name", PLACEMENTS)
def test_what_belongs_to_a_placement_is_what_its_authors_give_it(name):
    placement, stack, fact = new(name, layer_idx=DEPTH - 1), Stack(name, DEPTH), FACTS[name]
    assert placement.rule.name == stack.depth_rule == fact.rule
    assert placement.final_norm is stack.final_norm is fact.final_norm
    assert placement.embedding_norm is stack.embedding_norm is fact.embedding_norm
    assert dict(placement.inner_norms) == dict(stack.inner_norms) == fact.inner_norms
    assert stack.kind.recommended_base_init == fact.base_init
    assert dict(placement.output_norms) == fact.output_norms
    assert placement_options(name) == list(fact.options)


@pytest.mark.parametrize(("name", "rule"), ARMS)
def test_constants_are_floats_and_the_state_holds_norms_and_learned_gains_alone(name, rule):
    placement = new(name, rule, layer_idx=1, norm="layernorm")
    expected = {f"{n}.{p}" for n in FACTS[name].norms for p in ("weight", "bias")} | set(FACTS[name].own(1, WIDTH))
    if rule in ("rezero", "layerscale"):
        expected |= {"attn_scale", "ffn_scale"}
        # the rule's start: 0, or 0.1 up to 18 blocks
        start = torch.full(((1,) if rule == "rezero" else (WIDTH,)), 0.0 if rule == "rezero" else 0.1, dtype=F64)
        torch.testing.assert_close(placement.attn_scale.detach(), start)
        torch.testing.assert_close(placement.ffn_scale.detach(), start)
    else:
        assert type(placement.attn_scale) is float
        assert type(placement.ffn_scale) is float
    assert set(own_parameters(placement)) == expected
    assert len(placement.state_dict()) == len(expected)
    assert not list(placement.buffers())


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_placement_built_on_meta_device_computes_what_it_would_have_computed(name):
    with torch.device("meta"):
        late = new(name, "1/L:forward")
    early = new(name, "1/L:forward")
    late.to_empty(device="cpu").load_state_dict(early.state_dict())
    x = stream(name)
    assert torch.equal(late(x, torch.tanh, torch.sin), early(x, torch.tanh, torch.sin))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_stack_of_one_block_is_first_and_last_at_once(name):
    placement = build_placement(name, hidden_size=WIDTH, layer_idx=0, num_layers=1)
    assert placement(torch.randn(2, 3, WIDTH), torch.tanh, torch.tanh).shape == (2, 3, WIDTH)


def test_a_placement_prints_its_place_and_its_rule():
    assert "block 2 of 4, depth_rule='1/L:ffn'" in repr(new("span", "1/L:ffn", 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "spam"}, r"unknown placement 'spam': did you mean 'span'\? Known: pre, post, span"),
        ({"name": "PreNorm"}, r"unknown placement 'PreNorm'"),
        ({"rule": "1/sqrt(l)"}, r"unknown depth rule '1/sqrt\(l\)': did you mean '1/sqrt\(L\)'"),
        ({"rule": ""}, r"unknown depth rule ''"),
        ({"norm": "layer_norm"}, r"unknown norm 'layer_norm': did you mean 'layernorm'"),
        ({"initial_norm": "atention"}, r"unknown initial_norm 'atention': did you mean 'attention'"),
        ({"inital_norm": "none"}, r"placement 'span' has no option 'inital_norm': it takes initial_norm"),
        ({"name": "pre", "initial_norm": "none"}, r"placement 'pre' has no option 'initial_norm': it takes none"),
        ({"layer_idx": DEPTH}, r"layer_idx must lie in 0 … 3 for 4 blocks; got 4"),
        ({"layer_idx": -1}, r"layer_idx must lie in 0 … 3 for 4 blocks; got -1"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_rule_the_value_and_the_way_out(given, message):
    with pytest.raises(InputError, match=message):
        new(**{"name": "span", **given})


def test_a_stack_without_blocks_is_refused_in_words_that_name_the_depth():
    with pytest.raises(InputError, match="at least 1 block"):
        build_placement("span", hidden_size=WIDTH, layer_idx=0, num_layers=0)
