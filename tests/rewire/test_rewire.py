"""What `rewire` says and refuses, and the tools of Transformers that go on working around it."""

from __future__ import annotations

import copy
import io
import json
import pickle
import sys
import warnings
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from rewire_families import tiny_config_of, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

import spannorm
from spannorm import InputError
from spannorm.rewiring import FAMILIES, Family, redraw_

IDS = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(5))


def span_llama(**how: Any) -> Any:
    model = tiny_model("llama").eval()
    spannorm.rewire(model, "span", **how)
    return model


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[name], y[name]) for name in x)


# What it says


def test_the_report_names_norms_weights_and_ends():
    model = tiny_model("llama")
    report = spannorm.rewire(model, "span", depth_rule="1/sqrt(L):ffn")
    assert report.kept == {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    assert report.added == ("initial_norm",) and report.dropped == () and not report.final_norm
    assert report.weights == tuple(f"model.layers.{b}.mlp.down_proj.weight" for b in range(3))
    text = str(report)
    assert "3 llama layers rewired to span, depth rule 1/sqrt(L):ffn" in text
    assert "final norm removed" in text and "init: rescale, 3 tensors changed" in text and "for training" in text


def test_a_placement_without_a_familys_norms_drops_them_and_says_so():
    report = spannorm.rewire(tiny_model("gemma2"), "pre")
    assert report.dropped == ("post_attention_layernorm", "post_feedforward_layernorm")
    assert "dropped: post_attention_layernorm, post_feedforward_layernorm" in str(report)


@pytest.mark.parametrize(
    ("family", "placement", "how", "words"),
    [
        ("granite", "span", {}, "each branch keeps granite's multiplier 0.22"),
        ("qwen3", "hybrid", {}, "qwen3's own norms on q, k stand in"),
        ("deepseek_v3", "hybrid", {}, "deepseek_v3's own norms on q, k, v stand in"),
        ("mixtral", "subln", {}, "the experts of a layer share one norm"),
        ("gpt2", "pre", {}, "gpt2 draws attention-out and FFN-down at 1/√(2L) itself"),
        ("gpt2", "span", {"init": "redraw"}, "gpt2 does not multiply it by √d on input"),
    ],
)
def test_what_the_placement_does_not_know_of_is_noted(family, placement, how, words):
    assert any(words in note for note in spannorm.rewire(tiny_model(family), placement, **how).notes)


@pytest.mark.parametrize("family", ["gpt_neox", "stablelm"])
def test_a_parallel_residual_becomes_two_steps_and_the_report_says_so(family):
    model = tiny_model(family, use_parallel_residual=True).eval()
    one_norm = family == "stablelm"  # side by side, attention and FFN share it
    report = spannorm.rewire(model, "pre", depth_rule="none")
    assert any("side by side" in note for note in report.notes)
    assert report.added == (("ffn_norm",) if one_norm else ())
    turns = tiny_model(family, use_parallel_residual=False).eval()
    spannorm.rewire(turns, "pre", depth_rule="none")
    turns.load_state_dict(model.state_dict())
    assert torch.equal(model(IDS).logits, turns(IDS).logits)


def test_loaded_weights_are_rewired_only_when_init_is_said_and_then_with_a_warning(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"loaded from a checkpoint.*init=False to keep them"):
        spannorm.rewire(LlamaForCausalLM.from_pretrained(tmp_path), "span")
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="train the model before you use it"):
        spannorm.rewire(model, "span", init=False)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, plain.model.layers[0].mlp.down_proj.weight)
    spannorm.rewire(plain, "pre", depth_rule="none", init=False)  # the same function: nothing to warn of
    # a fresh model of a loaded configuration holds no loaded weights
    spannorm.rewire(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)), "span")


def test_a_norm_that_is_added_or_dropped_is_said_to_change_the_function(monkeypatch: pytest.MonkeyPatch):
    # Cohere's layers have one norm and run attention and FFN side by side: PreNorm needs another one
    monkeypatch.setitem(FAMILIES, "cohere", Family(norms={"attn_norm": "input_layernorm"}))
    model = AutoModelForCausalLM.from_config(tiny_config_of("cohere"), attn_implementation="eager").eval()
    before = model(IDS).logits
    report = spannorm.rewire(model, "pre", depth_rule="none")
    assert report.added == ("ffn_norm",) and not torch.allclose(model(IDS).logits, before)
    assert "no longer what cohere computes" in str(report)
    same = spannorm.rewire(tiny_model("llama"), "pre", depth_rule="none")
    assert "no longer" not in str(same)


