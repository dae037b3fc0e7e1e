"""Placements inside the model: their init however it came to be, the norms inside sublayers, and their originals.

Causality, gradients, caches, checkpoints and files are tested for every placement in this folder's other files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from facts import FACTS
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    Olmo2Config,
    Olmo2ForCausalLM,
)

from spannorm.errors import InputError
from spannorm.models import SpanNormForCausalLM
from spannorm.placements import PLACEMENTS, Placement, register_placement

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def randomized(model: SpanNormForCausalLM) -> SpanNormForCausalLM:
    """Norms and head gains that are not what they start as."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


@pytest.mark.parametrize("recommended", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_receipt_is_clean_built_on_meta_device_and_reloaded(tiny_config, tmp_path, placement, recommended):
    base = FACTS[placement].base_init if recommended else "fan_in"
    config = tiny_config(placement=placement, base_init=base, hidden_size=32)
    built = SpanNormForCausalLM(config)
    with torch.device("meta"):
        late = SpanNormForCausalLM(config)
    late.to_empty(device="cpu").init_weights_()
    built.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in (built, late, reloaded):
        receipt = model.init_receipt()
        assert not receipt.mismatches, receipt
        for name, parameter in built.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name
        if base in ("normal_cut", "megatron"):
            for row in receipt.rows:
                if row.expected.sigma:
                    assert model.get_parameter(row.name).abs().max() <= 3 * row.expected.sigma, row.name


@pytest.mark.parametrize("base_init", ["fan_in", "xavier", "normal", "normal_cut", "megatron"])
@pytest.mark.parametrize(("rule", "factor"), [("deepnorm", 24**-0.25), ("subln", math.sqrt(math.log(6)))])
def test_the_methods_own_init_reaches_values_and_ffn_and_leaves_queries_and_keys(tiny_config, rule, factor, base_init):
    placement = rule  # each brings its own
    plain, own = (
        SpanNormForCausalLM(tiny_config(placement=placement, depth_rule=r, base_init=base_init)) for r in ("none", None)
    )
    scaled = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    seen = set()
    for name, parameter in plain.named_parameters():
        leaf = name.split(".")[-2]
        hit = leaf in scaled and parameter.ndim == 2
        seen |= {leaf} if hit else set()
        torch.testing.assert_close(own.get_parameter(name), parameter * (factor if hit else 1.0), rtol=1e-5, atol=1e-7)
    assert seen == set(scaled)


# The parameters inside sublayers besides the seven matrices, with their sizes over a head and over the whole width:
# 4 heads of 4, 2 key heads, FFN 24.
SITES = {
    "q": ("q_norm.weight", {"head": 4, "width": 16}),
    "k": ("k_norm.weight", {"head": 4, "width": 8}),
    "v": ("v_norm.weight", {"head": 4, "width": 8}),
    "attn_out": ("attn_out_norm.weight", {"width": 16}),
    "ffn_down": ("ffn_down_norm.weight", {"width": 24}),
    "head_scale": ("head_scale_norm.weight", {"head": 4}),
}
INNER = [name for name, fact in FACTS.items() if fact.inner_norms]


def inside(norms: Mapping[str, str]) -> dict[str, int]:
    return {SITES[role][0]: SITES[role][1][over] for role, over in norms.items()}


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_inner_norms_stand_where_the_placement_says_and_nowhere_else(tiny_config, placement, qk_norm):
    model = SpanNormForCausalLM(tiny_config(placement=placement, qk_norm=qk_norm))
    own = {"q": "head", "k": "head"} if qk_norm else {}
    expected = inside({**own, **FACTS[placement].inner_norms})
    for layer in model.model.layers:
        found = {
            name.split(".", 1)[1]: parameter
            for name, parameter in layer.named_parameters()
            if name.startswith(("self_attn.", "mlp.")) and parameter.ndim == 1
        }
        assert {name: p.numel() for name, p in found.items()} == expected
        assert all(torch.equal(p, torch.ones_like(p)) for p in found.values())


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attention(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """4 query heads of 4 channels on 2 key heads, one position and one head at a time."""
    heads = {}
    for letter, count in (("q", 4), ("k", 2), ("v", 2)):
        y = x @ w[f"{letter}_proj.weight"].T
        gain = w.get(f"{letter}_norm.weight")
        if gain is not None and len(gain) != 4:
            y = rms(y, gain)
        y = y.view(*x.shape[:2], count, 4)
        heads[letter] = rms(y, gain) if gain is not None and len(gain) == 4 else y
    for letter in "qk":
        y, turned = heads[letter], torch.empty_like(heads[letter])
        for t in range(x.shape[1]):
            for i in range(2):  # channel i turns with channel i + 2
                angle = t * 10000 ** (-i / 2)
                turned[:, t, :, i] = y[:, t, :, i] * math.cos(angle) - y[:, t, :, i + 2] * math.sin(angle)
                turned[:, t, :, i + 2] = y[:, t, :, i + 2] * math.cos(angle) + y[:, t, :, i] * math.sin(angle)
        heads[letter] = turned
    outputs = torch.empty(*x.shape[:2], 4, 4, dtype=x.dtype)
    for t in range(x.shape[1]):
        for head in range(4):
            past = heads["k"][:, : t + 1, head // 2]
            weights = (past @ heads["q"][:, t, head, :, None] / 2).squeeze(-1).softmax(-1)
            outputs[:, t, head] = (weights[..., None] * heads["v"][:, : t + 1, head // 2]).sum(1)
    if "head_scale_norm.weight" in w:
        outputs = outputs * w["head_scale_norm.weight"][:, None]
    y = outputs.flatten(2)
    y = rms(y, w["attn_out_norm.weight"]) if "attn_out_norm.weight" in w else y
    return y @ w["o_proj.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("placement", ["pre", *INNER])
def test_sublayers_with_their_inner_norms_are_what_the_papers_write(tiny_config, placement):
    # wide init, so that the softmax is far from uniform and every norm has something to do
    config = tiny_config(placement=placement, depth_rule="none", base_init="normal", initializer_range=0.7)
    body = randomized(SpanNormForCausalLM(config)).double().model
    layer, x = body.layers[1], torch.randn(2, 6, 16, dtype=torch.float64)
    # RoPE's own tables are fp32
    positions = torch.arange(6, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.01], dtype=torch.float64)
    angles = torch.cat([positions, positions], dim=-1)[None]
    rope = angles.cos(), angles.sin()
    w = dict(layer.self_attn.named_parameters())
    ours = layer.self_attn(hidden_states=x, position_embeddings=rope, attention_mask=None)[0]
    torch.testing.assert_close(ours, attention(w, x), **EXACT)
    shipped = body.rotary_emb(x, torch.arange(6)[None])
    torch.testing.assert_close(shipped, rope, rtol=1e-6, atol=1e-6)

    w = dict(layer.mlp.named_parameters())
    inside = F.silu(x @ w["gate_proj.weight"].T) * (x @ w["up_proj.weight"].T)
    gain = w.get("ffn_down_norm.weight")
    inside = inside if gain is None else rms(inside, gain)
    torch.testing.assert_close(layer.mlp(x), inside @ w["down_proj.weight"].T, **EXACT)


def sizes_of(config) -> dict:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {n: getattr(config, n) for n in (*names, "num_key_value_heads", "max_position_embeddings")}


def renamed(model: SpanNormForCausalLM, names: dict[str, str]) -> dict[str, Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = value.clone()
    return state


@pytest.mark.parametrize("tied", [False, True])
def test_peri_computes_what_transformers_gemma_2_computes(tiny_config, tied):
    config = tiny_config(
        placement="peri", hidden_act="gelu_pytorch_tanh", tie_word_embeddings=tied, embedding_multiplier=4.0
    )
    ours = randomized(SpanNormForCausalLM(config)).eval()
    theirs = Gemma2ForCausalLM(
        Gemma2Config(
            **sizes_of(config),
            head_dim=4,
            query_pre_attn_scalar=4,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            sliding_window=64,
            rms_norm_eps=1e-6,
            tie_word_embeddings=tied,
            hidden_activation="gelu_pytorch_tanh",
            attn_implementation="eager",
        )
    ).eval()
    names = {
        "placement.attn_norm": "input_layernorm",
        "placement.attn_output_norm": "post_attention_layernorm",
        "placement.ffn_norm": "pre_feedforward_layernorm",
        "placement.ffn_output_norm": "post_feedforward_layernorm",
    }
    # Gemma stores a gain as what is added to 1
    state = {n: v - 1 if v.ndim == 1 else v for n, v in renamed(ours, names).items()}
    theirs.load_state_dict(state)
    x = torch.randint(37, (2, 9))
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_olmo2_computes_what_transformers_olmo_2_computes(tiny_config, kv_heads):
    config = tiny_config(placement="olmo2", num_key_value_heads=kv_heads)
    ours = randomized(SpanNormForCausalLM(config)).eval()
    theirs = Olmo2ForCausalLM(
        Olmo2Config(**sizes_of(config), rms_norm_eps=1e-6, tie_word_embeddings=False, pad_token_id=None)
    ).eval()
    names = {
        "placement.attn_norm": "post_attention_layernorm",
        "placement.ffn_norm": "post_feedforward_layernorm",
    }
    theirs.load_state_dict(renamed(ours, names))
    x = torch.randint(37, (2, 9))
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, rtol=1e-4, atol=1e-5)
    assert LlamaConfig().rope_parameters["rope_theta"] == theirs.config.rope_parameters["rope_theta"]


class Halved(Placement):
    """A placement of someone's own: PreNorm whose skip forgets half."""

    final_norm = True
    default_depth_rule = "1/L:forward"
    inner_norms = {"v": "head"}  # noqa: RUF012

    def block(self, x: Tensor, attn, ffn) -> Tensor:
        h = self.attn_norm(0.5 * x, attn(x), branch=self.attn_scale)
        return self.ffn_norm(0.5 * h, ffn(h), branch=self.ffn_scale)


@pytest.fixture
def registry():
    """What a test registers is gone after it."""
    before = dict(PLACEMENTS)
    yield PLACEMENTS
    PLACEMENTS.clear()
    PLACEMENTS.update(before)


def test_a_placement_of_ones_own_trains_in_the_model_and_comes_back_from_its_file(tiny_config, tmp_path, registry):
    register_placement("halved", Halved)
    with pytest.raises(InputError, match="'halved' is taken"):
        register_placement("halved", registry["pre"])
    config = tiny_config(placement="halved")
    assert config.depth_rule == "1/L:forward"
    model, x = SpanNormForCausalLM(config), torch.randint(37, (4, 12))
    assert not model.init_receipt().mismatches
    assert model.model.layers[0].self_attn.v_norm.weight.shape == (4,)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(x, labels=x).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(x).logits, model.eval()(x).logits)
