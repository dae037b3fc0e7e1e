"""Placements inside torchtitan's models: the same weights give the same function as ours, and as torchtitan's own."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("torchtitan")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch's own, on the way to torch.compile
    from titan_tiny import in_fp32, tiny
from torchtitan.components.optimizer import ParamGroupConfig
from torchtitan.models.common.moe import GroupedExperts

import spannorm
from spannorm import SpanNormConfig, SpanNormForCausalLM
from spannorm.errors import InputError
from spannorm.placements import PLACEMENTS
from spannorm.torchtitan import PlacementConfig, config_registry, place
from spannorm.torchtitan.hugging_face import StateDictAdapter, hugging_face_config
from spannorm.torchtitan.trainer import Optimizers

OPTIONS = [("span", {"initial_norm": "embedding"}), ("pre", {}), ("parallel", {"norms": 2})]


def built(model: str, chosen: PlacementConfig, layers: int = 2):
    config = place(tiny(model, layers).model, chosen)
    made = config.build()
    with torch.no_grad():
        made.init_states()
    made.verify_module_protocol()
    return config, made


def ours(config) -> SpanNormForCausalLM:
    keys = hugging_face_config(config)
    assert keys.pop("model_type") == "spannorm" and keys.pop("architectures") == ["SpanNormForCausalLM"]
    return SpanNormForCausalLM(SpanNormConfig(**keys))


def ids() -> torch.Tensor:
    return torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(0))


def loss_of(model, tokens) -> torch.Tensor:
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def assert_equal(config, model, tolerance: float = 1e-6) -> None:
    """Init to the bit; loss and the gradient of every parameter within a relative tolerance."""
    hugging, adapter = ours(config), StateDictAdapter(config, None)
    theirs, drawn = dict(hugging.named_parameters()), adapter.to_hf(model.state_dict())
    assert drawn.keys() == theirs.keys()
    assert all(torch.equal(drawn[name], theirs[name]) for name in theirs), "the same numbers, drawn by name"
    model.load_state_dict(adapter.from_hf(hugging.state_dict()), strict=False)
    tokens = ids()
    # by the logits: the loss of a mixture of ours has its auxiliary losses in it, of which torchtitan has none
    loss, reference = loss_of(model, tokens), loss_of(lambda t: hugging(t).logits, tokens)
    assert loss.item() == pytest.approx(reference.item(), rel=tolerance)
    loss.backward()
    reference.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    for name, gradient in adapter.to_hf(model.state_dict()).items():
        error = (gradient - theirs[name].grad).norm() / theirs[name].grad.norm().clamp(min=1e-2)
        assert error < 20 * tolerance, name


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_in_llama3_is_our_model_with_the_same_weights(placement):
    assert_equal(*built("llama3", PlacementConfig(name=placement, init_seed=3)))


@pytest.mark.parametrize(("placement", "options"), OPTIONS)
def test_qwen3_with_its_own_qk_norm_and_tied_embedding_too(placement, options):
    chosen = PlacementConfig(name=placement, options=json.dumps(options), depth_rule="1/sqrt(L):forward", init_seed=3)
    config, model = built("qwen3", chosen)
    assert config.enable_weight_tying and hugging_face_config(config)["qk_norm"]
    assert_equal(config, model)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norms_and_ends_are_of_one_kind(norm):
    config, model = built("llama3", PlacementConfig(name="peri", norm=norm, eps=1e-3, init_seed=3))
    assert {type(m).__name__.lower() for m in model.modules() if type(m).__name__.endswith("Norm")} == {norm}
    assert_equal(config, model)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("placement", ["span", "hybrid", "siamese"])
def test_a_mixture_of_experts_too(placement, monkeypatch):
    monkeypatch.setattr(GroupedExperts, "forward", in_fp32)
    config, model = built("moe", PlacementConfig(name=placement, init_seed=3))
    assert_equal(config, model)


def test_pre_is_torchtitans_own_llama():
    plain = tiny().model
    theirs, (_, placed) = plain.build(), built("llama3", PlacementConfig(name="pre"), layers=4)
    theirs.init_states()
    names = {"attention_norm": "placement.attn_norm", ".ffn_norm": ".placement.ffn_norm"}
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    placed.load_state_dict(state)
    a, b = loss_of(placed, ids()), loss_of(theirs, ids())
    assert a.item() == pytest.approx(b.item(), rel=1e-6)


def test_torchtitans_own_random_numbers_have_our_stds():
    config, model = built("llama3", PlacementConfig(name="deepnorm", depth_rule="deepnorm", base_init="xavier"))
    beta, dim = (8 * 2) ** -0.25, config.dim
    weight = model.layers["1"].attention.qkv_linear.wqkv.weight.view(16, 3, dim // 16, dim)
    base = (2 / (dim + dim)) ** 0.5
    for part, factor in zip(weight.unbind(1), (1.0, 1.0, beta), strict=True):
        assert part.std().item() == pytest.approx(factor * base, rel=0.03)
    hidden = model.layers["1"].feed_forward.w2.in_features
    w2 = model.layers["1"].feed_forward.w2.weight.std().item()
    assert w2 == pytest.approx(beta * (2 / (dim + hidden)) ** 0.5, rel=0.03)
    assert spannorm.init_receipt(model, model.init_plan).mismatches == ()


def test_optimizer_groups_carry_the_depth_rules_factors():
    _, model = built("llama3", PlacementConfig(name="span", depth_rule="1/sqrt(L):init+lr"), layers=4)
    group = ParamGroupConfig(
        pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-8}
    )
    optimizers = Optimizers.Config(param_groups=[group], implementation="for-loop").build(model_parts=[model])
    found = {}
    for g in optimizers.optimizers[0].param_groups:
        found |= {name: (g["lr"], g["weight_decay"]) for name in g["param_names"]}
    assert found["layers.0.attention.wo.weight"] == pytest.approx((1e-3 / 2, 0.2))
    assert found["layers.0.attention.qkv_linear.wqkv.weight"] == pytest.approx((1e-3, 0.1))
    assert found["layers.0.placement.ffn_norm.weight"] == found["tok_embeddings.weight"] == (1e-3, 0.0)
    assert len(found) == len(list(model.parameters()))


def test_the_registry_has_torchtitans_configurations_with_a_section_for_the_placement():
    config = config_registry.llama3_8b()
    assert config.placement.name == "span" and config.model_spec.model.dim == 4096
    assert config.model_spec.model.layers[0].attention.n_kv_heads == 8
    assert "qwen3_moe_debug" in dir(config_registry) or any("moe" in n for n in dir(config_registry))
    with pytest.raises(AttributeError, match="llama3_9b"):
        _ = config_registry.llama3_9b


def test_what_cannot_be_is_refused_in_words():
    spec = tiny("moe")
    with pytest.raises(InputError, match="inside every expert"):
        place(spec.model, PlacementConfig(name="subln"))
    with pytest.raises(InputError, match="JSON object"):
        place(tiny().model, PlacementConfig(options="norms=1"))
    placed = place(tiny().model, PlacementConfig())
    with pytest.raises(InputError, match="already"):
        place(placed, PlacementConfig())
    with pytest.raises(InputError, match="no placement yet"):
        copy.copy(config_registry.llama3_debugmodel().model_spec.model).build()