def test_depth_scaled_gains_fall_on_the_norms_of_the_branches_outputs():
    for family, unit in (("olmo2", 1.0), ("gemma2", 0.0)):
        for init in ("rescale", "redraw", False):
            model = tiny_model(family)
            report = spannorm.rewire(model, ROWS_OF[family], depth_rule="1/sqrt(L):gain(0.283,0.432)", init=init)
            for name, parameter in model.named_parameters():
                leaf = name.split(".")[-2]
                c = {"olmo2": {"attn_norm": 0.283, "ffn_norm": 0.432},
                     "gemma2": {"attn_output_norm": 0.283, "ffn_output_norm": 0.432}}[family].get(leaf)  # fmt: skip
                if c and "placement" in name:
                    gain = c / 3**0.5 if init else 1.0
                    torch.testing.assert_close(parameter + 1 - unit, torch.full_like(parameter, gain))
                    assert (name in report.weights) == bool(init)
    with pytest.raises(InputError, match=r"PreNorm has none there: choose a placement that has, such as peri"):
        spannorm.rewire(tiny_model("llama"), "pre", depth_rule="1/sqrt(L):gain")


ROWS_OF = {"olmo2": "olmo2", "gemma2": "peri"}


# What it refuses


def test_an_unknown_family_that_an_audit_cannot_read_is_refused_with_the_reason_and_a_way_to_add_a_row():
    config = AutoConfig.for_model("mamba", vocab_size=37, hidden_size=32, num_hidden_layers=3, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(InputError, match=r"'mamba' has no row(?s:.*)one sublayer a block(?s:.*)FAMILIES\['mamba'\] = "):
        spannorm.rewire(model, "span")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and len(before) == 32


def test_a_row_of_ones_own_makes_a_family_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FAMILIES, "cohere2_like", Family())
    config = tiny_config_of("llama")
    monkeypatch.setattr(type(config), "model_type", "cohere2_like")
    model = LlamaForCausalLM(config)
    assert spannorm.rewire(model, "post").family == "cohere2_like"
    monkeypatch.setitem(FAMILIES, "cohere2_like", Family(norms={"attn_norm": "ln_1"}, attention="attn"))
    with pytest.raises(InputError, match=r"row of 'cohere2_like' does not fit .*: its layers have no attn, ln_1"):
        spannorm.rewire(LlamaForCausalLM(config), "post")
    monkeypatch.setitem(FAMILIES, "cohere2_like", Family(layers="h"))
    with pytest.raises(InputError, match="it has no layers at 'h'"):
        spannorm.rewire(LlamaForCausalLM(config), "post")
    monkeypatch.setitem(FAMILIES, "cohere2_like", Family(matrices={"self_attn.o_proj": "attn_out"}))
    with pytest.raises(InputError, match=r"'subln' has a norm at ffn_down, and the row .* names no matrix for it"):
        spannorm.rewire(LlamaForCausalLM(config), "subln")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"placement": "spam"}, "unknown placement 'spam': did you mean 'span'"),
        ({"placement": "span", "depth_rule": "1/l"}, "unknown depth rule '1/l'"),
        ({"placement": "span", "init": "rescal"}, "unknown init 'rescal': did you mean 'rescale'"),
        ({"placement": "span", "initial": "none"}, "placement 'span' has no option 'initial'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_changed(how, words):
    model = tiny_model("llama")
    with pytest.raises(InputError, match=words):
        spannorm.rewire(model, **how)
    assert same_weights(model, tiny_model("llama")) and type(model.model.layers[0]) is LlamaDecoderLayer
    spannorm.rewire(model, "span")
    with pytest.raises(InputError, match="rewired already"):
        spannorm.rewire(model, "pre")


def test_plain_modules_and_cross_attention_are_refused():
    with pytest.raises(InputError, match=r"not a Linear: .* spannorm.Block"):
        spannorm.rewire(nn.Linear(2, 2), "span")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gpt2 with `add_cross_attention` cannot be rewired"):
        spannorm.rewire(tiny_model("gpt2", add_cross_attention=True), "span")


# What goes on working


def test_layers_and_norms_stay_of_their_classes_under_their_names():
    model = span_llama()
    layer = model.model.layers[1]
    assert isinstance(layer, LlamaDecoderLayer) and isinstance(layer.placement.attn_norm, LlamaRMSNorm)
    assert type(layer).__name__ in model._no_split_modules
    assert type(layer) is type(model.model.layers[2]), "one class for all layers"
    out = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    with torch.no_grad():
        torch.testing.assert_close(out.hidden_states[1], layer_output(model, 0))


def layer_output(model: Any, index: int) -> torch.Tensor:
    seen = []
    hook = model.model.layers[index].register_forward_hook(lambda *a: seen.append(a[2]))
    model(IDS)
    hook.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("placement", ["span", "residual", "siamese", "mixed_input", "mhc", "attnres"])
def test_hidden_states_have_one_shape_and_are_those_of_our_own_model(placement, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 37}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = spannorm.SpanNormConfig(**sizes, **heads, placement=placement, embedding_multiplier=1.0)
    model = tiny_model("llama").eval()
    spannorm.rewire(model, placement)
    ours = spannorm.SpanNormForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "query")):
            parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
    ours.load_state_dict(model.state_dict())
    expected = ours(IDS, output_hidden_states=True).hidden_states
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "body")
    for again in (model, copy.deepcopy(model), spannorm.load(tmp_path / "whole"), spannorm.load(tmp_path / "body")):
        found = again(IDS, output_hidden_states=True).hidden_states
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found[-1].shape == (2, 9, 32)
    assert signature(model.model.forward) == signature(LlamaModel.forward.__get__(model.model))
    some, theirs = (
        m.model(IDS, output_hidden_states=[1, -1], return_dict=False)[-1] for m in (model, tiny_model("llama"))
    )
    first = len(expected) - len(theirs)  # Transformers 5.17 counts from the first layer's output, 5.24 from its input
    asked = [i for i, h in enumerate(theirs) if h is not None]
    assert [i for i, h in enumerate(some) if h is not None] == asked and 1 in asked
    torch.testing.assert_close([some[i] for i in asked], [expected[first + i] for i in asked], rtol=1e-4, atol=1e-5)


