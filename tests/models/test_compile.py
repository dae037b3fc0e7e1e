"""torch.compile takes the model in one graph. In a fresh interpreter, without the shape checks that break graphs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from spannorm.placements import PLACEMENTS
from spannorm.train.data import TokenData
from spannorm.train.recipe import Recipe

CODE = """
import sys, torch
from spannorm.models import SpanNormConfig, SpanNormForCausalLM

torch.set_num_threads(1)
x = torch.randint(37, (2, 9))
for placement in sys.argv[2].split(","):
    for rule in sys.argv[3:]:
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


def compiled(backend: str, *rules: str, placements: Iterable[str] = PLACEMENTS) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, backend, ",".join(placements), *rules], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def same(*rules: str) -> list[str]:
    return [f"same {placement} {rule}" for placement in PLACEMENTS for rule in rules]


FORMS = ("span", "pre", "hybrid", "normformer", "siamese", "channel", "mhc", "gated", "attnres_block", "averaged")
"""One of each form of code; all placements are among the slow tests."""


@pytest.mark.parametrize(
    "placements", [FORMS, pytest.param(tuple(PLACEMENTS), marks=pytest.mark.slow)], ids=["forms", "all"]
)
def test_the_model_is_one_graph_with_the_same_logits_and_gradients(placements):
    # "eager" captures the whole graph and generates no code: seconds instead of minutes
    rule = "1/sqrt(L):forward"
    assert compiled("eager", rule, placements=placements) == [f"same {placement} {rule}" for placement in placements]


@pytest.mark.slow
def test_generated_code_gives_the_same_logits_and_gradients():
    rules = ("1/sqrt(L):forward", "layerscale")
    assert compiled("inductor", *rules) == same(*rules)


RUN = """
import sys, torch
from pathlib import Path
from spannorm.train.recipe import load_recipe
from spannorm.train.run import train

for placement in sys.argv[3:]:
    torch._dynamo.utils.counters.clear()
    torch._dynamo.reset()
    changes = ["train.compile=true", "train.accumulation=2", f"model.placement={placement}"]
    recipe = load_recipe(Path(sys.argv[1]), changes)
    train(recipe, Path(sys.argv[1]).parent / placement, data=Path(sys.argv[2]))
    counted = torch._dynamo.utils.counters
    print(placement, counted["stats"]["unique_graphs"], counted["graph_break"])
"""


@pytest.mark.slow
def test_a_whole_run_is_compiled_once(recipe: Recipe, tokens: TokenData, tmp_path: Path) -> None:
    """Forty steps of two passes, probes, checkpoints and evaluation: one graph, with no break, and never again."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in recipe.to_dict().items() if k != "compare"}))
    command = [sys.executable, "-c", RUN, path, tokens.directory, "span", "siamese"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if "Counter" in line]
    assert said == ["span 1 Counter()", "siamese 1 Counter()"], done.stdout + done.stderr
