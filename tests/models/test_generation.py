"""Generation: the cache, padding and the greedy search say what the uncached model says."""

from __future__ import annotations

import pytest
import torch
from arms import DEFAULT_RULE, FULL
from transformers import DynamicCache

from spannorm.models import SpanNormForCausalLM
from spannorm.models.layer import CACHE

EXACT = {"rtol": 1e-10, "atol": 1e-10}


RULES = {p: ("1/sqrt(L)", "1/sqrt(L):forward", "layerscale") if p in FULL else (r,) for p, r in DEFAULT_RULE.items()}


@pytest.fixture(params=[(placement, rule) for placement, rules in RULES.items() for rule in rules])
def model(tiny_config, request):
    placement, rule = request.param
    config = tiny_config(placement=placement, depth_rule=rule, qk_norm=True, tie_word_embeddings=True, pad_token_id=0)
    return SpanNormForCausalLM(config).double().eval()


def prompt(length: int = 7) -> torch.Tensor:
    return torch.randint(1, 37, (2, length))


@torch.no_grad()
def test_logits_with_a_cache_are_the_logits_without(model):
    x = prompt(10)
    full = model(x, use_cache=False)
    assert getattr(full, CACHE) is None
    cache = DynamicCache(config=model.config)
    steps = [model(x[:, :4], past_key_values=cache, use_cache=True).logits]
    steps += [model(x[:, t : t + 1], cache=cache, use_cache=True).logits for t in range(4, 10)]
    assert cache.get_seq_length() == 10
    torch.testing.assert_close(torch.cat(steps, dim=1), full.logits, **EXACT)


@torch.no_grad()
def test_greedy_generation_with_and_without_a_cache_gives_the_same_tokens(model):
    x = prompt()
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(x)}
    cached = model.generate(x, use_cache=True, **options)
    assert cached.shape == (2, 19)
    assert torch.equal(cached, model.generate(x, use_cache=False, **options))
    # and both are what the definition says: append the likeliest token, again and again
    by_hand = x
    for _ in range(12):
        by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, by_hand)


@torch.no_grad()
def test_a_left_padded_prompt_continues_as_it_would_alone(model):
    long, short = prompt(7)[:1], prompt(4)[:1]
    batch = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)])
    mask = (batch != 0).long()
    options = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **options)[:, 7:]
    for row, alone in enumerate((long, short)):
        single = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(together[row], single[0, alone.shape[1] :])
