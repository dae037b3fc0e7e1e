"""Families of Transformers, against a table read by hand from their source."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from spannorm.auditing import audit, audit_target, family_fields, resolve
from spannorm.auditing.families import survey
from spannorm.auditing.targets import of_model
from spannorm.errors import InputError

PRE, SANDWICH, OUTPUT = (
    "h = x + S(N(x)); x' = h + S(N(h))",
    "h = x + N(S(N(x))); x' = h + N(S(N(h)))",
    "h = x + N(S(x)); x' = h + N(S(h))",
)
PARALLEL, POST, ONE = "x' = x + S(N(x)) + S(N(x))", "h = N(x + S(x)); x' = N(h + S(h))", "x' = x + S(N(x))"
TABLE = {
    PRE: "llama qwen2 qwen3 mistral deepseek_v3 gpt2 gpt_oss glm phi3 opt mpt dbrx llama4 bloom nanochat bamba jamba "
         "lfm2 qwen3_next recurrent_gemma rwkv xlstm granite granitemoe bitnet",
    "h = x + 0.7·S(N(x)); x' = h + 0.7·S(N(h))": "minicpm3",  # 1.4/√4
    ONE: "mamba mamba2 nemotron_h",
    PARALLEL: "cohere gptj phi codegen gpt_neox",
    POST: "bart openai-gpt xlm",
    "h = N(N(x) + S(N(x))); x' = h + S(h)": "minimax",
    SANDWICH: "gemma2 gemma3_text glm4",
    "h1 = x + N(S(N(x))); h2 = h1 + N(S(N(h1))); x' = layer_scalar⊙h2 + layer_scalar⊙N(S(h2))": "gemma4_text",
    OUTPUT: "olmo2 olmo3 exaone4",
    "h = input_residual⊙x + S(N(x)); x' = post_attention_residual⊙h + S(N(h))": "doge",
    "h = 0.866·x + 0.5·N(S(N(x))); x' = 0.8944·h + 0.4472·N(S(N(h)))": "beam",  # √((i−1)/i), 1/√i at i = 4, 5
    "h = G·x + g⊙S(N(g⊙x)); x' = G·h + g⊙S(N(g⊙h))": "deepseek_v4",
    "h = x + g⊙S(N(x)); x' = h + g⊙S(N(h))": "qwen4_exp_text",
    "h = N(N(x) − lambda_1⊙N(x) + lambda_1⊙N(S(N(x)))); x' = h − lambda_2⊙h + lambda_2⊙N(S(h))": "dory",
}  # fmt: skip
WIRED = {name: text for text, names in TABLE.items() for name in names.split()}
FAST = ("llama", "gpt_neox", "gemma2", "bart", "minicpm3", "beam", "deepseek_v4", "mixtral")


def families(*names: str) -> dict[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {found.model_type: found for found in survey(names)}


def plain(text: str) -> str:
    """A sublayer is a sublayer, and two side by side that read the same are one."""
    text = re.sub(r"\b[AMF]\(", "S(", text)
    return text if text == PARALLEL else re.sub(r"(S\(N\(\w+\)\)) \+ \1", r"\1", text)


def check(name: str) -> None:
    found = families(name)[name]
    assert found.audit is not None, found.error
    block = found.audit.main.blocks[1]
    assert plain(block.text) == WIRED.get(name, PRE)
    assert block.residual is None or block.residual < 1e-5


@pytest.mark.parametrize("name", FAST)
def test_the_wiring_of_a_family(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(WIRED) - set(FAST)))
def test_the_wiring_of_every_family_in_the_table(name):
    check(name)


@pytest.mark.slow
def test_no_causal_lm_of_the_installed_transformers_crashes_the_audit():
    found = list(survey())
    assert len(found) > 100
    without = {f.model_type: f.error for f in found if f.audit is None}
    assert all(error for error in without.values()) and len(without) <= 8, without
    for f in found:
        if f.audit is not None:
            json.dumps(f.audit.to_dict())
            assert str(f.audit) and f.audit.main.blocks and len(f.audit.verdict) <= 10


def test_opt_with_its_norms_after_the_sum_is_post():
    from transformers import OPTConfig

    config = OPTConfig(do_layer_norm_before=False, word_embed_proj_dim=768)
    assert {plain(t) for t in audit(config).main.kinds()} == {POST}


def test_a_multiplier_is_in_the_equation_with_its_number():
    from transformers import GraniteConfig

    found = audit(GraniteConfig(residual_multiplier=0.22, embedding_multiplier=12.0, logits_scaling=8.0)).main
    assert set(found.kinds()) == {"h = x + 0.22·A(N(x)); x' = h + 0.22·F(N(h))"}
    assert found.ends.embedding_factor == pytest.approx(12.0) and found.ends.logit_factor == pytest.approx(1 / 8)
    assert found.match.placement is None and "0.22" in found.match.differs[0]


# Init -----------------------------------------------------------------------------------------------------------------


def test_one_output_scaled_and_the_other_not_is_said_with_the_numbers():
    found = families("nanochat")["nanochat"].audit
    off = [s.text for s in found.verdict if s.off]
    assert len(off) == 1 and off[0].startswith("FFN-down is not depth-scaled although attention-out is")
    rows = {r.role: r for r in found.init}
    for depth, std in rows["attention-out"].std_by_depth.items():
        assert std == pytest.approx(0.02 / (2 * depth) ** 0.5, rel=0.03)
    assert rows["attention-out"].depth_exponent == pytest.approx(-0.5, abs=0.03)
    assert rows["FFN-down"].depth_exponent == 0 and rows["FFN-down"].std == pytest.approx(0.02, rel=0.03)


def test_gpt2_draws_both_outputs_smaller_with_depth():
    found = families("gpt2")["gpt2"].audit
    assert found.ok
    for role in ("attention-out", "FFN-down"):
        row = next(r for r in found.init if r.role == role)
        assert row.rules[0] == "normal 0.02 × 1/√(2L)"
    assert (found.outlook.placement, found.outlook.depth_rule, found.outlook.depth) == ("pre", "1/sqrt(2L)", 12)


def test_xlstms_zeroed_projection_is_named():
    off = [s.text for s in families("xlstm")["xlstm"].audit.verdict if s.off]
    assert any("proj_up_gate" in text and "starts at zero" in text for text in off)


def test_a_factor_on_the_wrong_matrix_is_said():
    from transformers import CLIPVisionConfig

    found = audit(CLIPVisionConfig())  # Q, K, V are scaled in place of attention-out
    off = [s.text for s in found.verdict if s.off]
    assert any(t.startswith("attention-out is not depth-scaled although FFN-down is") for t in off)
    assert any(t.startswith("attention-in is depth-scaled and attention-out is not") for t in off)


def test_trained_weights_are_not_taken_for_an_init(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(vocab_size=160, **sizes))
    assert not isinstance(audit(model).init, str)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert audit(loaded).init == "trained weights: init cannot be read"
    assert not isinstance(audit_target(resolve(str(tmp_path))).init, str)  # its configuration, drawn anew


def test_the_theory_of_a_strangers_model_is_what_is_measured_in_it():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4,
             "num_key_value_heads": 4}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, **sizes))
    found = audit_target(of_model(model), {"input_ids": torch.randint(500, (2, 128)), "use_cache": False})
    assert (found.outlook.placement, found.outlook.depth_rule, found.outlook.depth) == ("pre", "none", 6)
    assert found.signal.growth == pytest.approx(found.outlook.growth, rel=0.1)
    assert found.signal.gradient_ratio == pytest.approx(found.outlook.gradient, rel=0.2)


# The command line -----------------------------------------------------------------------------------------------------


def test_strict_is_an_exit_code_and_json_holds_everything(tmp_path):
    from typer.testing import CliRunner

    from spannorm.cli import app

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ran = CliRunner().invoke(app, ["audit", "nanochat", "--strict", "--json", str(tmp_path / "a.json")])
        assert ran.exit_code == 1 and "FFN-down is not depth-scaled" in ran.output
        assert CliRunner().invoke(app, ["audit", "gpt2", "--strict"]).exit_code == 0
    saved = json.loads((tmp_path / "a.json").read_text())
    assert {"placement", "equation", "blocks", "init", "signal", "verdict"} <= set(saved)


def test_a_strangers_names_are_not_markup():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(16, 2, 24) for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    Odd.__name__ = "[bold red]odd[/nothing]"
    assert "[bold red]odd[/nothing]" in str(audit(Odd(), torch.randn(3, 4, 16)))


@pytest.mark.parametrize(
    ("target", "words"),
    [("no-such-family", "no configuration"), ("./nowhere", "no configuration"), ("json:no_such", "no function")],
)
def test_bad_targets_are_refused_in_words(target, words):
    with pytest.raises(InputError, match=words):
        resolve(target)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(InputError, match="no stack of blocks"):
        audit(torch.nn.Linear(4, 4), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("name", "equation", "by_block"),
    [
        ("vit_tiny_patch16_224", "h = x + A(N(x)); x' = h + F(N(h))", None),
        ("deit3_small_patch16_224", "h = x + gamma⊙A(N(x)); x' = h + gamma⊙F(N(h))", None),
        # BEiT divides both outputs of block b by √(2(b+1)): `fix_init_weight` of its authors and of timm
        ("beit_base_patch16_224", "h = x + gamma_1⊙A(N(x)); x' = h + gamma_2⊙F(N(h))", -0.5),
    ],
)
def test_a_vision_transformer_of_timm(name, equation, by_block):
    timm = pytest.importorskip("timm", reason="pip install timm torchvision")
    model = timm.create_model(name, pretrained=False, depth=4)
    found = audit(model, torch.randn(2, *model.default_cfg["input_size"]))
    assert list(found.main.kinds()) == [equation] and found.main.ends.final_norm in ("norm", "fc_norm")
    row = next(r for r in found.init if r.name == "blocks.*.mlp.fc2.weight")
    assert row.role == "FFN-down"
    assert row.block_exponent == (None if by_block is None else pytest.approx(by_block, abs=0.02))


def test_an_embedding_that_is_normalized_does_not_make_block_0_explode():
    found = families("bert")["bert"].audit
    assert found.outlook.placement == "post" and found.outlook.gradient_in_block_0 < 2
    assert {"bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"} <= set(
        found.main.ends.embeddings
    )


def test_of_images_and_of_lists_of_sublayers():
    found = audit_target(resolve("vit"))
    assert found.main.match.placement == "pre" and found.outlook is None  # no table says how large a patch is
    block = audit_target(resolve("t5")).main.blocks[1]
    assert [(s.letter, s.module) for s in block.sublayers] == [("A", "layer.0"), ("A", "layer.1"), ("F", "layer.2")]


# Rows for rewire ------------------------------------------------------------------------------------------------------


def test_the_fields_of_a_row_are_those_that_the_table_has_by_hand():
    from spannorm.rewiring import FAMILIES, Family

    for name in ("gpt2", "gemma2", "olmo2"):
        target = resolve(name)
        found = Family(**family_fields(audit_target(target), target.model))
        by_hand = FAMILIES[name]
        for field in ("layers", "final_norm", "attention", "ffn", "placement", "unit_gain"):
            assert getattr(found, field) == getattr(by_hand, field), field
        assert dict(found.norms) == dict(by_hand.norms) and set(found.embedding) == set(by_hand.embedding)
        assert found.scaled_embedding == by_hand.scaled_embedding
        written = {k: v for k, v in found.matrices.items() if v in ("attn_out", "ffn_down")}
        assert all(by_hand.matrices[k] == v for k, v in written.items())


# The docs -------------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_runs_as_printed(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "audit.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(block, {})
    assert "placement pre" in capsys.readouterr().out


@pytest.mark.slow
def test_the_reproductions_of_upstream_faults_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "upstream.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        (tmp_path / "block.py").write_text(block)
        ran = subprocess.run([sys.executable, "-W", "ignore", tmp_path / "block.py"], capture_output=True, text=True)
        assert ran.returncode == 0 and ran.stdout, ran.stderr
