"""Every family: its rewired block against the equation, and what Transformers promises about any model."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from equations import own_parameters
from facts import EQUATIONS
from rewire_families import FAMILIES, checkpoint, in_float64, tiny_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import spannorm
from spannorm.models.layer import CACHE
from spannorm.placements import PLACEMENTS
from spannorm.rewiring import FAMILIES as ROWS

LAYERS = 3
QUICK = [pytest.param(family, "span", id=family) for family in FAMILIES]
PRODUCT = [
    pytest.param(family, placement, id=f"{family}-{placement}", marks=[] if quick else [pytest.mark.slow])
    for family in FAMILIES
    for placement in PLACEMENTS
    for quick in [placement == "span" or (family, placement) == ("phi3", "mhc")]  # streams, and an epsilon of 1e-5
]
IDS = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(5))

LAYER_NORM = ("olmo", "starcoder2", "stablelm", "gpt2", "gpt_neox")
EPS_KEYS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon")


def rewired(family: str, placement: str, **how: Any) -> Any:
    model = tiny_model(family).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LayerNormScaling with depth rule")
        spannorm.rewire(model, placement, **how)
    return model


def jolt(model: Any) -> None:
    """Move all that norms and placements learn off its initial value, so that none can be left out unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or ".placement." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))


def eps_of(family: str, config: Any) -> float:
    return 1e-5 if family == "olmo" else next(getattr(config, key) for key in EPS_KEYS if hasattr(config, key))


def norm_of(family: str, config: Any):
    """The family's norm in float64, from its definition."""
    eps = eps_of(family, config)

    def normalize(x: Tensor, module: Any) -> Tensor:
        if family in LAYER_NORM:
            x = x - x.mean(-1, keepdim=True)
        y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
        gain = dict(module.named_parameters())
        if "weight" in gain:
            y = y * (gain["weight"] + (1.0 if family in ("gemma2", "gemma3_text") else 0.0))
        return y + gain["bias"] if "bias" in gain else y

    return normalize


def test_every_family_of_the_table_is_tested_and_every_tested_one_is_in_the_table():
    assert set(FAMILIES) == set(ROWS)


@pytest.mark.parametrize("family", FAMILIES)
def test_rewired_to_what_it_is_no_bit_of_logits_or_gradients_changes(family):
    before = tiny_model(family)
    jolt(before)
    after = tiny_model(family)
    after.load_state_dict(before.state_dict())
    report = spannorm.rewire(after, ROWS[family].placement, depth_rule="none")
    assert not report.added and not report.dropped and report.final_norm
    assert ROWS[family].placement == {
        "olmo2": "olmo2", "olmo3": "olmo2", "gemma2": "peri", "gemma3_text": "peri", "glm4": "peri"
    }.get(family, "pre")  # fmt: skip
    losses = []
    for m in (before, after):
        torch.manual_seed(1)  # of the dropouts
        losses.append(m(IDS, labels=IDS, use_cache=False))
    assert torch.equal(losses[0].logits, losses[1].logits)
    gradients = [torch.autograd.grad(out.loss, list(m.parameters()), allow_unused=True) for out, m in
                 zip(losses, (before, after), strict=True)]  # fmt: skip
    by_name = [dict(zip((n for n, _ in m.named_parameters()), g, strict=True)) for m, g in
               zip((before, after), gradients, strict=True)]  # fmt: skip
    moved = {f".{path}.": f".placement.{role}." for role, path in ROWS[family].norms.items()}
    for name, gradient in by_name[0].items():
        for path, role in moved.items():
            name = name.replace(path, role)
        other = by_name[1].pop(name)
        assert (gradient is None and other is None) or torch.equal(gradient, other), name
    assert not by_name[1], "nothing was added"


