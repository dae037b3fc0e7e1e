"""DyT as a norm: the formula, where it may stand, how it is drawn and decayed, and its theory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from equations import F64, WIDTH, Case, own_parameters
from facts import EPS, EQUATIONS, FACTS
from torch import Tensor

from spannorm import SpanNormConfig, SpanNormForCausalLM, parameter_groups, theory
from spannorm.errors import InputError
from spannorm.norms import build_norm
from spannorm.placements import PLACEMENTS, build_placement
from spannorm.theory.body import Squash
from spannorm.theory.covariance import outer

TAKES = ("pre", "lns", "gpas", "parallel", "channel", "mhc", "attnres", "attnres_block")


class Squashed(Case):
    """The equations' case, its norm written out."""

    def N(self, x: Tensor, name: str) -> Tensor:
        squashed = torch.tanh(self.leaf(f"{name}.alpha", 1) * x)
        return self.leaf(f"{name}.weight", WIDTH) * squashed + self.leaf(f"{name}.bias", WIDTH)


def model(**given: object) -> SpanNormForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SpanNormForCausalLM(SpanNormConfig(vocab_size=37, norm="dyt", **{"placement": "pre", **sizes, **given}))


def test_a_fresh_dyt_is_the_tanh_of_half_of_what_it_reads() -> None:
    norm, x = build_norm("dyt", WIDTH, gain=0.3), torch.randn(2, 3, WIDTH)
    torch.testing.assert_close(norm(x), 0.3 * torch.tanh(0.5 * x))
    normed, total = norm(x, 2 * x, skip=3.0, branch=0.5, return_sum=True)
    torch.testing.assert_close((normed, total), (0.3 * torch.tanh(2 * x), 4 * x))
    assert {n: p.shape for n, p in norm.named_parameters()} == {"weight": (WIDTH,), "alpha": (1,), "bias": (WIDTH,)}


@pytest.mark.parametrize("name", TAKES)
def test_placements_that_take_it_are_their_equation(name: str) -> None:
    fact = FACTS[name]
    case = Squashed("dyt", 1, 4, (1.0, 1.0))
    placement = build_placement(name, hidden_size=WIDTH, layer_idx=1, num_layers=4, depth_rule="none", norm="dyt",
                                eps=EPS).double()  # fmt: skip
    x = torch.randn(2, 3, *(fact.state(1) if fact.several else ()), WIDTH, dtype=F64, requires_grad=True)
    with torch.no_grad():
        for leaf, parameter in own_parameters(placement).items():
            parameter.copy_(case.leaf(leaf, *parameter.shape))
    ours, theirs = placement(x, case.A, case.F), EQUATIONS[name](case, x)
    torch.testing.assert_close(ours, theirs)
    own = own_parameters(placement)
    gradients = torch.autograd.grad(ours.sum(), [x, *own.values()])
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs.sum(), [x, *(case.leaves[n] for n in own)]))


@pytest.mark.parametrize("name", [name for name in PLACEMENTS if name not in TAKES])
def test_where_a_norm_must_fix_a_scale_it_is_refused_in_words(name: str) -> None:
    for build in (
        lambda: model(placement=name, num_hidden_layers=4),
        lambda: theory.predict(name, 4, body=theory.Body(norm="dyt")),
    ):
        with pytest.raises(InputError, match=r"norm 'dyt' squashes.*: choose a placement such as pre"):
            build()


def test_it_is_drawn_as_planned_not_decayed_and_saved(tmp_path) -> None:
    m = model()
    assert not m.init_receipt().mismatches
    plan = m.init_plan()
    site = "model.layers.1.placement.ffn_norm"
    assert [plan[f"{site}.{leaf}"].mean for leaf in ("weight", "alpha", "bias")] == [1.0, 0.5, 0.0]
    assert plan["model.norm.alpha"].mean == 0.5, "the final norm is one too"
    torch.nn.init.constant_(m.model.norm.alpha, 0.7)
    assert [row.name for row in m.init_receipt().mismatches] == ["model.norm.alpha"]
    decayed = {id(p) for group in parameter_groups(m, learning_rate=1.0, weight_decay=0.1) if group["weight_decay"]
               for p in group["params"]}  # fmt: skip
    assert not decayed & {id(p) for n, p in m.named_parameters() if "norm" in n}
    m.save_pretrained(tmp_path)
    again, ids = SpanNormForCausalLM.from_pretrained(tmp_path), torch.arange(8)[None]
    assert torch.equal(again.eval()(ids).logits, m.eval()(ids).logits)


