"""Placements against the modules that Transformers ships: from the same weights, in float64, with their gradients.

Their layers keep their own norms and skips; attention and FFN are replaced by the same two functions on both sides.
Where a release of Transformers lacks a module, its test is skipped by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equations import EPS, F64, WIDTH, own_parameters
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
    own = own_parameters(ours)
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


def test_deepnorm_under_a_forward_factor_is_minimax_one_norm_later(family):
    """Its layer is `n = N(x)`, `m = N'(αn + βA(n))`, `x' = αm + βF(m)`: DeepNorm, once its first norm is counted to the
    block before, which it ends. Then the embedding is normed once, and the model's final norm ends the last block."""
    alpha, beta = (2 * DEPTH) ** 0.25, DEPTH**-0.5
    factors = {f"{site}_{name}_factor": value for site in ("full_attn", "mlp") for name, value in
               (("alpha", alpha), ("beta", beta))}  # fmt: skip
    config = config_of("MiniMaxConfig", layer_types=["full_attention"] * DEPTH, rms_norm_eps=EPS, **factors)
    layer, after = (randomized(family("minimax").MiniMaxDecoderLayer(config, b)) for b in (1, 2))
    layer.input_layernorm, layer.self_attn, layer.mlp = nn.Identity(), attention(), ffn()
    ours = Stack("deepnorm", DEPTH, "1/sqrt(L):forward", {}, "rmsnorm", EPS).block(1, WIDTH).double()
    pairs = {
        "attn_norm.weight": layer.post_attention_layernorm.weight,
        "ffn_norm.weight": after.input_layernorm.weight,
    }
    same(ours, lambda x: after.input_layernorm(layer(x)), (layer.self_attn, layer.mlp), stream(), pairs)


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


def streams(n: int) -> Tensor:
    return torch.randn(2, 3, n, WIDTH, dtype=F64)


@pytest.mark.parametrize("b", [1, 3])
def test_mhc_is_deepseek_v4(family, b):
    module = family("deepseek_v4")
    config = config_of("DeepseekV4Config", rms_norm_eps=EPS)
    # their attention and experts need more of the configuration than a residual path does
    layer = module.DeepseekV4DecoderLayer.__new__(module.DeepseekV4DecoderLayer)
    nn.Module.__init__(layer)
    for site in ("attn", "ffn"):
        setattr(layer, f"{site}_hc", module.DeepseekV4HyperConnection(config))
    layer.input_layernorm, layer.post_attention_layernorm = (module.DeepseekV4RMSNorm(WIDTH, EPS) for _ in range(2))
    layer = randomized(layer)
    layer.self_attn, layer.mlp = attention(), ffn()
    pairs = {"attn_norm.weight": layer.input_layernorm.weight, "ffn_norm.weight": layer.post_attention_layernorm.weight}
    for site, theirs in (("attn", layer.attn_hc), ("ffn", layer.ffn_hc)):
        pairs |= {f"{site}_weights": theirs.fn, f"{site}_base": theirs.base, f"{site}_gates": theirs.scale}
    same(block("mhc", b), lambda x: layer(x), (layer.self_attn, layer.mlp), streams(4), pairs)


def test_mhcs_readout_is_deepseek_v4s(family):
    head = randomized(family("deepseek_v4").DeepseekV4HyperHead(config_of("DeepseekV4Config", rms_norm_eps=EPS)))
    last = block("mhc", DEPTH - 1)
    with torch.no_grad():
        for ours, theirs in (("weights", head.hc_fn), ("base", head.hc_base), ("gates", head.hc_scale)):
            own_parameters(last)[f"readout_{ours}"].copy_(theirs)
    x = streams(4)
    torch.testing.assert_close(last.exit(x), head(x), rtol=1e-11, atol=1e-11)


def gated_pairs(theirs: Any, site: str) -> dict[str, Tensor]:
    names = {"down": "input_mix_weight_down", "up": "input_mix_weight_up", "write": "block_inject_weight"}
    pairs = {f"{site}_{ours}": m.weight for ours, name in names.items() if (m := getattr(theirs, name)) is not None}
    gains = [nn.Parameter(torch.randn(WIDTH, dtype=F64)) for _ in range(4)]
    del theirs.hc_norm.weight
    theirs.hc_norm.weight = torch.cat(gains) - 1  # they store a gain as what is added to 1
    return pairs | {f"{site}_{i}_norm.weight": gain for i, gain in enumerate(gains)}


