"""What other libraries do to a model, each against the right value."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch.nn import functional as F

import spannorm
from spannorm.errors import InputError
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.placements import PLACEMENTS
from spannorm.train.checkpoints import check_config

# PEFT 0.21 asks for what Transformers 5.24 calls by another name
peft_of_today = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
INNER = [name for name, kind in PLACEMENTS.items() if kind.inner_norms]
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LLAMA = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip


def ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(37, (batch, length))


def rewired_llama(placement: str, kind: str = "LlamaForCausalLM") -> Any:
    import transformers

    model = getattr(transformers, kind)(transformers.LlamaConfig(**LLAMA, pad_token_id=0))
    spannorm.rewire(model, placement)
    return model


def unlike_at_birth(model: Any) -> Any:
    """Gains that are not 1, so that a norm left out or doubled shows."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model.eval()


@pytest.mark.parametrize("rewired", [False, True])
def test_the_trainer_smooths_shifted_labels(tiny_config: Any, tmp_path: Path, rewired: bool) -> None:
    from transformers import Trainer, TrainingArguments

    model: Any = rewired_llama("span") if rewired else SpanNormForCausalLM(tiny_config())
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    trainer = Trainer(model, arguments)
    x = ids()
    loss = trainer.compute_loss(model, {"input_ids": x, "labels": x})
    log_p = model(x).logits[:, :-1].log_softmax(-1)
    nll = F.nll_loss(log_p.flatten(0, 1), x[:, 1:].flatten())
    expected = 0.9 * nll - 0.1 * log_p.mean(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weights_on_cpu_or_disk_are_brought_when_they_are_needed(
    tiny_config: Any, tmp_path: Path, placement: str, experts: bool
) -> None:
    sizes = {"num_experts": 4, "moe_intermediate_size": 12} if experts else {}
    model, x = SpanNormForCausalLM(tiny_config(placement=placement, **sizes)).eval(), ids()
    with torch.no_grad():
        recorded = model(x, output_hidden_states=True)
        before = recorded.logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        again = model(x, output_hidden_states=True)
        assert torch.equal(again.logits, before)
        assert all(map(torch.equal, again.hidden_states, recorded.hidden_states))
        if placement in ("span", "siamese"):
            model = SpanNormForCausalLM(tiny_config(placement=placement, **sizes)).eval()
            disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
            assert torch.equal(model(x).logits, before)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_replica_of_data_parallel_and_a_model_without_values_compute(tiny_config: Any, placement: str) -> None:
    model, x = SpanNormForCausalLM(tiny_config(placement=placement)).eval(), ids()
    replicas = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, replica in replicas.items():  # as torch.nn.parallel.replicate makes one
        replica._modules = {name: child and replicas[child] for name, child in module._modules.items()}
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter)
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer)
    with torch.no_grad():
        assert torch.equal(replicas[model](x).logits, model(x).logits)
        with torch.device("meta"):
            assert SpanNormForCausalLM(tiny_config(placement=placement))(ids()).logits.shape == (2, 9, 37)


@peft_of_today
@pytest.mark.parametrize(("placement", "rule"), [("gpas", None), ("mhc", None), ("pre", "rezero")])
def test_peft_may_train_what_a_placement_owns(tiny_config: Any, placement: str, rule: str | None) -> None:
    from peft import LoraConfig, get_peft_model

    model, x = SpanNormForCausalLM(tiny_config(placement=placement, depth_rule=rule)), ids()
    before = model(x).logits
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["gains_norm"]))
    torch.testing.assert_close(tuned(x).logits, before, rtol=0, atol=0)
    tuned(input_ids=x, labels=x).loss.backward()
    own = [p for name, p in tuned.named_parameters() if "gains_norm.modules_to_save" in name]
    assert own and all(p.requires_grad and p.grad is not None for p in own)