def test_the_embedding_is_normalized_where_the_placement_says_whether_ids_or_embeddings_come_in():
    model = span_llama(initial_norm="embedding")
    x = model.model.embed_tokens(IDS)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    raw = span_llama(initial_norm="none")
    torch.testing.assert_close(model(IDS).logits, raw(inputs_embeds=normed).logits)
    torch.testing.assert_close(model(inputs_embeds=x).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_rewired_model_can_be_copied_and_pickled(family):
    model = tiny_model(family).eval()
    spannorm.rewire(model, "subln")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert same_weights(model, other) and torch.equal(model(IDS).logits, other(IDS).logits)
        assert type(other.base_model.get_submodule(FAMILIES[family].layers)[0]) is type(
            model.base_model.get_submodule(FAMILIES[family].layers)[0]
        )


def test_the_body_alone_is_rewired_saved_and_loaded(tmp_path: Path):
    torch.manual_seed(0)
    body = LlamaModel(tiny_config_of("llama")).eval()
    spannorm.rewire(body, "span", init="redraw")
    whole = tiny_model("llama")
    spannorm.rewire(whole, "span", init="redraw")
    assert same_weights(body, whole.model), "the same draw alone and under a head"
    body.save_pretrained(tmp_path)
    again = spannorm.load(tmp_path)
    assert type(again) is type(body) and isinstance(again, LlamaModel) and same_weights(body, again)


def test_a_checkpoint_records_how_it_was_made_and_loads_in_another_dtype(tmp_path: Path):
    model = span_llama(depth_rule="1/L:forward", initial_norm="none")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    how = {"placement": "span", "depth_rule": "1/L:forward", "options": {"initial_norm": "none"}}
    assert saved["rewiring"] == how and saved["family"] == "llama" and saved["architectures"] == ["LlamaForCausalLM"]
    half = spannorm.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    again = tmp_path / "again"
    spannorm.load(tmp_path).save_pretrained(again)
    assert same_weights(spannorm.load(again), model) and json.loads((again / "config.json").read_text()) == saved


def test_load_refuses_plain_checkpoints_and_weights_that_do_not_fit(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="holds a plain 'llama' model"):
        spannorm.load(tmp_path / "plain")
    span_llama().save_pretrained(tmp_path / "span")
    path = tmp_path / "span" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rewiring": config["rewiring"] | {"placement": "peri"}}))
    with pytest.raises(InputError, match=r"do not fit .*attn_output_norm"):
        spannorm.load(tmp_path / "span")
    path.write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(InputError, match="holds a 'NoSuchModel'"):
        spannorm.load(tmp_path / "span")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
def test_a_model_made_on_meta_device_is_the_one_made_outright(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config_of(family), attn_implementation="eager")
    report = spannorm.rewire(model, "keel")
    assert report.init is False and any("to_empty" in note for note in report.notes)
    with pytest.raises(InputError, match="meta device"), torch.device("meta"):
        spannorm.rewire(AutoModelForCausalLM.from_config(tiny_config_of(family)), "span", init="rescale")
    model.to_empty(device="cpu")
    redraw_(model, seed=2)
    outright = tiny_model(family)
    spannorm.rewire(outright, "keel", init="redraw", seed=2)
    assert same_weights(model, outright)
    assert torch.equal(model.eval()(IDS).logits, outright.eval()(IDS).logits)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_lora_trains_its_adapters_alone_and_merges():
    from peft import LoraConfig, get_peft_model

    model = span_llama()
    before = model(IDS).logits
    start = copy.deepcopy(model.state_dict())
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))  # the target modules are llama's
    assert torch.equal(lora(IDS).logits, before), "an adapter starts at zero"
    trained = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = lora(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    after = lora(IDS).logits
    merged = lora.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, after, rtol=1e-4, atol=1e-5)
    kept = {n for n, p in merged.named_parameters() if torch.equal(p, start[n])}
    assert {n for n in start if not n.endswith(("q_proj.weight", "v_proj.weight"))} == kept


