"""The loss taken a chunk of tokens at a time is the loss."""

import pytest
import torch

from spannorm.models import SpanNormForCausalLM


def case(tiny_config, **options):
    model = SpanNormForCausalLM(tiny_config(**options)).double().train()
    ids = torch.randint(0, model.config.vocab_size, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(33).view(3, 11) % 5 == 0, -100)
    return model, ids, labels


def run(model, **inputs):
    model.zero_grad()
    out = model(use_cache=False, **inputs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 4, 33, 1000])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("items", [None, 50])
def test_loss_and_gradients_are_equal_however_it_is_cut(tiny_config, chunk, tied, items):
    model, ids, labels = case(tiny_config, tie_word_embeddings=tied)
    more = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    whole, gradients = run(model, input_ids=ids, labels=labels, **more)
    cut, others = run(model, input_ids=ids, labels=labels, loss_chunk=chunk, **more)
    assert cut.logits is None and whole.logits is not None
    torch.testing.assert_close(cut.loss, whole.loss, rtol=1e-6, atol=0)  # the loss is taken in fp32
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-8)


def test_a_mixtures_losses_come_on_top_alike(tiny_config):
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "experts_implementation": "eager",
    }
    model, ids, labels = case(tiny_config, **experts)
    whole, cut = (run(model, input_ids=ids, labels=labels, loss_chunk=chunk)[0] for chunk in (0, 5))
    torch.testing.assert_close(cut.loss, whole.loss, rtol=1e-6, atol=0)
    assert cut.aux_loss == whole.aux_loss


def test_no_more_logits_than_a_chunks_are_ever_held(tiny_config):
    model, ids, labels = case(tiny_config)
    sizes = []
    model.lm_head.register_forward_hook(lambda _, __, output: sizes.append(output.shape))
    run(model, input_ids=ids, labels=labels, loss_chunk=8)
    assert max(shape[0] for shape in sizes) == 8 and len(sizes) == 2 * 5  # once forward, once more in backward


def test_without_labels_it_is_without_effect(tiny_config):
    model, ids, _ = case(tiny_config)
    assert torch.equal(model(ids, loss_chunk=4).logits, model(ids).logits)
