"""The theory against real models at initialization, to the tolerances that docs/theory.md states; ours, not fitted."""

from __future__ import annotations

import math
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from facts import FACTS

from spannorm import theory
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.probes import gradient_paths

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "theory.py"))
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}


def check(name: str, depth: int, seeds: int = 5, **more) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rules that the authors of a placement discourage
        found = BENCHMARK["arm"](name, depth, seeds, **more)
    for site, worst in found["variance"].items():
        assert abs(worst["mean_relative_error"]) <= 0.05, site
        # of thousands of blocks the worst one has its own luck too
        luck = 3 * worst["standard_error"] / worst["measured"]
        assert abs(worst["relative_error"]) <= 0.05 + luck, (site, worst)
    for path, tolerance in (("skip", 0.05), ("total", 0.15)):
        assert found[path]["error"] <= tolerance, (path, found[path])
    for quantity in ("attention_share", "ffn_share", "correlation"):
        predicted, measured = found[quantity]
        assert predicted == pytest.approx(measured, abs=0.1), quantity


FOLLOWED = [name for name, fact in FACTS.items() if fact.theory is not None]
SHORT = [*FOLLOWED[: FOLLOWED.index("keel") + 1], "averaged", "hc", "attnres_block"]
"""Those that every check runs; the others' operations are among theirs."""


@pytest.mark.parametrize("name", [
    *SHORT, "pre:none", "span:none", "post:1/sqrt(L)", "span:1/sqrt(L):ffn",
    *(pytest.param(name, marks=pytest.mark.slow) for name in FOLLOWED if name not in SHORT),
])  # fmt: skip
def test_eight_blocks(name):
    check(name, 8, options=dict(FACTS[name.partition(":")[0]].theory))


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_eight_blocks_of_experts(norm_topk_prob):
    check("span", 8, **MIXTURE, norm_topk_prob=norm_topk_prob)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FOLLOWED, "pre:none", "span:none", "post:1/sqrt(L)"])
def test_thirty_two_blocks(name):
    check(name, 32, options=dict(FACTS[name.partition(":")[0]].theory))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pre:none", "post:none", "span:none", "subln"])
@pytest.mark.parametrize("more", [{}, {"shared_expert_intermediate_size": 128}, {"decoder_sparse_step": 2}])
def test_sixteen_blocks_of_experts(name, more):
    check(name, 16, **MIXTURE, **more)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pre", "post:none", "span", "span:none", "keel", "siamese"])
def test_a_hundred_and_twenty_eight_blocks(name):
    check(name, 128)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [8, 32, 128, 512, 1024])
def test_span_keeps_the_gradient_within_a_factor_two_at_every_depth(depth):
    config = SpanNormConfig(placement="span", num_hidden_layers=depth, vocab_size=1024, **BENCHMARK["SIZES"])
    model = SpanNormForCausalLM(config).eval()
    ids = torch.randint(1024, (1, 32), generator=torch.Generator().manual_seed(0))
    gains = gradient_paths(model, lambda: model(ids, labels=ids, use_cache=False).loss).log_gain
    body = theory.Body(**BENCHMARK["SIZES"], sequence_length=32)
    p = theory.predict("span", depth, body=body)
    for log_gain in (gains["total"][0], p.log_total_gain):
        assert 0.5 <= math.exp(log_gain) <= 2