def test_the_trainer_trains_saves_and_resumes_it(tmp_path: Path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 37, (64, 9))]

    def trainer(steps: int) -> Any:
        args = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
            lr_scheduler_type="constant", save_steps=3, logging_steps=1, report_to=[], use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        return Trainer(span_llama(), args, train_dataset=data)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        straight = trainer(6)
        straight.train()
        trainer(3).train()
        resumed = trainer(6)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_weights(straight.model, resumed.model)
    saved = spannorm.load(tmp_path / "checkpoint-6")
    assert same_weights(saved, resumed.model)


def test_a_model_is_saved_as_rewired_whatever_its_configuration_said_before(tmp_path):
    config = LlamaConfig.from_dict(span_llama().config.to_dict())
    for how in ("span", "post"):
        model = LlamaForCausalLM(config)
        spannorm.rewire(model, how)
        model.save_pretrained(tmp_path / how)
        assert same_weights(spannorm.load(tmp_path / how), model)
        with pytest.raises(OSError, match="load it with spannorm"):
            LlamaForCausalLM.from_pretrained(tmp_path / how)
    read = LlamaConfig.from_pretrained(tmp_path / "span")  # as PEFT reads it
    with pytest.raises(InputError, match="read from a rewired model's folder"):
        spannorm.rewire(LlamaForCausalLM(read), "span")


def test_models_of_one_configuration_are_rewired_each_for_itself(tmp_path):
    config = tiny_config_of("llama")
    models = {name: LlamaForCausalLM(config) for name in ("span", "post", "pre")}
    for name in ("span", "post"):
        spannorm.rewire(models[name], name)
    assert not hasattr(config, "rewiring") and models["pre"].config is config
    for name in ("span", "post"):
        assert models[name].model.layers[0].self_attn.config is models[name].config
        models[name].save_pretrained(tmp_path / name)
        again = spannorm.load(tmp_path / name)
        assert again.config.rewiring["placement"] == name
        torch.testing.assert_close(again.eval()(IDS).logits, models[name].eval()(IDS).logits)


