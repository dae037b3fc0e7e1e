"""The first values of the Hugging Face models, however they came to be."""

from __future__ import annotations

import json

import pytest
import torch
from arms import DISCOURAGED, TIED_ARMS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spannorm.models import SpanNormForCausalLM, SpanNormModel
from spannorm.placements import PLACEMENTS

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def values(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(model, wanted: dict[str, torch.Tensor]) -> None:
    actual = dict(model.named_parameters())
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(actual[name], value), name


def built_on_meta(config) -> SpanNormForCausalLM:
    with torch.device("meta"):
        model = SpanNormForCausalLM(config)
    model.to_empty(device="cpu")
    # to_empty leaves what the allocator had: make sure that nothing passes by luck
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights_()
    return model


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("placement", "rule", "tied"), TIED_ARMS)
def test_the_receipt_of_a_fresh_model_is_clean(tiny_config, placement, rule, tied, qk_norm):
    config = tiny_config(placement=placement, depth_rule=rule, tie_word_embeddings=tied, qk_norm=qk_norm)
    model = SpanNormForCausalLM(config)
    receipt = model.init_receipt()
    assert not receipt.mismatches, receipt
    assert [row.name for row in receipt.rows] == [name for name, _ in model.named_parameters()]
    # the plan itself, at the two tensors that a rule is about: see test_init.py for all of them
    spread = {row.name: row.std for row in receipt.rows}
    assert ("lm_head.weight" in spread) is not tied
    assert spread["model.embed_tokens.weight"] == pytest.approx(0.25 if tied else 1.0, rel=0.15)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rule", ["1/sqrt(L)", "layerscale"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@DISCOURAGED
def test_a_model_built_on_meta_device_is_the_same_model(tiny_config, placement, rule, tied):
    config = tiny_config(placement=placement, depth_rule=rule, tie_word_embeddings=tied, qk_norm=True)
    early, late = SpanNormForCausalLM(config), built_on_meta(config)
    assert not late.init_receipt().mismatches
    assert_same(late, values(early))
    assert (late.lm_head.weight is late.model.embed_tokens.weight) is tied
    # RoPE's tables are buffers, which no receipt holds: the logits do
    ids = torch.arange(8).unsqueeze(0)
    assert torch.equal(late(ids).logits, early(ids).logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_dtype_is_the_same_draw_rounded(tiny_config, placement, dtype):
    config = tiny_config(placement=placement, qk_norm=True)
    wanted = values(SpanNormForCausalLM(config))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert model.dtype == dtype
    assert not model.init_receipt().mismatches
    assert_same(model, {name: value.to(dtype) for name, value in wanted.items()})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reloaded_model_has_a_clean_receipt(tiny_config, tmp_path, dtype, tied):
    model = SpanNormForCausalLM(tiny_config(tie_word_embeddings=tied, qk_norm=True)).to(dtype)
    model.save_pretrained(tmp_path)
    again = SpanNormForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert not again.init_receipt().mismatches
    assert_same(again, values(model))


def test_the_receipt_catches_a_body_that_was_drawn_again_by_torch(tiny_config):
    model = SpanNormForCausalLM(tiny_config())
    # Torch's own std is 1/√(3·fan_in), which is what 1/√L makes of an output matrix at three blocks: not one of those.
    model.model.layers[1].mlp.up_proj.reset_parameters()
    assert [row.name for row in model.init_receipt().mismatches] == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_body_draws_the_same_alone_and_inside_a_causal_lm(tiny_config, tied):
    config = tiny_config(tie_word_embeddings=tied)
    assert_same(SpanNormModel(config), values(SpanNormForCausalLM(config).model))


def test_seeds_make_the_model_and_torchs_seed_does_not(tiny_config):
    torch.manual_seed(1)
    first = values(SpanNormForCausalLM(tiny_config(init_seed=5)))
    torch.manual_seed(2)
    assert_same(SpanNormForCausalLM(tiny_config(init_seed=5)), first)
    other = SpanNormForCausalLM(tiny_config(init_seed=6))
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, first[name]) is name.endswith("norm.weight"), name


def test_drawing_anew_leaves_the_global_generator_alone_and_undoes_training(tiny_config):
    model = SpanNormForCausalLM(tiny_config())
    fresh = values(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = torch.get_rng_state()
    model.init_weights_()
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(model, fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "missing",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.placement.initial_norm.weight",
        "model.layers.1.placement.gains_norm.ffn_scale",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_norm.weight",
    ],
)
def test_a_tensor_missing_from_a_checkpoint_is_drawn_as_in_a_fresh_model_and_no_other(
    tiny_config, tmp_path, missing, dtype
):
    model = SpanNormForCausalLM(tiny_config(depth_rule="layerscale", qk_norm=True)).to(dtype)
    fresh = values(model)
    with torch.no_grad():
        for parameter in model.parameters():  # "training": nothing is as it was drawn
            parameter.add_(0.5)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[missing]
    save_file(tensors, file, metadata={"format": "pt"})

    loaded, info = SpanNormForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert info["missing_keys"] == {missing}
    assert_same(loaded, {**values(model), missing: fresh[missing]})


def test_normal_base_init_follows_initializer_range(tiny_config):
    config = tiny_config(base_init="normal", initializer_range=0.05, depth_rule="none")
    model = SpanNormForCausalLM(config)
    assert not model.init_receipt().mismatches
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.2), name


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_the_vocabulary_keeps_old_rows_and_fills_new_ones(tiny_config, tied):
    model = SpanNormForCausalLM(tiny_config(tie_word_embeddings=tied))
    before = values(model)
    model.resize_token_embeddings(45)
    after = dict(model.named_parameters())
    assert model.config.vocab_size == 45
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)] if value.ndim else after[name], value), name
    for name in ("model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])):
        assert after[name].shape == (45, 16)
        assert after[name][37:].isfinite().all() and after[name][37:].abs().max() < 10
    assert model(torch.tensor([[1, 40, 44]])).logits.shape == (1, 3, 45)


def test_a_sharded_checkpoint_loads_as_a_whole(tiny_config, tmp_path):
    model = SpanNormForCausalLM(tiny_config())
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert_same(SpanNormForCausalLM.from_pretrained(tmp_path), values(model))


@pytest.mark.parametrize("tied", [False, True])
def test_tiny_init_knows_the_depth_of_the_stack_and_its_receipt_is_clean(tiny_config, tied):
    model = SpanNormForCausalLM(
        tiny_config(
            placement="peri", depth_rule="1/sqrt(L):gain(0.283,0.432)", base_init="tiny", hidden_size=64,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip
    assert not model.init_receipt().mismatches, model.init_receipt()
    plan, sigma = model.init_plan(), (2 * 64 * 3) ** -0.5  # three blocks
    assert plan["model.layers.1.self_attn.q_proj.weight"].std == pytest.approx(sigma)
    assert plan["model.layers.1.mlp.down_proj.weight"].std == pytest.approx(sigma)
    assert model.model.layers[1].placement.ffn_output_norm.weight[0].item() == pytest.approx(0.432 / 3**0.5)
