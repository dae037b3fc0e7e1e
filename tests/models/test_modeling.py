"""The model: what it computes, what reaches what, and that every way to the same result gives the same result."""

from __future__ import annotations

import copy

import pytest
import torch
from arms import ARMS, NO_FINAL_NORM
from facts import FACTS
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, modeling_utils
from transformers.utils import output_capturing

from spannorm.models import SpanNormForCausalLM, SpanNormModel
from spannorm.norms import Norm
from spannorm.placements import PLACEMENTS

EXACT = {"rtol": 1e-10, "atol": 1e-10}
placements = pytest.mark.parametrize("placement", PLACEMENTS)


def ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(37, (batch, length))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    assert all(p.grad is not None for p in model.parameters())
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_prenorm_computes_what_transformers_llama_computes(tiny_config, kv_heads, tied):
    config = tiny_config(
        placement="pre", num_key_value_heads=kv_heads, tie_word_embeddings=tied, embedding_multiplier=1.0
    )
    ours = SpanNormForCausalLM(config)
    for name, parameter in ours.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.normal_(parameter, 1.0, 0.3)
    sizes = {key: value for key, value in config.to_dict().items() if key in LlamaConfig().to_dict()}
    theirs = LlamaForCausalLM(LlamaConfig(**{**sizes, "model_type": "llama"}))
    renamed = {
        name.replace("placement.attn_norm", "input_layernorm").replace(
            "placement.ffn_norm", "post_attention_layernorm"
        ): value
        for name, value in ours.state_dict().items()
    }
    theirs.load_state_dict(renamed)
    x = ids()
    a, b = ours(x, labels=x), theirs(x, labels=x)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token(tiny_config):
    model, x = SpanNormForCausalLM(tiny_config()).double(), ids()
    labels = x.clone()
    labels[0, :4] = -100
    out = model(x, labels=labels)
    terms = [
        -out.logits[b, t].log_softmax(-1)[x[b, t + 1]]
        for b in range(2)
        for t in range(x.shape[1] - 1)
        if labels[b, t + 1] != -100
    ]
    # Transformers computes the loss from fp32 logits, whatever the model's dtype
    torch.testing.assert_close(out.loss.double(), torch.stack(terms).mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("initial_norm", ["attention", "embedding", "none"])
def test_the_model_wires_spannorm_by_the_equation(tiny_config, initial_norm):
    # The whole stack written out, with the model's own sublayers and float64 norms: embedding, ends and blocks.
    options = {"placement_options": {"initial_norm": initial_norm}, "depth_rule": "1/L:forward"}
    model = SpanNormForCausalLM(tiny_config(tie_word_embeddings=True, **options)).double()
    weights = {name: nn.init.normal_(p, 1.0, 0.3) for name, p in model.named_parameters() if "norm" in name}

    def N(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"model.{name}.weight"]

    tokens = ids()
    body = model.model
    x = 4.0 * body.embed_tokens.weight[tokens]  # tied at width 16: std ¼, times √16 on input
    rope = body.rotary_emb(x, torch.arange(9).unsqueeze(0))
    if initial_norm == "embedding":
        x = N(x, "layers.0.embedding_norm")
    for b, layer in enumerate(body.layers):
        read = N(x, f"layers.{b}.placement.initial_norm") if b == 0 and initial_norm == "attention" else x
        # sdpa is causal by itself where no mask is given
        h = x + layer.self_attn(hidden_states=read, position_embeddings=rope, attention_mask=None)[0] / 3
        h = N(h, f"layers.{b}.placement.attn_norm")
        x = N(x + layer.mlp(h) / 3, f"layers.{b}.placement.ffn_norm")
    # one reading has one norm, one the other, one neither
    assert len(weights) == 2 * 3 + (initial_norm != "none")
    torch.testing.assert_close(model(tokens).logits, x @ body.embed_tokens.weight.T, **EXACT)


@placements
@pytest.mark.parametrize("qk_norm", [False, True])
def test_no_token_sees_a_later_one(tiny_config, placement, qk_norm):
    model = SpanNormForCausalLM(tiny_config(placement=placement, qk_norm=qk_norm))
    embeds = torch.randn(1, 6, 16, requires_grad=True)
    logits = model(inputs_embeds=embeds).logits
    for t in range(6):
        (reach,) = torch.autograd.grad(logits[0, t].square().sum(), embeds, retain_graph=True)
        assert torch.equal(reach[0, t + 1 :], torch.zeros(5 - t, 16))
        assert (reach[0, : t + 1].abs().amax(-1) > 0).all()


def silent_at_start(placement: str, rule: str, name: str) -> bool:
    """Whether a parameter can have no gradient yet, because a gain of 0 stands behind it.

    ReZero's branches are multiplied by 0: nothing inside one is felt, though the gain itself is. In PreNorm and its
    kin all norms stand inside the branches. In PostNorm they stand on the stream. In SpanNorm all that attention
    does, its norm and its gain included, reaches the block's output through the FFN branch alone: only the FFN's gain
    and the norm behind it are felt.
    """
    if any(part in name for part in FACTS[placement].silent):
        return True
    if rule != "rezero" or "layers" not in name or "embedding_norm" in name:
        return False
    gains = ("ffn_scale",) if placement == "span" else ("attn_scale", "ffn_scale")
    on_stream = FACTS[placement].on_stream
    if placement == "hybrid_star" and "layers.0." in name:
        on_stream = ()  # PreNorm's block
    return not name.removesuffix(".weight").endswith(gains) and not any(f"placement.{own}" in name for own in on_stream)


@pytest.mark.parametrize(("placement", "rule"), ARMS)
def test_every_parameter_has_a_gradient_unless_a_gain_of_zero_stands_behind_it(tiny_config, placement, rule):
    config = tiny_config(placement=placement, depth_rule=rule, qk_norm=True, norm="layernorm")
    model, x = SpanNormForCausalLM(config).double(), ids()
    model(x, labels=x).loss.backward()
    for name, grad in gradients(model).items():
        known = name.replace(".bias", ".weight").replace("gains_norm.", "").replace("matrices.", "")
        silent = silent_at_start(placement, rule, known)
        assert (grad.abs().max() == 0) == silent, name


@placements
def test_sdpa_and_eager_attention_agree(tiny_config, placement):
    model, x = SpanNormForCausalLM(tiny_config(placement=placement, qk_norm=True)), ids()
    mask = torch.ones_like(x)
    mask[0, :3] = 0  # left-padded
    logits = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        logits[implementation] = model(x, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=1e-5, atol=1e-5)


def test_attention_that_is_not_installed_is_refused_by_name(tiny_config, monkeypatch):
    # so that a machine which has it says the same
    matrix = copy.copy(modeling_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX)
    matrix[2] = {**matrix[2], "general_availability_check": lambda: False, "pkg_availability_check": lambda: False}
    monkeypatch.setattr(modeling_utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", matrix)
    with pytest.raises(ImportError, match=r"FlashAttention2 .*doesn't seem to be installed"):
        SpanNormForCausalLM._from_config(tiny_config(), attn_implementation="flash_attention_2")


@placements
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_identical_gradients(tiny_config, placement, reentrant):
    model, x = SpanNormForCausalLM(tiny_config(placement=placement, depth_rule="layerscale")).train(), ids()
    model(x, labels=x).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    # renamed on the way through Transformers 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model(x, labels=x, use_cache=False).loss.backward()
    assert len(calls) == 2, "the forward pass was not run again: nothing was checkpointed"
    for name, grad in gradients(model).items():
        assert torch.equal(grad, plain[name]), name


@placements
def test_hidden_states_are_what_each_block_reads_and_what_the_head_reads(tiny_config, placement):
    config = tiny_config(placement=placement, tie_word_embeddings=True)
    model, x = SpanNormForCausalLM(config), ids()
    states = [4.0 * model.model.embed_tokens.weight[x]]
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: states.append(out))
    out = model(x, output_hidden_states=True, output_streams=True)
    first = model.model.layers[0]
    embedded = states[0] if first.embedding_norm is None else first.embedding_norm(states[0])
    entering = [first.placement.enter(embedded), *states[1:-1]]
    read = [layer.placement.read(state) for layer, state in zip(model.model.layers, entering, strict=True)]
    for recorded, expected in zip(out.hidden_states[:-1], read, strict=True):
        assert torch.equal(recorded, expected)
    assert {h.shape for h in out.hidden_states} == {(2, 9, 16)}
    for last in (3, -1) if hasattr(output_capturing, "selected_hidden_states") else (3,):  # 5.17 does not know -1
        chosen = model(x, output_hidden_states=[0, last]).hidden_states
        assert [h is not None for h in chosen] == [True, False, False, True]
        assert torch.equal(chosen[0], out.hidden_states[0]) and torch.equal(chosen[-1], out.hidden_states[-1])
    assert all(map(torch.equal, out.streams, states[1:]))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(x).hidden_states is model(x).streams is None


@placements
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("initial_norm", [None, "attention", "embedding", "none"])
def test_the_norms_at_the_ends_are_there_if_the_placement_says_so(tiny_config, placement, norm, initial_norm):
    if placement != "span":
        initial_norm = None
    options = {"placement_options": {"initial_norm": initial_norm}} if initial_norm else {}
    model = SpanNormModel(tiny_config(placement=placement, norm=norm, rms_norm_eps=1e-4, **options))
    leaves = ("weight", "bias") if norm == "layernorm" else ("weight",)
    expected = {f"norm.{leaf}" for leaf in leaves if placement not in NO_FINAL_NORM}
    normed = FACTS[placement].embedding_norm or initial_norm == "embedding"
    expected |= {f"layers.0.embedding_norm.{leaf}" for leaf in leaves if normed}
    ends = {name for name in model.state_dict() if name.startswith("norm.") or "embedding_norm" in name}
    assert ends == expected
    assert all(m.eps == 1e-4 for m in (model.norm, model.layers[0].embedding_norm) if isinstance(m, Norm))


def test_qk_norm_normalizes_each_heads_queries_and_keys(tiny_config):
    model = SpanNormForCausalLM(tiny_config(qk_norm=True)).double()
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        projection, norm = getattr(attention, name), getattr(attention, f"{name[0]}_norm")
        nn.init.normal_(norm.weight)
        raw = (x @ projection.weight.T).view(2, 5, heads, 4)
        normed = raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        torch.testing.assert_close(attention.normed(name)(x), normed.reshape(2, 5, heads * 4), **EXACT)
        assert type(projection) is nn.Linear
    assert list(attention.sites) == ["q_proj", "k_proj"]


def test_token_ids_and_their_embeddings_are_two_ways_to_say_the_same(tiny_config):
    model, x = SpanNormForCausalLM(tiny_config(tie_word_embeddings=True)), ids()
    assert torch.equal(model(x).logits, model(inputs_embeds=model.model.embed_tokens(x)).logits)
    for given in ({}, {"input_ids": x, "inputs_embeds": model.model.embed_tokens(x)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**given)


def test_logits_to_keep_keeps_the_last_ones(tiny_config):
    model, x = SpanNormForCausalLM(tiny_config()), ids()
    torch.testing.assert_close(model(x, logits_to_keep=2).logits, model(x).logits[:, -2:])