# It does a thing or leaves things as they were


def with_head(model: Any) -> None:
    model.value_head = nn.Linear(32, 1)


def with_adapter(model: Any) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)


def with_a_shared_layer(model: Any) -> None:
    model.model.layers[2] = model.model.layers[0]


def with_a_shared_ffn(model: Any) -> None:
    model.model.layers[2].mlp = model.model.layers[0].mlp


@pytest.mark.parametrize("init", ["rescale", "redraw"])
@pytest.mark.parametrize("harm", [with_head, with_adapter, with_a_shared_layer, with_a_shared_ffn])
def test_a_model_that_is_refused_is_as_it_was(harm, init):
    model = tiny_model("llama").eval()
    harm(model)
    before, wiring, logits = copy.deepcopy(model.state_dict()), str(model), model(IDS, use_cache=False).logits
    with pytest.raises(InputError):
        spannorm.rewire(model, "span", init=init)
    assert str(model) == wiring and not hasattr(model.config, "rewiring")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(IDS, use_cache=False).logits, logits)


@pytest.mark.parametrize("step", ["place_inner_norm", "move_norms", "rewire_layer", "set_unit_gain", "_say"])
def test_whatever_fails_inside_leaves_the_model_as_it_was(step, monkeypatch):
    model = tiny_model("llama").eval()
    logits, wiring = model(IDS, use_cache=False).logits, str(model)
    where = sys.modules["spannorm.rewiring.change"]
    real, calls = getattr(where, step), []

    def breaks(*given: Any) -> Any:
        done = real(*given)
        calls.append(0)
        if len(calls) > 1 or step in ("set_unit_gain", "_say"):
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(where, step, breaks)
    with pytest.raises(KeyboardInterrupt):
        spannorm.rewire(model, "normformer", init="redraw")
    monkeypatch.undo()
    assert str(model) == wiring and not hasattr(model.config, "rewiring")
    assert torch.equal(model(IDS, use_cache=False).logits, logits)
    spannorm.rewire(model, "pre", depth_rule="none", init=False)
    assert torch.equal(model(IDS, use_cache=False).logits, logits)


def test_fp32_gains_of_a_half_precision_model_stay_fp32_and_change_no_bit():
    model = tiny_model("llama").to(torch.bfloat16).eval()
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float().weight.data.uniform_(0.5, 2)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = model(IDS, use_cache=False).logits
        spannorm.rewire(model, "pre", depth_rule="none", init=False)
        assert torch.equal(model(IDS, use_cache=False).logits, before)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert norms and all(p.dtype == torch.float32 for p in norms)


@pytest.mark.parametrize("wrong", [None, "tuple", "narrow"])
def test_a_sublayer_that_does_not_answer_is_an_error_and_no_dropped_branch(wrong):
    model = tiny_model("llama").eval()
    spannorm.rewire(model, "span", init=False)

    def forward(x: torch.Tensor) -> Any:
        return None if wrong is None else x[..., :1] if wrong == "narrow" else (x, x)

    model.model.layers[1].mlp.forward = forward
    if wrong == "tuple":  # of a tuple the first is taken, as the families' own layers do
        model(IDS)
    else:
        with pytest.raises(InputError, match="the feed-forward must return one tensor of the shape"):
            model(IDS)
    for answer in (None, (1, 2)):
        placement = spannorm.build_placement("span", hidden_size=8, layer_idx=1, num_layers=3)
        with pytest.raises(InputError, match="attention must return one tensor"):
            placement(torch.ones(1, 2, 8), lambda x, answer=answer: answer, torch.tanh)


@pytest.mark.parametrize("wrong", [{"norm": "layernorm"}, {"eps": 0.5}, {"seed": "1"}])
def test_an_option_that_does_nothing_is_refused(wrong):
    with pytest.raises(InputError):
        spannorm.rewire(tiny_model("llama"), "span", **wrong)
