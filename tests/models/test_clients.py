"""What other libraries do to a model, each against the right value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch.nn import functional as F

from spannorm.models import SpanNormForCausalLM
from spannorm.placements import PLACEMENTS


def ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(37, (batch, length))


@pytest.mark.parametrize("rewired", [False, True])
def test_the_trainer_smooths_shifted_labels(tiny_config: Any, tmp_path: Path, rewired: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    import spannorm

    model: Any = SpanNormForCausalLM(tiny_config())
    if rewired:
        sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
        spannorm.rewire(model, "span")
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    trainer = Trainer(model, arguments)
    x = ids()
    loss = trainer.compute_loss(model, {"input_ids": x, "labels": x})
    log_p = model(x).logits[:, :-1].log_softmax(-1)
    nll = F.nll_loss(log_p.flatten(0, 1), x[:, 1:].flatten())
    expected = 0.9 * nll - 0.1 * log_p.mean(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weights_on_cpu_or_disk_are_brought_when_they_are_needed(
    tiny_config: Any, tmp_path: Path, placement: str, experts: bool
) -> None:
    sizes = {"num_experts": 4, "moe_intermediate_size": 12} if experts else {}
    model, x = SpanNormForCausalLM(tiny_config(placement=placement, **sizes)).eval(), ids()
    with torch.no_grad():
        before = model(x).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(model(x).logits, before)
        if placement in ("span", "siamese"):
            model = SpanNormForCausalLM(tiny_config(placement=placement, **sizes)).eval()
            disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
            assert torch.equal(model(x).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_a_norms_gradients_are_summed_in_fp32_in_half_precision(norm: str, dtype: torch.dtype) -> None:
    from spannorm.norms import build_norm

    layer = build_norm(norm, 16).to(dtype)
    x = torch.randn(8169, 16).to(dtype)
    layer(x[None]).float().sum().backward()
    exact = build_norm(norm, 16).double()
    exact(x[None].double()).sum().backward()
    for name, parameter in layer.named_parameters():
        wanted = exact.get_parameter(name).grad
        # each row is rounded once; 8169 of them add up to their number, or to noise around 0
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=2**-7, atol=2**-8 * 8169**0.5 * 4)