@pytest.mark.parametrize("placement", ["span", "mixed_input", "hc"])
def test_a_loss_on_hidden_states_has_its_gradient_or_is_refused(tiny_config: Any, placement: str) -> None:
    def gradient(reentrant: bool | None) -> torch.Tensor:
        torch.manual_seed(0)
        model, x = SpanNormForCausalLM(tiny_config(placement=placement)).train(), ids()
        if reentrant is not None:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        out = model(x, labels=x, output_hidden_states=True, use_cache=False)
        (out.loss + out.hidden_states[1].square().mean()).backward()
        return model.model.embed_tokens.weight.grad

    whole = gradient(None)
    torch.testing.assert_close(gradient(False), whole, rtol=1e-5, atol=1e-7)
    if placement == "span":
        torch.testing.assert_close(gradient(True), whole, rtol=1e-5, atol=1e-7)
    else:
        with pytest.raises(InputError, match="use_reentrant=False"):
            gradient(True)
        model = SpanNormForCausalLM(tiny_config(placement=placement))
        with torch.no_grad():
            given = torch.randn(2, 9, model.config.hidden_size, requires_grad=True)
            seen = model(inputs_embeds=given, output_hidden_states=True).hidden_states
            assert len(seen) == model.config.num_hidden_layers + 1


@peft_of_today
def test_a_learned_prefix_is_no_token_of_the_routers(tiny_config: Any) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    model, x = SpanNormForCausalLM(tiny_config(placement="span", **EXPERTS)).train(), ids()
    plain = model(x, attention_mask=torch.ones_like(x), labels=x)
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()
    prefixed = tuned(input_ids=x, attention_mask=torch.ones_like(x), labels=x)
    assert prefixed.loss.isfinite() and prefixed.aux_loss.shape == plain.aux_loss.shape
    prefixed.loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_a_norms_gradients_are_summed_in_fp32_in_half_precision(norm: str, dtype: torch.dtype) -> None:
    from spannorm.norms import build_norm

    layer = build_norm(norm, 16).to(dtype)
    x = torch.randn(8169, 16).to(dtype)
    layer(x[None]).float().sum().backward()
    exact = build_norm(norm, 16).double()
    exact(x[None].double()).sum().backward()
    for name, parameter in layer.named_parameters():
        wanted = exact.get_parameter(name).grad
        # each row is rounded once; 8169 of them add up to their number, or to noise around 0
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=2**-7, atol=2**-8 * 8169**0.5 * 4)


