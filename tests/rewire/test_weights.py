"""What each init does to each family, held to what the branches then compute: no test knows how a matrix is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rewire_families import FAMILIES, in_float64, tiny_model

import spannorm
from spannorm.errors import InputError
from spannorm.rewiring import FAMILIES as ROWS

LAYERS = 3
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's
IDS = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(5))


def branches(model: Any, family: str) -> list[torch.Tensor]:
    """What attention and FFN of every layer return for the same inputs, in whatever way the model calls them."""
    row, outputs = ROWS[family], []
    g = torch.Generator().manual_seed(7)
    for layer in model.base_model.get_submodule(row.layers):
        for name in (row.attention, row.ffn):
            x = torch.randn(2, 9, model.config.hidden_size, generator=g, dtype=torch.float64)

            def same_input(_: Any, args: Any, kwargs: Any, x=x) -> Any:
                if args:
                    return (x, *args[1:]), kwargs
                return args, kwargs | {"hidden_states": x}

            def record(_: Any, __: Any, output: Any) -> None:
                outputs.append(output[0] if isinstance(output, tuple) else output)

            getattr(layer, name).register_forward_pre_hook(same_input, with_kwargs=True)
            getattr(layer, name).register_forward_hook(record)
    with torch.no_grad():
        model(IDS, use_cache=False)
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_init_multiplies_what_each_branch_writes_and_nothing_else(family):
    plain, scaled = (in_float64(tiny_model(family)).eval() for _ in range(2))
    names = {name for name, _ in scaled.named_parameters()}
    report = spannorm.rewire(scaled, "pre", depth_rule="1/sqrt(L)")
    assert report.weights and set(report.weights) <= names
    for before, after in zip(branches(plain, family), branches(scaled, family), strict=True):
        torch.testing.assert_close(after, before / LAYERS**0.5, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_deepnorms_beta_falls_on_v_and_on_attention_out_and_not_on_q_and_k(family):
    beta = (8 * LAYERS) ** -0.25
    plain, scaled = (in_float64(tiny_model(family)).eval() for _ in range(2))
    spannorm.rewire(scaled, "pre", depth_rule="deepnorm")
    before, after = branches(plain, family), branches(scaled, family)
    # attention is linear in V and in its output matrix, and its weights hang on Q and K
    for a, b in zip(before[::2], after[::2], strict=True):
        torch.testing.assert_close(b, beta**2 * a, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_redraw_gives_every_matrix_variance_one_over_fan_in_times_the_rule_and_every_gain_one(family):
    model = tiny_model(family, hidden_size=64) if family != "gpt2" else tiny_model(family, n_embd=64)
    report = spannorm.rewire(model, "span", depth_rule="1/sqrt(L)", init="redraw")
    assert set(report.weights) == {name for name, _ in model.named_parameters()}
    scaled = 0
    for name, p in model.named_parameters():
        value = p.detach().double()
        if name.endswith(("bias", "sinks")):
            assert not value.any(), name
        elif p.ndim == 1:
            assert (value == (0.0 if family in ("gemma2", "gemma3_text") else 1.0)).all(), name
        elif any(word in name for word in ("embed", "wte", "wpe", "lm_head")):
            tied = model.config.tie_word_embeddings
            sigma = 1.0 if "lm_head" not in name and not tied else 64**-0.5
            assert value.std().item() == pytest.approx(sigma, rel=5 / (2 * p.numel()) ** 0.5), name
        else:
            transposed = name.endswith(TRANSPOSED) if family == "gpt2" else family == "gpt_oss" and ".experts." in name
            factor = LAYERS**-0.5 if name.removesuffix(".weight").endswith(outputs_of(family)) else 1.0
            scaled += factor != 1.0
            sigma = factor * p.shape[-2 if transposed else -1] ** -0.5
            assert value.std().item() == pytest.approx(sigma, rel=5 / (2 * p.numel()) ** 0.5), name
    assert scaled >= 2 * LAYERS


def outputs_of(family: str) -> tuple[str, ...]:
    """The matrices that write to the stream, by hand."""
    return {
        "gpt2": ("attn.c_proj", "mlp.c_proj"),
        "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
        "starcoder2": ("o_proj", "mlp.c_proj"),
        "nanochat": ("o_proj", "mlp.fc2"),
    }.get(family, ("o_proj", "down_proj"))


def test_a_redrawn_llama_is_our_own_model_bit_for_bit():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 37}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ours = spannorm.SpanNormForCausalLM(spannorm.SpanNormConfig(**sizes, **heads, attn_implementation="eager")).eval()
    llama = tiny_model("llama").eval()
    spannorm.rewire(llama, "span", init="redraw")
    assert {n: p.tolist() for n, p in llama.named_parameters()} == {n: p.tolist() for n, p in ours.named_parameters()}
    torch.testing.assert_close(llama(IDS).logits, ours(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_optimizers_groups_hold_every_parameter_once_and_slow_the_outputs_alone(family):
    model = tiny_model(family)
    spannorm.rewire(model, "span", depth_rule="1/sqrt(L):init+lr")
    groups = spannorm.parameter_groups(model, learning_rate=1e-2, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(found) == sorted(names.values())
    for group in groups:
        for p in group["params"]:
            name = names[id(p)]
            output = name.removesuffix(".weight").endswith(outputs_of(family))
            assert group["lr"] == pytest.approx(1e-2 * (LAYERS**-0.5 if output else 1.0)), name
            matrix = p.ndim > 1 and not name.endswith("bias") and "embed" not in name and "wte" not in name
            decays = matrix and "wpe" not in name
            assert (group["weight_decay"] > 0) == decays, name


def test_learned_gains_start_where_the_rule_says_and_are_trained():
    model = tiny_model("gpt2")
    spannorm.rewire(model, "pre", depth_rule="rezero")
    gains = {n: p for n, p in model.named_parameters() if n.endswith("_scale")}
    assert len(gains) == 2 * LAYERS and not any(p.any() for p in gains.values())
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for p in gains.values())


def test_what_depends_on_the_seed_is_the_redraw():
    def weights(**how: Any) -> torch.Tensor:
        model = tiny_model("mixtral")
        spannorm.rewire(model, "span", **how)
        return model.model.layers[1].mlp.experts.gate_up_proj.detach().clone()

    assert torch.equal(weights(init="redraw", seed=3), weights(init="redraw", seed=3))
    assert not torch.equal(weights(init="redraw", seed=3), weights(init="redraw", seed=4))
    assert torch.equal(weights(init=False), weights(seed=5))


@pytest.mark.parametrize("family", ["olmo", "nanochat"])
def test_a_gain_for_norms_that_have_none_is_refused(family: str) -> None:
    with pytest.raises(InputError, match="have no gain: choose a rule without `:gain`"):
        spannorm.rewire(tiny_model(family), "peri", depth_rule="1/sqrt(L):gain")


@pytest.mark.parametrize("init", [False, "rescale"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_new_output_norms_start_at_the_rules_gain_even_if_nothing_else_changes(family: str, init: Any) -> None:
    model = tiny_model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    spannorm.rewire(model, "peri", depth_rule="1/sqrt(L):gain(0.283,0.432)", init=init)
    row = ROWS[family]
    for layer in model.base_model.layers:
        for role, factor in (("attn_output_norm", 0.283), ("ffn_output_norm", 0.432)):
            weight = layer.placement.get_submodule(role).weight
            was_there = family == "gemma2" and init is False
            gain = 1.0 if was_there else factor / LAYERS**0.5
            torch.testing.assert_close(weight.detach() + 1 - row.unit_gain, torch.full_like(weight, gain))
    if init is False:
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
