"""Families without a row: what the audit finds is one. Held to hand-written equations and to the untouched model."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rewire_families import EXPERTS, checkpoint, tiny_config_of
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTForCausalLM

import spannorm
from spannorm import InputError
from spannorm.rewiring import FAMILIES, Family
from spannorm.rewiring import found as by_audit

IDS = torch.randint(3, 37, (2, 9), generator=torch.Generator().manual_seed(5))
BERT: dict[str, Any] = {"is_decoder": True, "type_vocab_size": 2}
BART: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "forced_eos_token_id": None,
}  # fmt: skip
# two kinds of blocks
MIXERS: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 8}
WITHOUT_A_ROW: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # fc1, an activation, fc2 and dropouts that are functions
    "bert": BERT,  # sums and norms inside other modules, no final norm
    "bart": BART,  # PostNorm after an embedding norm, layers of a decoder
    "bloom": {},  # modules that add the skip themselves
    "cohere": {},  # side by side
    "qwen3_next": {
        **MIXERS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
        **EXPERTS,
    },
    "xglm": {"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48},
}
OWN = {"bert": "post", "bart": "post", "cohere": "parallel"}


def tiny(family: str, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    config = tiny_config_of(family, **{**WITHOUT_A_ROW.get(family, {}), **more})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) * (p.std() if p.ndim > 1 else 1.0))
    return model


def pair(family: str, **more: Any) -> tuple[Any, Any]:
    model = tiny(family, **more)
    return model, copy.deepcopy(model)


def gradients(model: Any) -> dict[str, Any]:
    torch.manual_seed(1)  # of the dropouts
    model.train()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", WITHOUT_A_ROW)
def test_rewired_to_its_own_wiring_it_computes_the_same_and_learns_the_same(family):
    assert family not in FAMILIES
    before, after = pair(family)
    report = spannorm.rewire(after, OWN.get(family, "pre"), depth_rule="none")
    assert not report.added and not report.dropped and f"no row was written for {family}" in str(report)
    with torch.no_grad():
        wanted, got = (m.eval()(IDS, use_cache=False).logits for m in (before, after))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0 if family != "cohere" else 1e-6)
    old, new = gradients(before), gradients(after)
    torch.testing.assert_close(
        sorted(g.norm().item() for g in old.values() if g is not None),
        sorted(g.norm().item() for g in new.values() if g is not None), rtol=1e-5, atol=1e-7,
    )  # fmt: skip


def test_span_in_opt_is_the_equation_around_its_own_matrices():
    before, after = pair("opt", dropout=0.0)
    spannorm.rewire(after, "span", depth_rule="none", init=False)
    seen: list[Any] = []
    for layer in after.model.decoder.layers:
        layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True)
        layer.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        after.eval()(IDS, use_cache=False)
        for b, old in enumerate(before.eval().model.decoder.layers):
            (x, kwargs), actual, p = seen[2 * b], seen[2 * b + 1], after.model.decoder.layers[b].placement
            n = p.initial_norm(x) if b == 0 else x
            attention = old.self_attn(n, attention_mask=kwargs["attention_mask"])[0]
            h = F.layer_norm(x + attention, (32,), p.attn_norm.weight, p.attn_norm.bias)
            y = F.layer_norm(x + old.fc2(F.relu(old.fc1(h))), (32,), p.ffn_norm.weight, p.ffn_norm.bias)
            torch.testing.assert_close(actual, y, rtol=1e-5, atol=1e-5)
    assert isinstance(after.model.decoder.final_layer_norm, nn.Identity)


@pytest.mark.parametrize("family", WITHOUT_A_ROW)
def test_generation_saving_and_checkpointing(family, tmp_path: Path):
    model = tiny(family)
    spannorm.rewire(model, "span", depth_rule="1/sqrt(L)")
    model.eval()
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    outputs = [model.generate(IDS, use_cache=c, output_logits=True, **how) for c in (True, False)]
    for cached, uncached in zip(*(o.logits for o in outputs), strict=True):
        torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = spannorm.load(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)
    if not model.supports_gradient_checkpointing:
        return
    plain = gradients(model)
    checkpoint(again)
    for name, gradient in gradients(again).items():
        assert (gradient is None and plain[name] is None) or torch.equal(gradient, plain[name]), name


def unchanged(model: Any, before: dict[str, Any]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in now)


@pytest.mark.parametrize(
    ("family", "more", "placement", "rule", "words"),
    [
        ("mamba", {"state_size": 4}, "span", None, "one sublayer a block"),
        ("gpt_bigcode", {"multi_query": True}, "hybrid", "none", "which rows of attn.c_attn are whose"),
        ("gpt_bigcode", {"multi_query": True}, "post", "deepnorm", "which rows of attn.c_attn are whose"),
        ("opt", WITHOUT_A_ROW["opt"], "span", "no-such-rule", "no-such-rule"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_changes(family, more, placement, rule, words):
    model = AutoModelForCausalLM.from_config(tiny_config_of(family, **more))
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(InputError, match=re.escape(words)):
        spannorm.rewire(model, placement, depth_rule=rule)
    assert unchanged(model, before) and classes == [type(m) for m in model.modules()]


def test_a_wrong_row_is_caught_before_it_is_used(monkeypatch: pytest.MonkeyPatch):
    right = by_audit.family_fields

    def swapped(*args: Any) -> dict[str, Any]:
        fields = right(*args)
        return {**fields, "norms": dict(zip(fields["norms"], reversed(fields["norms"].values()), strict=True))}

    monkeypatch.setattr(by_audit, "family_fields", swapped)
    monkeypatch.setattr(by_audit, "_KNOWN", {})
    with pytest.raises(InputError, match="computes something else in eval mode"):
        spannorm.rewire(tiny("opt"), "span")


def test_a_dropout_that_was_overlooked_is_caught(monkeypatch: pytest.MonkeyPatch):
    right = by_audit.family_fields

    def dry(*args: Any) -> dict[str, Any]:
        fields = right(*args)
        return {**fields, "steps": {k: tuple(s for s in v if s.path) for k, v in fields["steps"].items()}}

    monkeypatch.setattr(by_audit, "family_fields", dry)
    monkeypatch.setattr(by_audit, "_KNOWN", {})
    with pytest.raises(InputError, match="computes something else in training mode"):
        spannorm.rewire(tiny("opt", dropout=0.1), "span")


def test_an_argument_that_the_audit_never_saw_used_is_refused():
    model = tiny("bart", is_decoder=True, add_cross_attention=True)
    spannorm.rewire(model, "span")
    with pytest.raises(InputError, match="nothing read 'encoder_hidden_states'"):
        model(IDS, encoder_hidden_states=torch.randn(2, 4, 32))


def test_a_redraw_leaves_what_has_no_role_to_its_module():
    model = tiny("qwen3_next")
    spannorm.rewire(model, "span", init="redraw")
    plan, layer = spannorm.init_plan(model), model.model.layers[0].linear_attn
    receipt = spannorm.init_receipt(model, plan)
    assert not receipt.mismatches
    assert any(name.endswith("A_log") for name in receipt.kept) and bool((layer.A_log.exp() > 0).all())
    assert any(name.endswith("linear_attn.out_proj.weight") for name in plan)


# Names that are not the family's --------------------------------------------------------------------------------------


class AliasConfig(LlamaConfig):
    model_type = "llama_under_another_name"


class OwnConfig(LlamaConfig):
    model_type = "somebodys_own"


class OwnLayer(nn.Module):
    """A layer of somebody's own: PreNorm by hand, other names."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

        self.mixer, self.ff = LlamaAttention(config, layer_idx), LlamaMLP(config)
        self.before, self.between = nn.RMSNorm(config.hidden_size, 1e-6), nn.RMSNorm(config.hidden_size, 1e-6)

    def forward(self, hidden_states: Any, attention_mask: Any = None, position_embeddings: Any = None, **kwargs: Any):
        mixed, _ = self.mixer(
            hidden_states=self.before(hidden_states), attention_mask=attention_mask,
            position_embeddings=position_embeddings, **kwargs,
        )  # fmt: skip
        h = hidden_states + mixed
        return h + self.ff(self.between(h))


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(OwnLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


SIZES = {k: v for k, v in tiny_config_of("llama").to_dict().items() if k != "model_type"}


def test_a_family_under_another_name_is_the_family():
    model = LlamaForCausalLM(AliasConfig(**SIZES))
    report = spannorm.rewire(model, "span")
    assert report.family == "llama_under_another_name" and "audit" not in str(report)
    assert report.kept == {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def test_a_model_of_somebodys_own_is_rewired_and_loaded(tmp_path: Path):
    AutoConfig.register("somebodys_own", OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM, exist_ok=True)
    model = OwnForCausalLM(OwnConfig(**SIZES)).eval()
    report = spannorm.rewire(model, "span")
    assert report.kept == {"attn_norm": "before", "ffn_norm": "between"}
    model.save_pretrained(tmp_path)
    again = spannorm.load(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_a_row_of_ones_own_comes_before_the_audit(monkeypatch: pytest.MonkeyPatch):
    row = Family(layers="decoder.layers", final_norm="decoder.final_layer_norm", attention="nothing_there")
    monkeypatch.setitem(FAMILIES, "opt", row)
    with pytest.raises(InputError, match="row of 'opt' does not fit OPTForCausalLM"):
        spannorm.rewire(OPTForCausalLM(tiny_config_of("opt", **WITHOUT_A_ROW["opt"])), "span")


@pytest.mark.slow
def test_most_causal_lms_of_transformers_are_rewired_by_what_the_audit_found():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from spannorm.rewiring.survey import BITS, ROUNDED, rewired

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = {name: rewired(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert sum(why in (BITS, ROUNDED) for why in said.values()) >= 120
    assert all(said.values())


def test_a_family_may_hand_its_arguments_on_by_position():
    from transformers import CpmAntConfig, CpmAntForCausalLM

    sizes = {"vocab_size": 37, "hidden_size": 16, "num_attention_heads": 2, "dim_head": 8, "dim_ff": 24}
    config = CpmAntConfig(**sizes, num_hidden_layers=2, prompt_types=4, prompt_length=4, segment_types=4)
    model = CpmAntForCausalLM(config).eval()
    before = model(IDS)
    spannorm.rewire(model, "pre", depth_rule="none", init=False)
    torch.testing.assert_close(model(IDS, return_dict=False)[0], before.logits)
