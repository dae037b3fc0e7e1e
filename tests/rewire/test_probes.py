"""Probes see a rewired model as they see our own, and any family's as what it computes."""

import pytest
import torch
from rewire_families import FAMILIES, tiny_model

import spannorm
from spannorm.probes import block_skip_costs, gradient_paths, measure

IDS = torch.arange(24).view(2, 12) % 37
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 37}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def everything(model) -> tuple:
    model.eval()

    def loss_of() -> torch.Tensor:
        return model(IDS, labels=IDS, use_cache=False).loss

    return measure(model, loss_of), gradient_paths(model, loss_of), block_skip_costs(model, loss_of)


@pytest.mark.parametrize("placement", ["span", "pre", "residual"])
def test_a_rewired_llama_gives_the_records_of_our_own_model(placement):
    options = {"placement": placement, "attn_implementation": "eager"}
    ours = spannorm.SpanNormForCausalLM(spannorm.SpanNormConfig(**SIZES, **HEADS, **options))
    llama = tiny_model("llama")
    spannorm.rewire(llama, placement, init="redraw")
    (a, paths, costs), (b, other_paths, other_costs) = everything(ours), everything(llama)
    for name in ("signal_rms", "gradient_rms", "token_cosine", "effective_rank"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-3), name
    assert a.variance.keys() == b.variance.keys() and a.rho.keys() == b.rho.keys()
    for path, gains in paths.log_gain.items():
        assert gains == pytest.approx(other_paths.log_gain[path], abs=1e-3)
    assert costs == pytest.approx(other_costs, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_probed(family):
    model = tiny_model(family)
    spannorm.rewire(model, "span")
    record, paths, costs = everything(model)
    assert record.signal_rms[1:] == pytest.approx([1.0] * (len(record.signal_rms) - 1), rel=0.05)  # SpanNorm's stream
    assert all(gain[-1] == gain[-1] for gain in paths.log_gain.values())
    assert len(costs) == len(record.signal_rms) - 1
