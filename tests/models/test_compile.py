"""torch.compile takes the model in one graph. In a fresh interpreter, without the shape checks that break graphs."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys, torch
from spannorm import PLACEMENTS
from spannorm.models import SpanNormConfig, SpanNormForCausalLM

torch.set_num_threads(1)
x = torch.randint(37, (2, 9))
for placement in PLACEMENTS:
    for rule in sys.argv[2:]:
        torch._dynamo.reset()
        model = SpanNormForCausalLM(SpanNormConfig(
            vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, placement=placement, depth_rule=rule, qk_norm=True, tie_word_embeddings=True))
        results = []
        for run in (model, torch.compile(model, fullgraph=True, backend=sys.argv[1])):
            model.zero_grad()
            out = run(x, labels=x)
            out.loss.backward()
            results.append([out.logits, *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        print("same", placement, rule)
"""


def compiled(backend: str, *rules: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", CODE, backend, *rules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def same(*rules: str) -> list[str]:
    from spannorm.placements import PLACEMENTS

    return [f"same {placement} {rule}" for placement in PLACEMENTS for rule in rules]


def test_the_model_is_one_graph_with_the_same_logits_and_gradients():
    # "eager" captures the whole graph and generates no code: seconds instead of minutes
    assert compiled("eager", "1/sqrt(L):forward") == same("1/sqrt(L):forward")


@pytest.mark.slow
def test_generated_code_gives_the_same_logits_and_gradients():
    rules = ("1/sqrt(L):forward", "layerscale")
    assert compiled("inductor", *rules) == same(*rules)
