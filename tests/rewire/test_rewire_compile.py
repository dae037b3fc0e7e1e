"""torch.compile takes a rewired model. In a fresh interpreter, without the shape checks that break graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys, warnings, torch, spannorm
sys.path.insert(0, sys.argv[1])
from rewire_families import FAMILIES, tiny_model

warnings.simplefilter("ignore")
torch.set_num_threads(1)
x = torch.randint(37, (2, 9))
for family in sys.argv[4:] or FAMILIES:
    torch._dynamo.reset()
    model = tiny_model(family).eval()
    spannorm.rewire(model, sys.argv[3])
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend=sys.argv[2])):
        model.zero_grad()
        logits = run(x, use_cache=False).logits  # no labels: GPT-2's own loss logs, which is a break
        logits.square().sum().backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    print("same", family)
"""


def compiled(*arguments: str) -> list[str]:
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", CODE, here, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("same ") for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["span", "subln", "hybrid", "mhc", "gated", "attnres_block"])
def test_every_rewired_family_is_one_graph(placement):
    from rewire_families import FAMILIES

    # "eager" captures the whole graph and generates no code
    assert compiled("eager", placement) == list(FAMILIES)


@pytest.mark.slow
def test_generated_code_gives_the_same_logits_and_gradients():
    assert compiled("inductor", "span", "llama", "gpt2", "mixtral") == ["llama", "gpt2", "mixtral"]
