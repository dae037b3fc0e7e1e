"""Placements against the modules that Transformers ships: from the same weights, in float64, with their gradients.

Their layers keep their own norms and skips; attention and FFN are replaced by the same two functions on both sides.
Where a release of Transformers lacks a module, its test is skipped by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equations import EPS, F64, WIDTH
from torch import Tensor, nn

from spannorm.placements import Placement, Stack

DEPTH = 5
SIZES = {
    "vocab_size": 11, "hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": DEPTH,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


class Doubled:
    """`torch`, where fp32 is float64: Transformers' norms round to fp32 inside."""

    float32, float = F64, F64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a family's modules, made to compute in float64."""

    def imported(name: str) -> Any:
        module = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
        monkeypatch.setattr(module, "torch", Doubled())
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return module

    return imported


class Sublayer(nn.Module):
    """A function of (batch, seq, hidden), called as Transformers calls its attention or its FFN."""

    def __init__(self, returns: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.returns = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=F64)), returns

    def function(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight).cumsum(1)

    def forward(self, x: Tensor | None = None, *_: Any, hidden_states: Tensor | None = None, **__: Any) -> Any:
        found = self.function(hidden_states if x is None else x)
        return self.returns(found)


def attention() -> Sublayer:
    return Sublayer(lambda f: (f, None))


def ffn() -> Sublayer:
    return Sublayer(lambda f: f)


def config_of(name: str, **more: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**{**SIZES, **more})


def randomized(module: nn.Module) -> nn.Module:
    module = module.to(F64)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.5, 0.5)
    return module


def same(
    ours: Placement, run: Callable[[Tensor], Tensor], sublayers: tuple[Sublayer, Sublayer], x: Tensor,
    pairs: dict[str, Tensor], absent: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Output, and the gradient of the stream, of both sublayers and of every parameter.

    Args:
        run: their block.
        pairs: our parameter → their value, in our shape.
        absent: parameters of ours that they lack, which stay as they start.
    """
    own = dict(ours.named_parameters())
    assert set(own) == {*pairs, *absent}
    with torch.no_grad():
        for name, value in pairs.items():
            own[name].copy_(value)
    attn, mlp = sublayers
    x.requires_grad_()
    outputs = [ours(x, attn.function, mlp.function), run(x)]
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(outputs[0])
    weights = [x, attn.weight, mlp.weight]
    got, wanted = (
        torch.autograd.grad(out, [*weights, *leaves], upstream)
        for out, leaves in zip(outputs, ([own[n] for n in pairs], list(pairs.values())), strict=True)
    )
    for name, a, b in zip(("x", "attn", "ffn", *pairs), got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def block(name: str, b: int, norm: str = "rmsnorm", **options: Any) -> Placement:
    return Stack(name, DEPTH, "none", options, norm, EPS).block(b, WIDTH).double()


def stream() -> Tensor:
    return torch.randn(2, 3, WIDTH, dtype=F64)


def test_parallel_is_cohere(family):
    layer = family("cohere").CohereDecoderLayer(config_of("CohereConfig", layer_norm_eps=EPS), 1)
    layer = randomized(layer)
    layer.self_attn, layer.mlp = attention(), ffn()
    pairs = {"attn_norm.weight": layer.input_layernorm.weight}
    same(block("parallel", 1, "layernorm"), layer, (layer.self_attn, layer.mlp), stream(), pairs, ("attn_norm.bias",))


def test_parallel_with_two_norms_is_gpt_neox(family):
    layer = family("gpt_neox").GPTNeoXLayer(config_of("GPTNeoXConfig", layer_norm_eps=EPS, hidden_dropout=0.0), 1)
    layer = randomized(layer)
    layer.attention, layer.mlp = attention(), ffn()
    pairs = {
        f"{ours}.{p}": getattr(theirs, p)
        for ours, theirs in (("attn_norm", layer.input_layernorm), ("ffn_norm", layer.post_attention_layernorm))
        for p in ("weight", "bias")
    }
    ours = block("parallel", 1, "layernorm", norms=2)
    same(ours, lambda x: layer(x), (layer.attention, layer.mlp), stream(), pairs)


@pytest.mark.parametrize("b", range(DEPTH))
def test_averaged_is_beam(family, b):
    layer = family("beam").BeamDecoderLayer(config_of("BeamConfig", rms_norm_eps=EPS), b)
    layer.self_attn = layer.mlp = nn.Identity()
    layer = randomized(layer)
    layer.self_attn, layer.mlp = attention(), ffn()
    names = {
        "attn_norm": "input_layernorm", "attn_output_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm", "ffn_output_norm": "post_feedforward_layernorm",
    }  # fmt: skip
    pairs = {f"{ours}.weight": getattr(layer, theirs).weight for ours, theirs in names.items()}
    same(block("averaged", b), lambda x: layer(x, None), (layer.self_attn, layer.mlp), stream(), pairs)


def test_channel_is_zaya(family):
    layer = family("zaya").ZayaDecoderLayer(config_of("ZayaConfig", rms_norm_eps=EPS, norm_epsilon=EPS), 1)
    layer.self_attn = layer.mlp = nn.Identity()
    layer = randomized(layer)
    layer.self_attn, layer.mlp = attention(), Sublayer(lambda f: (f, None))
    pairs = {"attn_norm.weight": layer.input_layernorm.weight, "ffn_norm.weight": layer.post_attention_layernorm.weight}
    scaling = {"attn": layer.post_attention_residual_scale, "ffn": layer.post_mlp_residual_scale}
    for site, theirs in scaling.items():
        for ours, name in (("skip", "residual"), ("branch", "hidden_states")):
            pairs[f"{site}_{ours}_gain"] = getattr(theirs, f"{name}_scale")
            pairs[f"{site}_{ours}_shift"] = getattr(theirs, f"{name}_bias")
    same(block("channel", 1), lambda x: layer(x)[0], (layer.self_attn, layer.mlp), stream(), pairs)