@pytest.mark.parametrize(("family", "placement"), PRODUCT)
def test_each_block_is_the_equation_around_the_familys_own_sublayers(family, placement):
    rule = "1/sqrt(L):forward"
    model = in_float64(rewired(family, placement, depth_rule=rule, init=False))
    jolt(model)
    row = ROWS[family]
    plain = in_float64(tiny_model(family)).eval()
    inner = bool(model.base_model.get_submodule(row.layers)[0].placement.inner_norms)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()}, strict=False)
    normalize = norm_of(family, model.config)
    layers, plain_layers = (m.base_model.get_submodule(row.layers) for m in (model, plain))
    seen: dict[int, Any] = {}

    def entering(layer: Any, args: Any, kwargs: Any) -> None:
        seen[layer.placement.layer_idx] = [args, kwargs]

    def leaving(layer: Any, _: Any, output: Any) -> None:
        seen[layer.placement.layer_idx].append(output)

    for layer in layers:
        layer.register_forward_pre_hook(entering, with_kwargs=True)
        layer.register_forward_hook(leaving)
    with torch.no_grad():
        model(IDS, use_cache=False)
        for b, layer in enumerate(layers):
            (x, *rest), kwargs, actual = seen[b]
            if rest:  # GPT-2 hands its layers the cache, the mask and the encoder's states by position
                kwargs = kwargs | {CACHE: rest[0], "attention_mask": rest[1]}
            sublayers = layer if inner else plain_layers[b]
            factor = 0.22 if family == "granite" else 1.0

            def attention(t: Tensor, sublayers=sublayers, kwargs=kwargs, factor=factor) -> Tensor:
                return factor * getattr(sublayers, row.attention)(t, **kwargs)[0]

            def feed_forward(t: Tensor, sublayers=sublayers, factor=factor) -> Tensor:
                y = getattr(sublayers, row.ffn)(t)
                return factor * (y[0] if isinstance(y, tuple) else y)

            if layer.embedding_norm is not None:
                x = normalize(x, layer.embedding_norm)
            own = own_parameters(layer.placement)
            case = SimpleNamespace(
                A=attention,
                F=feed_forward,
                N=lambda t, name, placement=layer.placement: normalize(t, getattr(placement, name)),
                ca=LAYERS**-0.5,
                cf=LAYERS**-0.5,
                b=b,
                L=LAYERS,
                width=x.shape[-1],
                eps=eps_of(family, model.config),
                leaf=lambda name, *shape, own=own: own[name].view(shape),
                sum=lambda site, skip, f: skip + f,
            )
            expected = EQUATIONS[placement](case, x)
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("family", "placement"), PRODUCT)
def test_a_generated_text_is_the_same_with_and_without_the_cache(family, placement):
    model = in_float64(rewired(family, placement, init="redraw"))
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    outputs = [model.generate(IDS, use_cache=c, output_logits=True, **how) for c in (True, False)]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for cached, uncached in zip(*(o.logits for o in outputs), strict=True):
        torch.testing.assert_close(cached, uncached, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "placement"), PRODUCT)
def test_saved_and_loaded_it_is_the_same_model_and_plain_loading_refuses(family, placement, tmp_path: Path):
    model = rewired(family, placement)
    jolt(model)
    model.save_pretrained(tmp_path)
    again = spannorm.load(tmp_path, attn_implementation="eager")
    assert type(again) is type(model)
    state, back = model.state_dict(), again.state_dict()
    assert list(state) == list(back) and all(torch.equal(state[k], back[k]) for k in state)
    with torch.no_grad():
        # a tensor of a file lies at another address, by which a product of a matrix and a vector may round
        torch.testing.assert_close(model(IDS).logits, again(IDS).logits, rtol=0, atol=1e-6)
    for plain in (type(model), type(model.base_model)):
        with pytest.raises(FileNotFoundError, match=r"this model was rewired, load it with spannorm\.load"):
            plain.from_pretrained(tmp_path)
    for auto in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match="trust_remote_code"):
            auto.from_pretrained(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize(("family", "placement"), PRODUCT)
def test_checkpointed_gradients_are_the_same_bits(family, placement):
    gradients = []
    for checkpointed in (False, True):
        model = rewired(family, placement).train()
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        layer = model.base_model.get_submodule(ROWS[family].layers)[1]
        layer.placement.register_forward_pre_hook(count)
        if checkpointed:
            checkpoint(model)
        torch.manual_seed(1)  # of the dropouts
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        assert calls == 1 + checkpointed, "the layer runs again in the backward pass, and only then"
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None and other is None) or torch.equal(gradient, other), name
