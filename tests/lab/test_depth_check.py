"""The depth check: its rows, its words, its refusals."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from spannorm import theory
from spannorm.cli import app
from spannorm.errors import InputError
from spannorm.lab.depth import check as lab
from spannorm.lab.depth.figures import draw
from spannorm.lab.depth.theory import DEFAULT, body_of, cases
from spannorm.lab.depth.words import show, words
from spannorm.models import SpanNormForCausalLM
from spannorm.train.data import TokenData
from spannorm.train.recipe import Recipe
from spannorm.train.run import model_config

MEASURED = {"variance", "skip_gain", "total_gain", "attention_share", "ffn_share", "effective_rank", "block_skip_cost"}


@pytest.fixture(scope="module")
def checked(recipe: Recipe, tokens: TokenData):
    chosen = cases(recipe, ["post", "residual"], ["none", "default", "1/sqrt(L)"], [2, 5])
    return chosen, lab.depth_check(chosen, steps=[3, 0], seeds=2, data=tokens.directory)


def test_every_stack_is_measured_at_every_step_and_predicted_at_init(checked):
    chosen, results = checked
    assert [stack.key for stack in chosen] == [  # `default` is `none` here: one stack
        (p, rule, depth) for p in ("post", "residual") for rule in ("none", "1/sqrt(L)") for depth in (2, 5)
    ]
    rows = {}
    for row in results["rows"]:
        assert set(row) == {*lab.Quantity.__annotations__, "relative_error"}
        rows.setdefault((row["placement"], row["depth_rule"], row["depth"], row["step"]), {})[row["quantity"]] = row
    assert set(rows) == {(*stack.key, step) for stack in chosen for step in (0, 3)}
    for (*_, step), found in rows.items():
        assert found.keys() >= MEASURED
        for quantity, row in found.items():
            assert row["measured"] is not None, quantity
            if step or quantity in ("loss", "effective_rank", "block_skip_cost"):
                assert row["predicted"] is None is row["relative_error"]
        if not step:
            for gain in ("skip_gain", "total_gain"):
                row = found[gain]
                assert math.log(row["predicted"]) == pytest.approx(math.log(row["measured"]), abs=0.5)
                assert row["relative_error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    for stack in chosen:
        assert rows[*stack.key, 3]["loss"]["measured"] < rows[*stack.key, 0]["loss"]["measured"]
    json.dumps(results, allow_nan=False)


def test_training_is_the_engines_and_measuring_leaves_it_alone(recipe, tokens):
    chosen = cases(recipe, ["span"], ["none"], [2])
    often = lab.depth_check(chosen, steps=[0, 1, 2, 3], data=tokens.directory)
    once = lab.depth_check(chosen, steps=[3], data=tokens.directory)
    last = [[row for row in results["rows"] if row["step"] == 3] for results in (often, once)]
    assert last[0] == last[1]


def test_words_say_what_was_predicted_and_what_was_measured(checked, capsys, tmp_path):
    chosen, results = checked
    sentences = words(chosen, results)
    assert sum(s.startswith("post none, 5 blocks: ") for s in sentences) == 1
    assert all("measured ×" in s and "after 3 steps ×" in s for s in sentences if "blocks: " in s)
    advice = [s for s in sentences if s.startswith("post: at 5 blocks and at initialization choose ")]
    assert len(advice) == 1 and advice[0].endswith((" none.", " 1/sqrt(L)."))
    gains = {
        row["depth_rule"]: row["measured"] for row in results["rows"]
        if (row["placement"], row["depth"], row["step"], row["quantity"]) == ("post", 5, 3, "total_gain")
    }  # fmt: skip
    kept = [rule for rule, gain in gains.items() if 0.5 <= gain <= 2]
    under = ", ".join(kept) if kept else f"none of {', '.join(gains)}"
    assert f"post: after 3 steps within a factor 2 under {under}." in sentences
    show(chosen, results, tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == results["rows"] and written["words"] == sentences
    out = capsys.readouterr().out
    assert "…" not in out, "a cell of the table was cut"
    for kind in ("png", "svg"):
        drawn = draw(chosen, results, tmp_path / f"figure.{kind}")
        assert [path.name for path in drawn] == [f"figure.{kind}", f"figure-training.{kind}"]
        assert all(path.stat().st_size > 10_000 for path in drawn)


def test_the_theorys_body_is_the_models(recipe):
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    (stack,) = cases(replace(recipe, model={**recipe.model, **more}), ["span"], ["none"], [2])
    body = stack.body
    model = SpanNormForCausalLM(model_config(stack.recipe))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert body.attention_size == attention.q_proj.out_features
    assert (body.num_experts, 2 * body.moe_intermediate_size) == mlp.experts.gate_up_proj.shape[:2]
    assert body.is_sparse(0)
    for role, weight in (("q", attention.q_proj.weight), ("router", mlp.gate.weight)):
        fan_out, fan_in = weight.shape
        assert body.power(role, fan_in, fan_out) == pytest.approx(weight.var().item(), rel=0.35)


def test_repeats_are_counted_between_positions():
    assert lab.repeats(torch.tensor([[1, 1, 1]])) == 1
    assert lab.repeats(torch.tensor([[1, 2, 3]])) == 0
    assert lab.repeats(torch.tensor([[1, 1, 2, 3], [4, 5, 6, 7]])) == pytest.approx(2 / 24)


@pytest.mark.parametrize("arguments,message", [
    (["--placements", "spam"], "spam"),
    (["--depth-rules", "1/sqrt(l)"], "1/sqrt(L)"),
    (["--depths", "0"], "layers"),
    (["--depths", "8,x"], "whole numbers"),
    (["--depths", ""], "at least one"),
    (["--plot", "figure.jpg"], ".png or .svg"),
    (["--set", "model.hidden_sise=8"], "hidden_size"),
])  # fmt: skip
@pytest.mark.parametrize("verb", ["theory", "depth-check"])
def test_refusals(verb, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, [verb, *arguments])
    assert isinstance(ran.exception, InputError) and message in str(ran.exception)
    assert not list(tmp_path.iterdir()), "time was spent first"


@pytest.mark.parametrize("arguments", [["--steps", "-1"], ["--steps", ""]])
def test_refusals_of_measuring(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, ["depth-check", *arguments])
    assert isinstance(ran.exception, InputError) and "steps" in str(ran.exception)
    assert not list(tmp_path.iterdir())


def test_theory_prints_a_table_and_a_verdict_without_a_model(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spannorm.models", None)
    out = tmp_path / "rows.json"
    ran = CliRunner().invoke(app, ["theory", "--placements", "span,pre", "--depths", "8,1000", "--json", str(out)])
    assert ran.exit_code == 0, ran.output
    assert "span 1/sqrt(L), 1000 blocks: keeps the gradient within a factor 2" in ran.output
    assert "span: at 1000 blocks and at initialization choose 1/sqrt(L)." in ran.output
    rows = json.loads(out.read_text())["rows"]
    gain = next(r for r in rows if (r["depth"], r["quantity"], r["depth_rule"]) == (1000, "total_gain", "1/sqrt(L)"))
    body = body_of(DEFAULT)
    assert gain["predicted"] == pytest.approx(math.exp(theory.predict("span", 1000, body=body).log_total_gain))
    assert gain["measured"] is None


def test_a_placement_that_the_theory_cannot_follow_is_measured_without_a_prediction(
    recipe, tokens, tmp_path, monkeypatch
):
    from own_placements import Mixed

    from spannorm.placements import PLACEMENTS

    monkeypatch.setitem(PLACEMENTS, "mixed", Mixed)
    chosen = cases(recipe, ["mixed", "pre"], ["default"], [3])
    results = lab.depth_check(chosen, steps=[0, 2], data=tokens.directory)
    gains = {row["placement"]: row for row in results["rows"] if row["quantity"] == "total_gain" and row["step"] == 0}
    assert gains["mixed"]["predicted"] is None and gains["mixed"]["measured"] > 0
    assert gains["pre"]["predicted"] is not None
    (sentence,) = [s for s in words(chosen, results) if s.startswith("mixed none, 3 blocks")]
    assert "measured without a prediction (placement 'mixed'" in sentence and "'linear'" in sentence
    assert not any(s.startswith("mixed: ") and "choose" in s for s in words(chosen, results))
    assert all(path.stat().st_size > 10_000 for path in draw(chosen, results, tmp_path / "figure.png"))


def test_theory_takes_a_placement_of_ones_own_from_a_file(tmp_path):
    from spannorm.placements import PLACEMENTS

    file = tmp_path / "mine.py"
    file.write_text(
        "from spannorm import Placement, register_placement\n\n\n"
        "class Mine(Placement):\n    final_norm = True\n\n"
        "    def block(self, x, attn, ffn):\n        return x + attn(self.attn_norm(x)) + ffn(self.ffn_norm(x))\n\n\n"
        'register_placement("mine", Mine)\n'
    )
    try:
        ran = CliRunner().invoke(app, ["theory", "--placements", "mine", "--depths", "8", "--import", str(file)])
        assert ran.exit_code == 0 and "mine none, 8 blocks: " in ran.output, ran.output
    finally:
        del PLACEMENTS["mine"]
