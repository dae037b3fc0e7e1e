"""What a run will need: held to models that are built and to a run that is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from spannorm.errors import InputError
from spannorm.models import SpanNormForCausalLM
from spannorm.placements import PLACEMENTS
from spannorm.train import needs
from spannorm.train.recipe import Recipe, recipe_from_dict
from spannorm.train.run import model_config

EXPERTS = {"num_experts": 4, "moe_intermediate_size": 10, "shared_expert_intermediate_size": 12}
KINDS: list[dict[str, Any]] = [
    {},
    {"norm": "layernorm", "qk_norm": True, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    {"tie_word_embeddings": True, "num_key_value_heads": 4, **EXPERTS, "decoder_sparse_step": 2},
    {"norm": "layernorm", **EXPERTS},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_parameters_are_those_of_the_model(tiny_config: Any, placement: str, kind: int) -> None:
    config = tiny_config(placement=placement, **KINDS[kind])
    model = SpanNormForCausalLM(config)
    assert needs.parameters(config, config.vocab_size) == sum(p.numel() for p in model.parameters())


def test_a_run_that_cannot_fit_is_refused_before_anything_is_allocated() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    large = recipe_from_dict({"model": {**sizes, "vocab_size": 32000}})
    assert needs.needs(large, model_config(large)).parameters // 10**7 == 673  # Llama-7B has 6.74 billion
    for kind in ({"num_hidden_layers": 2000}, {"hidden_size": 1 << 20, "num_hidden_layers": 200}):
        wide = replace(large, model={**large.model, **kind})
        with pytest.raises(InputError, match=r"this run needs .* parameters"):
            needs.check_fits(wide, model_config(wide))
    small = recipe_from_dict({"model": {k: 8 if k != "num_hidden_layers" else 2 for k in sizes} | {"head_dim": 4}})
    for t in ({"batch_size": 1 << 20, "sequence_length": 1 << 20}, {"accumulation": 1 << 20, "batch_size": 1 << 20}):
        many = replace(small, train=replace(small.train, **t))
        with pytest.raises(InputError, match="this run needs"):
            needs.check_fits(many, model_config(many))


TRAINS = """
import sys
from pathlib import Path
from spannorm.train.recipe import recipe_from_dict
from spannorm.train.run import train
import json, resource
recipe = recipe_from_dict(json.loads(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train(recipe, Path(sys.argv[2]))
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_run_takes_less_memory_than_is_said(recipe: Recipe, tmp_path: Any, checkpointing: bool) -> None:

    model = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4}
    raw = recipe.to_dict() | {"model": model}
    sizes = {"batch_size": 8, "sequence_length": 256, "activation_checkpointing": checkpointing}
    raw["train"] |= {"steps": 2, "warmup_steps": 0, "evaluation_sequences": 1, **sizes}
    one = recipe_from_dict(raw)
    said = needs.needs(one, model_config(one)).memory
    done = subprocess.run(
        [sys.executable, "-c", TRAINS, json.dumps(one.to_dict()), str(tmp_path / "run")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, after = map(int, done.stdout.split()[-2:])
    taken = (after - before) * 1024
    assert said < taken < 8 * said, (said, taken)