@pytest.mark.parametrize("b", [1, DEPTH - 1])
def test_gated_is_qwen4_exp(family, b):
    module = family("qwen4_exp")
    config = config_of("Qwen4ExpTextConfig", rms_norm_eps=EPS, hc_count=4, hc_lowrank=3)
    layer = module.Qwen4ExpTextDecoderLayer.__new__(module.Qwen4ExpTextDecoderLayer)
    nn.Module.__init__(layer)
    layer.layer_type, layer.ple = "full_attention", None
    layer.attn_hyper_connection, layer.mlp_hyper_connection = (
        module.Qwen4ExpTextGatedResidual(config) for _ in range(2)
    )
    mixer = module.Qwen4ExpTextGatedResidual(config, use_combine=False)
    layer, mixer = randomized(layer), randomized(mixer)
    layer.self_attn, layer.mlp = attention(), ffn()
    pairs = gated_pairs(layer.attn_hyper_connection, "attn") | gated_pairs(layer.mlp_hyper_connection, "ffn")
    last = b == DEPTH - 1
    pairs |= gated_pairs(mixer, "readout") if last else {}

    def run(x: Tensor) -> Tensor:
        y = layer(x.flatten(-2), None)
        return mixer(y) if last else y.unflatten(-1, (4, WIDTH))

    same(block("gated", b, rank=3), run, (layer.self_attn, layer.mlp), streams(4), pairs)


@pytest.mark.parametrize("groups", [2, 5])
def test_attnres_block_is_inkling2(family, groups):
    """The whole stack, since their layers and their model hold the state together."""
    module = family("inkling2")
    per = -(-DEPTH // groups)
    config = config_of("Inkling2TextConfig", rms_norm_eps=1e-6, n_layers_per_attn_res_block=per)
    monkey = module.Inkling2BlockAttentionResidual
    layers, sublayers = [], []
    for b in range(DEPTH):
        layer = module.Inkling2SlidingDecoderLayer.__new__(module.Inkling2SlidingDecoderLayer)
        nn.Module.__init__(layer)
        layer.is_block_boundary = b % per == 0
        layer.attention_input, layer.mlp_input = monkey(config) if b else None, monkey(config)
        layer.input_layernorm, layer.post_attention_layernorm = (module.Inkling2RMSNorm(WIDTH) for _ in range(2))
        layer = randomized(layer)
        layer.post_attention_convolution = layer.post_mlp_convolution = ffn_identity()
        layer.self_attn, layer.mlp = attention(), ffn()
        layers.append(layer)
        sublayers.append((layer.self_attn, layer.mlp))
    final = randomized(monkey(config))
    x = stream().requires_grad_()

    hidden, closed = x, x.new_zeros(*x.shape[:-1], 0, WIDTH)
    for layer in layers:
        found = layer(hidden, closed)
        closed = torch.cat([closed, hidden.unsqueeze(-2)], dim=-2) if layer.is_block_boundary else closed
        hidden = found
    theirs = final(closed, hidden)[0]

    stack = Stack("attnres_block", DEPTH, None, {"groups": groups, "form": "inkling"})
    blocks = [b.double() for b in stack.blocks(WIDTH)]
    ours, pairs = x, []
    for b, (placement, layer) in enumerate(zip(blocks, layers, strict=True)):
        own = {
            "attn_norm.weight": layer.input_layernorm.weight,
            "ffn_norm.weight": layer.post_attention_layernorm.weight,
        }
        own |= {"ffn_query": layer.mlp_input.query} | ({"attn_query": layer.attention_input.query} if b else {})
        own |= {"readout_query": final.query} if b == DEPTH - 1 else {}
        mine = own_parameters(placement)
        assert set(own) == set(mine)
        for name, value in own.items():
            mine[name].data.copy_(value)
            pairs.append((mine[name], value))
        ours = placement(ours, *(s.function for s in sublayers[b]))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(ours)
    got = torch.autograd.grad(ours, [x, *(a for a, _ in pairs)], upstream)
    wanted = torch.autograd.grad(theirs, [x, *(b for _, b in pairs)], upstream)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def ffn_identity() -> nn.Module:
    module = Sublayer(lambda f: f)
    module.function = lambda x: x  # type: ignore[method-assign]
    return module


def test_mixed_input_is_nanochat_on_a_mixed_stream(family):
    layer = family("nanochat").NanoChatDecoderLayer(config_of("NanoChatConfig", rms_norm_eps=EPS), 1)
    layer = layer.to(F64)
    layer.self_attn, layer.mlp = attention(), ffn()
    ours, x = block("mixed_input", 1), streams(2)

    def run(x: Tensor) -> Tensor:
        first, second = x.unbind(-2)  # the second is the embedding
        mixed = ours.stream_lambda.detach() * first + ours.input_lambda.detach() * second
        return torch.stack((layer(mixed), second), dim=-2)

    absent = ("stream_lambda", "input_lambda", "attn_norm.weight", "ffn_norm.weight")  # their norms have no gain
    same(ours, run, (layer.self_attn, layer.mlp), x, {}, absent)