def test_it_exports_and_trains_under_autocast() -> None:
    m, ids = model(), torch.arange(8)[None]
    exported = torch.export.export(m.eval(), (), {"input_ids": ids, "use_cache": False}, strict=False).module()
    torch.testing.assert_close(exported(input_ids=ids, use_cache=False).logits, m(ids).logits)
    with torch.autocast("cpu", torch.bfloat16):
        m(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


def test_the_theory_of_a_squash_is_the_mean_over_normal_fields() -> None:
    """E[y y'] and E[slope slope'], Monte Carlo over two million pairs of tokens with the given std and correlation."""
    norm = build_norm("dyt", 1)
    with torch.no_grad():
        norm.weight.fill_(0.8)
        norm.bias.fill_(0.1)
        norm.alpha.fill_(0.6)
    std, rho = np.array([0.5, 4.0]), 0.4
    correlation = np.array([[1.0, 1.0], [1.0, rho], [rho, 1.0]])
    found = Squash(norm, correlation * outer(std))
    z = np.random.default_rng(0).standard_normal((2, 2_000_000))
    a, b = std[0] * z[0], std[1] * (rho * z[0] + (1 - rho**2) ** 0.5 * z[1])
    y, slope = [0.8 * np.tanh(0.6 * x) + 0.1 for x in (a, b)], [0.48 * (1 - np.tanh(0.6 * x) ** 2) for x in (a, b)]
    tolerance = {"rel": 5e-3, "abs": 1e-3}
    assert found.writes[0] == pytest.approx([(v * v).mean() for v in y], **tolerance)
    assert found.writes[1, 1] == found.writes[2, 0] == pytest.approx((y[0] * y[1]).mean(), **tolerance)
    back = found.backward(np.ones((3, 2)))
    assert back[0] == pytest.approx([(s * s).mean() for s in slope], **tolerance)
    assert back[1, 1] == pytest.approx((slope[0] * slope[1]).mean(), **tolerance)


def test_one_token_through_prenorm_with_dyt_is_the_closed_form() -> None:
    """A lone token under fan-in init: attention is two matrices (v = u = 1) of what tanh(x/2) leaves, so
    q ← q + E tanh² + E[silu²(σz)]·σ², and the gradient's power grows by 1 + E[slope²]·u at each sum."""
    body = theory.Body(sequence_length=1, norm="dyt")
    found = theory.predict("pre", 3, depth_rule="none", body=body)
    z, w = np.polynomial.hermite_e.hermegauss(120)
    w = w / w.sum()
    q, gain = 1.0, 1.0
    for _ in range(3):
        x = q**0.5 * z
        gain *= 1 + (0.5 / np.cosh(0.5 * x) ** 2) ** 2 @ w
        q += np.tanh(0.5 * x) ** 2 @ w
        x = q**0.5 * z
        read = np.tanh(0.5 * x) ** 2 @ w
        g = read**0.5 * z
        gate = 1 / (1 + np.exp(-g))
        up, slope = (g * gate) ** 2 @ w, (gate * (1 + g * (1 - gate))) ** 2 @ w
        gain *= 1 + ((0.5 / np.cosh(0.5 * x) ** 2) ** 2 @ w) * (up + slope * read)
        q += up * read
    assert found.variance["output"][-1] == pytest.approx(q, rel=1e-4)
    assert 2 * found.log_total_gain == pytest.approx(np.log(gain), rel=1e-3)


def test_the_theory_never_answers_for_another_norm() -> None:
    squashed, normed = (theory.predict("pre", 8, body=theory.Body(norm=norm)) for norm in ("dyt", "rmsnorm"))
    assert squashed.variance["output"][-1] < 0.9 * normed.variance["output"][-1]
    with pytest.raises(theory.NoRule, match="queries and keys"):
        theory.predict("pre", 8, body=theory.Body(norm="dyt", qk_norm=True))
    with pytest.raises(InputError, match="unknown norm"):
        theory.Body(norm="dytt")
