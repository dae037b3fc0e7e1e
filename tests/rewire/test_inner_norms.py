"""Norms inside the sublayers of other people's models, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from rewire_families import in_float64, tiny_model
from torch import Tensor
from torch.nn import functional as F

import spannorm
from spannorm.rewiring import FAMILIES as ROWS

IDS = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(5))
X = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


EPS = {"llama": 1e-6, "glm4": 1.5625e-07, "mixtral": 1e-5, "gpt_oss": 1e-5, "deepseek_v3": 1e-6}
"""Of each family's own norms, as its configuration has it unless told otherwise."""


def rms(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    return gain * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return norm.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) + norm.bias


def rewired(family: str, placement: str):
    model = in_float64(tiny_model(family)).eval()
    spannorm.rewire(model, placement, init=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model, model.base_model.get_submodule(ROWS[family].layers)[1]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_separate_projections_are_normalized_per_head_or_over_the_whole_width():
    for placement, width in (("hybrid", 8), ("olmo2", None)):
        _, layer = rewired("llama", placement)
        for role in ("q", "k", "v"):
            y = F.linear(X, getattr(layer.self_attn, f"{role}_proj").weight)
            if placement == "olmo2" and role == "v":
                assert "v_proj" not in layer.self_attn.sites
                continue
            size = width or y.shape[-1]
            gain = getattr(layer.self_attn, f"{role}_norm").weight
            assert gain.shape == (size,)
            close(layer.self_attn.normed(f"{role}_proj")(X), rms(y.unflatten(-1, (-1, size)), gain).flatten(-2))


@pytest.mark.parametrize("placement", ["hybrid", "olmo2"])
def test_phi3s_fused_projection_is_normalized_part_by_part(placement):
    _, layer = rewired("phi3", placement)
    attention = layer.self_attn
    q, k, v = F.linear(X, attention.qkv_proj.weight).split((32, 16, 16), -1)
    per_head = placement == "hybrid"
    parts = [
        rms(y.unflatten(-1, (-1, 8 if per_head else y.shape[-1])), norm.weight, 1e-5).flatten(-2)
        for y, norm in ((q, attention.q_norm), (k, attention.k_norm))
    ]
    parts.append(rms(v.unflatten(-1, (-1, 8)), attention.v_norm.weight, 1e-5).flatten(-2) if per_head else v)
    close(attention.normed("qkv_proj")(X), torch.cat(parts, -1))


@pytest.mark.parametrize("placement", ["hybrid", "olmo2"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_fused_projections_of_either_order_are_normalized_part_by_part(family, placement):
    _, layer = rewired(family, placement)
    if family == "gpt2":  # q, k, v, each head after head; stored (in, out)
        attention, name = layer.attn, "c_attn"
        projection = attention.c_attn
        y = X @ projection.weight + projection.bias
        parts = [part.unflatten(-1, (4, 8)) for part in y.chunk(3, -1)]
    else:  # head after head, each q, k, v
        attention, name = layer.attention, "query_key_value"
        projection = attention.query_key_value
        y = F.linear(X, projection.weight, projection.bias)
        parts = list(y.unflatten(-1, (4, 24)).chunk(3, -1))
    for i, role in enumerate(("q", "k", "v") if placement == "hybrid" else ("q", "k")):
        norm = getattr(attention, f"{role}_norm")
        if placement == "hybrid":
            parts[i] = layer_norm(parts[i], norm)
        else:
            parts[i] = layer_norm(parts[i].flatten(-2), norm).unflatten(-1, (4, 8))
    expected = torch.cat([p.flatten(-2) for p in parts], -1) if family == "gpt2" else torch.cat(parts, -1).flatten(-2)
    close(attention.normed(name)(X), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "glm4"])
def test_subln_normalizes_what_the_last_projections_read(family):
    _, layer = rewired(family, "subln")
    paths = {
        "gpt2": ("attn.c_proj", "mlp.c_proj"), "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h")
    }.get(family, ("self_attn.o_proj", "mlp.down_proj"))  # fmt: skip
    for path, role in zip(paths, ("attn_out", "ffn_down"), strict=True):
        owner, _, name = path.rpartition(".")
        sublayer, projection = layer.get_submodule(owner), layer.get_submodule(path)
        width = projection.weight.shape[0 if family == "gpt2" else 1]
        z = torch.randn(2, 9, width, dtype=torch.float64)
        norm = getattr(sublayer, f"{role}_norm")
        n = layer_norm(z, norm) if family.startswith("gpt") else rms(z, norm.weight, EPS[family])
        w = projection.weight if family == "gpt2" else projection.weight.T
        close(sublayer.normed(name)(z), n @ w + (0.0 if projection.bias is None else projection.bias))


def test_normformers_scale_is_one_gain_per_head_before_attention_out():
    _, layer = rewired("llama", "normformer")
    attention = layer.self_attn
    gain = attention.head_scale_norm.weight
    assert gain.shape == (4,) and attention.sites["o_proj"].reads == ("head_scale",)
    close(attention.normed("o_proj")(X), F.linear(X * gain.repeat_interleave(8), attention.o_proj.weight))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
def test_experts_share_one_norm_before_their_last_matrix(family, backend):
    model, layer = rewired(family, "subln")
    experts = layer.mlp.experts
    gain, eps = experts.input_norm.weight, EPS[family]
    chosen = torch.tensor([[0, 1], [3, 2], [1, 3], [0, 2], [2, 1]])
    weights = torch.rand(5, 2, dtype=torch.float64)
    x = X.flatten(0, 1)[:5]
    expected = torch.zeros_like(x)
    for t in range(5):
        for e, w in zip(chosen[t], weights[t], strict=True):
            if family == "gpt_oss":
                y = x[t] @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
                gate, up = y[::2].clamp(max=7.0), y[1::2].clamp(-7.0, 7.0)
                z = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                o = rms(z, gain, eps) @ experts.down_proj[e] + experts.down_proj_bias[e]
            else:
                gate, up = (experts.gate_up_proj[e] @ x[t]).chunk(2)
                o = experts.down_proj[e] @ rms(F.silu(gate) * up, gain, eps)
            expected[t] += w * o
    model.float().set_experts_implementation(backend)
    actual = experts(x.float(), chosen, weights.float())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