@peft_of_today
@torch.no_grad()
@pytest.mark.parametrize("rewired", [False, True])
@pytest.mark.parametrize("placement", ["qk_norm", *INNER])
def test_lora_merged_is_lora_beside_and_taken_off_again_is_nothing(
    tiny_config: Any, placement: str, rewired: bool
) -> None:
    from peft import LoraConfig, get_peft_model

    how = {"placement": "pre", "qk_norm": True} if placement == "qk_norm" else {"placement": placement}
    if rewired and placement == "qk_norm":
        pytest.skip("no placement of its own")
    model = unlike_at_birth(rewired_llama(placement) if rewired else SpanNormForCausalLM(tiny_config(**how)))
    x = ids()
    before = model(x).logits
    names = [name.removeprefix("base_model.model.") for name, _ in model.named_modules()]
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    assert any("lora" in name for name, _ in model.named_parameters() if "o_proj" in name)
    beside = model(x).logits
    assert (beside - before).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(model(x).logits, beside, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    bare = model.unload()
    torch.testing.assert_close(bare(x).logits, before, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in bare.named_modules()] == names


@torch.no_grad()
@pytest.mark.parametrize("rewired", [False, True])
def test_a_tool_that_replaces_every_linear_leaves_the_norms(tiny_config: Any, rewired: bool) -> None:
    # what quantizers and inference engines do: another module of the same weight, under the same name
    class Theirs(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.packed = torch.nn.Parameter(linear.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.packed.T

    for placement in INNER:
        model = rewired_llama(placement) if rewired else SpanNormForCausalLM(tiny_config(placement=placement))
        model, x = unlike_at_birth(model), ids()
        before = model(x).logits
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear):
                assert type(module) is torch.nn.Linear, name
                model.set_submodule(name, Theirs(module))
        torch.testing.assert_close(model(x).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rewired", [False, True])
def test_weights_saved_with_norms_inside_the_projections_load_and_are_saved_beside_them(
    tiny_config: Any, tmp_path: Path, rewired: bool
) -> None:
    from safetensors.torch import load_file, save_file

    old = {"q_norm": "q_proj.{}", "k_norm": "k_proj.{}", "v_norm": "v_proj.{}", "attn_out_norm": "o_proj.input_norm",
           "ffn_down_norm": "down_proj.input_norm", "head_scale_norm.weight": "o_proj.head_scale",
           "placement.gains_norm": "placement", "layers.0.embedding_norm": "embedding_norm"}  # fmt: skip
    for placement in (*INNER, "span"):
        more = {"placement_options": {"initial_norm": "embedding"}, "depth_rule": "layerscale"}
        model = SpanNormForCausalLM(tiny_config(placement=placement, **(more if placement == "span" else {})))
        model = unlike_at_birth(rewired_llama(placement) if rewired else model)
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        renamed = {}
        for name, value in state.items():
            for new, before in old.items():
                if not (rewired and new.startswith("layers")):
                    name = name.replace(new, before.format(new if rewired else "output_norm"))
            renamed[name] = value
        assert renamed.keys() != state.keys() or (rewired and placement == "span")
        save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
        if not rewired:  # a run goes on with its optimizer's state too, which does not fit
            with pytest.raises(InputError, match=r"written by spannorm 0\.1"):
                check_config(tmp_path, model.config)
        loaded = spannorm.load(tmp_path).eval()
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        loaded.save_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
        if not rewired:
            check_config(tmp_path, model.config)


def test_a_dense_configuration_has_no_key_of_mixtures_and_a_mixture_has_all_that_trl_asks_for(tiny_config: Any) -> None:
    dense, mixture = tiny_config(), tiny_config(**EXPERTS)
    for key in ("output_router_logits", "router_aux_loss_coef", "num_experts_per_tok"):
        assert not hasattr(dense, key) and key not in dense.to_dict()
        assert hasattr(mixture, key)
    assert SpanNormConfig.from_dict(dense.to_dict()).to_dict() == dense.to_dict()
    assert dense == tiny_config() != mixture == tiny_config(**EXPERTS) != tiny_config(**EXPERTS, num_experts_per_tok=1,
                                                                                      norm_topk_prob=False)  # fmt: skip
    old = {**dense.to_dict(), "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}  # as 0.1 saved them
    assert not hasattr(SpanNormConfig.from_dict(old), "num_experts_per_tok")


@pytest.mark.parametrize(
    ("placement", "rule"),
    [*((placement, None) for placement in PLACEMENTS), ("pre", "rezero"), ("normformer", "layerscale")],
)
def test_transformers_own_weight_decay_falls_on_matrices_alone(
    tiny_config: Any, placement: str, rule: str | None
) -> None:
    from transformers import Trainer

    model = SpanNormForCausalLM(tiny_config(placement=placement, depth_rule=rule))
    theirs = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert theirs == {name for name, p in model.named_parameters() if p.ndim > 1 and "gains_norm" not in name}


@torch.no_grad()
@pytest.mark.parametrize("how", [{"tie_word_embeddings": True}, {"placement_options": {"initial_norm": "embedding"}}])
@pytest.mark.parametrize("stages", [2, 3])
def test_a_pipeline_by_the_plan_computes_what_one_process_computes(
    tiny_config: Any, how: dict[str, Any], stages: int
) -> None:
    class Missing(torch.nn.Identity):
        def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
            return x

    def stage(i: int) -> SpanNormForCausalLM:
        part = SpanNormForCausalLM(config)
        part.load_state_dict(whole.state_dict())
        body, plan = part.model.eval(), config.base_model_pp_plan
        for name in plan:
            if name == "layers":
                for b in range(config.num_hidden_layers):
                    if b * stages // config.num_hidden_layers != i:
                        body.layers[b] = Missing()
            elif i != (0 if name == "embed_tokens" else stages - 1):
                setattr(body, name, Missing())
        return part

    config = tiny_config(**how, num_hidden_layers=3)
    whole, x = unlike_at_birth(SpanNormForCausalLM(config)), ids()
    given: dict[str, torch.Tensor] = {"input_ids": x}
    for i in range(stages):
        given = {"inputs_embeds": stage(i).model(**given).last_hidden_state}
    torch.testing.assert_close(whole.lm_head(given["inputs_embeds"]), whole(x).logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("base_init", ["fan_in", "normal"])
def test_a_grown_vocabulary_is_drawn_like_the_old_one_and_stays(tiny_config: Any, tied: bool, base_init: str) -> None:
    config = tiny_config(hidden_size=64, tie_word_embeddings=tied, base_init=base_init)
    model = SpanNormForCausalLM(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.resize_token_embeddings(1037, mean_resizing=False)
    std = {"fan_in": 1 / 8 if tied else 1.0, "normal": 0.02}[base_init]
    for table, expected in ((model.model.embed_tokens, std), (model.lm_head, 1 / 8 if base_init == "fan_in" else 0.02)):
        assert table.weight[37:].std().item() == pytest.approx(expected, rel=0.02)
    assert not model.init_receipt().mismatches
    grown = {name: p.clone() for name, p in model.named_parameters()}
    model.post_init()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, grown[name]), name
        assert torch.equal(parameter[:37] if parameter.shape[0] == 1037 else parameter, before[name]), name
    x = ids()
    assert model(x + 1000).logits.shape == (2, 9, 1037)


def test_the_auto_classes_open_a_folder_before_spannorm_is_imported(tiny_config: Any, tmp_path: Path) -> None:
    models = {"ours": SpanNormForCausalLM(tiny_config(placement="hybrid")), "rewired": rewired_llama("hybrid"),
              "sorting": rewired_llama("siamese", "LlamaForSequenceClassification")}  # fmt: skip
    x = torch.arange(9)[None]
    for name, model in models.items():
        unlike_at_birth(model).save_pretrained(tmp_path / name)
        torch.save(model(x).logits, tmp_path / f"{name}.pt")
    script = """
import sys, torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM,
)
root, code = sys.argv[1], dict(trust_remote_code=True)
def check(name, model):
    torch.testing.assert_close(model.eval()(torch.arange(9)[None]).logits, torch.load(f"{root}/{name}.pt"), msg=name)
check("ours", AutoModelForCausalLM.from_pretrained(f"{root}/ours", **code))
check("rewired", AutoModelForCausalLM.from_pretrained(f"{root}/rewired", **code))
check("sorting", AutoModelForSequenceClassification.from_pretrained(f"{root}/sorting", **code))
config = AutoConfig.from_pretrained(f"{root}/rewired", pad_token_id=5, **code)
config.use_cache = False
model = AutoModelForCausalLM.from_pretrained(f"{root}/rewired", config=config, **code)
check("rewired", model)
assert (model.config.pad_token_id, model.config.use_cache) == (5, False)  # what was given, not what was saved
assert not AutoModelForCausalLM.from_pretrained(f"{root}/rewired", use_cache=False, **code).config.use_cache
drawn = AutoModelForCausalLM.from_config(config, **code)
assert drawn.state_dict().keys() == model.state_dict().keys() and config.rewiring == model.config.rewiring
with init_empty_weights():
    empty = AutoModelForCausalLM.from_config(config, **code)
check("rewired", load_checkpoint_and_dispatch(empty, f"{root}/rewired", {"": "cpu"}))
assert LlamaConfig.from_pretrained(f"{root}/rewired").vocab_size == 37  # as PEFT reads it
try:
    LlamaForCausalLM.from_pretrained(f"{root}/rewired")
except FileNotFoundError as error:
    assert "this model was rewired, load it with spannorm.load" in str(error)
else:
    raise SystemExit("a rewired folder was opened as a plain model")
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    hidden = """
import sys
class Hidden:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "spannorm":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Hidden())
"""
    run = subprocess.run(
        [sys.executable, "-c", hidden + script, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert "pip install spannorm" in run.stderr


def test_a_rewired_folder_takes_no_configuration_that_does_not_say_how(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    rewired_llama("span").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not say how the model was rewired"):
        spannorm.load(tmp_path, config=LlamaConfig(**LLAMA))
    assert not spannorm.load(tmp_path, use_cache=False).config.use_cache


@peft_of_today
def test_lora_on_a_reloaded_rewired_model_is_saved_and_comes_back(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    rewired_llama("span").save_pretrained(tmp_path / "base")
    model = get_peft_model(spannorm.load(tmp_path / "base"), LoraConfig(init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(spannorm.load(tmp_path / "base"), tmp_path / "lora")
    x = ids()
    torch.testing.assert_close(again(x).logits, model(x).logits)


class WithValueHead(SpanNormForCausalLM):
    def __init__(self, config: SpanNormConfig) -> None:
        super().__init__(config)
        self.v_head = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()


def test_a_head_of_ones_own_keeps_pytorchs_init_and_is_named(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(hidden_size=64)
    model = WithValueHead(config)
    bound = 64**-0.5
    assert 0.5 * bound < model.v_head.weight.abs().max() <= bound  # nn.Linear's uniform draw
    assert model.init_receipt().kept == ("v_head.weight", "v_head.bias") and "v_head.weight" in str(
        model.init_receipt()
    )
    plain = SpanNormForCausalLM(config)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in plain.named_parameters())
    plain.save_pretrained(tmp_path)
    late = WithValueHead.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(InputError, match=r"holds a 'WithValueHead', a class of somebody's own"):
        spannorm.load(tmp_path / "own")
    assert 0.5 * bound < late.v_head.weight.abs().max() <= bound
    groups = spannorm.parameter_groups(model, learning_rate=1.0, weight_decay=0.5)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert (decay[id(model.v_head.weight)], decay[id(model.v_head.bias)]) == (0.5, 0.0)


@pytest.mark.parametrize("placement", ["span", "siamese"])
def test_classification_heads_read_the_decoder(tiny_config: Any, tmp_path: Path, placement: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    x = torch.tensor([[5, 6, 7, 0], [5, 6, 0, 0]])
    config = tiny_config(placement=placement, num_labels=3, pad_token_id=0, hidden_size=64)
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        model = auto.from_config(config).eval()
        assert not model.init_receipt().mismatches
        assert model.score.weight.std().item() == pytest.approx(1 / 8, rel=0.15)
        hidden = model.model(x).last_hidden_state @ model.score.weight.T
        hidden = hidden if auto is AutoModelForTokenClassification else hidden[[0, 1], [2, 1]]
        hidden = hidden + (0 if model.score.bias is None else model.score.bias)
        torch.testing.assert_close(model(x).logits, hidden, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(auto.from_pretrained(tmp_path)(x).logits, model(x).logits)
        torch.testing.assert_close(spannorm.load(tmp_path).eval()(x).logits, model(x).logits)


def test_a_mask_of_four_dimensions_says_which_tokens_the_routers_are_balanced_over(tiny_config: Any) -> None:
    model, x = SpanNormForCausalLM(tiny_config(**EXPERTS)).train(), ids()
    real = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    labels = x.masked_fill(real == 0, -100)
    plain = model(x, attention_mask=real, labels=labels)
    may = (torch.ones(9, 9).tril() * real[:, None, :])[:, None].bool()  # padding sees the past, not itself
    for mask in (may, torch.zeros(may.shape).masked_fill(~may, -torch.inf)):
        out = model(x, attention_mask=mask, labels=labels)
        torch.testing.assert_close(out.aux_loss, plain.aux_loss)
        torch.testing.assert_close(out.loss, plain.loss)


@pytest.mark.parametrize("placement", ["span", "hybrid", "siamese"])
def test_an_exported_model_is_made_of_pytorchs_own_operations(tiny_config: Any, placement: str) -> None:
    # an exporter such as ONNX's knows these and no others; gradients are on, as they are when nobody says otherwise
    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model.eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x, use_cache=False).logits

    def others(exported: Any) -> set[str]:
        """What is called and is not PyTorch's own operation."""
        called = {node.target for node in exported.graph.nodes if node.op == "call_function"} - {operator.getitem}
        own = {op for op in called if isinstance(op, torch._ops.OpOverload) and op.namespace in ("aten", "prim")}
        return {str(op) for op in called - own}

    import transformers

    config, x = tiny_config(placement=placement), ids()
    model = Logits(SpanNormForCausalLM(config))
    exported = torch.export.export(model, (x,), strict=False)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    theirs = torch.export.export(Logits(llama), (x,), strict=False)
    assert others(exported) <= others(theirs)  # up to 5.17 Transformers' rotary embedding has one
    torch.testing.assert_close(exported.module()(x), model(x))
