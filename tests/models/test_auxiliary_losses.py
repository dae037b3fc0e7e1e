"""The auxiliary losses of a mixture: what they add to the loss, and that a split of the batch does not change them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spannorm.models import SpanNormForCausalLM

EXPERTS = {"num_experts": 6, "moe_intermediate_size": 12, "router_aux_loss_coef": 3.0, "router_z_loss_coef": 0.5}


@pytest.fixture
def model(tiny_config) -> SpanNormForCausalLM:
    model = SpanNormForCausalLM(tiny_config(**EXPERTS)).double()
    model.set_experts_implementation("eager")  # PyTorch's grouped_mm has no float64
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """32 sequences of unlike lengths: ids, attention mask, labels."""
    ids, mask = torch.randint(1, 37, (32, 9)), torch.ones(32, 9, dtype=torch.long)
    for s in range(32):
        mask[s, 9 - s % 4 :] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


def gradients(model: SpanNormForCausalLM, parts: int, processes: int = 1) -> dict[str, Tensor]:
    """Of one optimizer step, as the Trainer makes it: a sum over a process's parts, a mean over the processes."""
    ids, mask, labels = batch()
    items = (labels[:, 1:] != -100).sum()
    model.train().zero_grad()
    for x, m, y in zip(ids.chunk(parts), mask.chunk(parts), labels.chunk(parts), strict=True):
        loss = model(x, attention_mask=m, labels=y, num_items_in_batch=items).loss * processes
        (loss / processes).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(((a[n] - b[n]).norm() / b[n].norm()).item() for n in a if "mlp.gate" in n)


@pytest.mark.parametrize(("parts", "processes"), [(4, 1), (2, 2), (32, 1)])
def test_however_a_batch_is_split_the_gradient_is_the_same(model, parts, processes):
    torch.manual_seed(1)
    whole = gradients(model, 1)
    torch.manual_seed(1)
    split = gradients(model, parts, processes)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-11, atol=1e-12)


def test_balanced_over_the_batch_the_gradient_depends_on_the_split_as_documented(model):
    model.config.router_aux_scope = "batch"
    torch.manual_seed(1)
    whole = gradients(model, 1)
    torch.manual_seed(1)
    assert worst(gradients(model, 4), whole) > 0.01


def test_the_loss_is_the_cross_entropy_and_in_training_the_auxiliary_losses_besides(model):
    ids, mask, labels = batch()
    plain = model.eval()(ids, attention_mask=mask, labels=labels)
    assert plain.router_logits is None and plain.aux_loss is None and plain.z_loss is None
    asked = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    assert torch.equal(asked.loss, plain.loss)
    train = model.train()(ids, attention_mask=mask, labels=labels)
    assert torch.equal(train.aux_loss, asked.aux_loss) and torch.equal(train.z_loss, asked.z_loss)
    torch.testing.assert_close(train.loss - plain.loss, 3.0 * train.aux_loss + 0.5 * train.z_loss, rtol=1e-6, atol=0.0)
    # each of three layers adds its own, 1 where its load is even
    assert 3.0 <= train.aux_loss < 6.0
    assert model(ids).aux_loss is None, "no labels, no losses"


def test_the_scope_of_a_single_sequence_makes_no_difference(model):
    ids = torch.randint(1, 37, (1, 9))
    losses = []
    for scope in ("sequence", "batch"):
        model.config.router_aux_scope = scope
        losses.append(model.train()(ids, labels=ids).aux_loss)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0.0)
