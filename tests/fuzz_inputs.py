"""Values that a recipe, a configuration or a command line should not hold, and what may become of them."""

from __future__ import annotations

import math
import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import date
from typing import Any

import torch

from spannorm.errors import InputError
from spannorm.lab.jobs.plan import Plan
from spannorm.model_keys import MODEL_KEYS
from spannorm.models import SpanNormForCausalLM
from spannorm.placements import PLACEMENTS
from spannorm.scaling import BASE_INITS, depth_rule_names
from spannorm.train.needs import check_fits
from spannorm.train.recipe import DataRecipe, ProtocolRecipe, Recipe, TrainRecipe, recipe_from_dict
from spannorm.train.run import model_config

NASTY: list[Any] = [
    *(None, True, False, "", " ", "no", "abc", "..", "None", "0", "1e3", "6e-3", "nan"),
    *("\x00", "a\nb", "ü" * 300, "x" * 5000),
    *(0, 1, -1, 2, 3, 7, 2**31, 2**32, 2**63 - 1, 10**9, 10**30, -(10**30), 10**400),
    *(0.0, 0.5, 1.0, 2.0, -0.5, 1e-320, 1e308, math.inf, -math.inf, math.nan),
    *([], [1], ["a"], [[]], {}, {"a": 1}, {"a": {"b": [None]}}, {1: 2}, [None] * 3, date(2020, 1, 2), b"abc"),
    *("swiglu", "gelu", "fp32", "layernorm", "sequence", "stdlib", "bpe", "ramp", "muon", "fsdp", "\ud800"),
]  # fmt: skip

SECTIONS: dict[str, list[str]] = {
    "model": list(MODEL_KEYS),
    "data": [f.name for f in fields(DataRecipe)],
    "train": [f.name for f in fields(TrainRecipe)],
    "compare": ["arms", "grid", "protocol"],
    "compare.protocol": [f.name for f in fields(ProtocolRecipe)],
    "": [f.name for f in fields(Recipe)],
}
KEYS = [f"{section}.{key}".strip(".") for section, keys in SECTIONS.items() for key in keys]
WORDS = [*PLACEMENTS, *depth_rule_names(), *BASE_INITS, "cosine", "wsd", "skip", "bf16", "embedding", "rope_theta"]

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def small() -> dict[str, Any]:
    """A recipe that works, and is trained in a moment."""
    return {
        "name": "small",
        "model": dict(SMALL),
        "data": {"corpus": "none"},
        "train": {"steps": 3, "warmup_steps": 0, "sequence_length": 8, "batch_size": 2},
        "compare": {"arms": [{"model.placement": "pre"}, {"model.placement": "span"}], "grid": {"train.seed": [0, 1]}},
    }


def put(raw: Any, key: str, value: Any) -> None:
    """Set a dotted key, making sections on the way."""
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(raw.get(parent), dict):
            raw[parent] = {}
        raw = raw[parent]
    raw[last] = value


@contextmanager
def bounded(seconds: float = 60.0, gib: float = 3.0) -> Iterator[None]:
    """A case that takes longer, or more memory besides what there is, fails."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"a case took more than {seconds} s")

    with open("/proc/self/statm", encoding="ascii") as file:
        there = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (there + int(gib * 2**30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_one_message(error: BaseException) -> None:
    text = str(error)
    assert text.strip() and len(text) < 4000, text[:200]
    text.encode()


def works_or_is_refused(raw: Any) -> str:
    """Read, plan, and where it is small build and train it for a step: what is accepted must work."""
    with warnings.catch_warnings(), bounded():
        warnings.simplefilter("ignore")
        try:
            recipe = recipe_from_dict(raw)
            config = model_config(recipe)
            needed = check_fits(recipe, config)
            if recipe.compare.arms:
                plan = Plan(recipe)
                assert plan.jobs({})
        except InputError as error:
            is_one_message(error)
            return "refused"
        if needed.parameters > 200_000 or needed.memory > 2**27 or config.num_hidden_layers > 8:
            return "too large to build here"
        model = SpanNormForCausalLM(config)
        ids = torch.randint(config.vocab_size, (1, 4))
        model(ids, labels=ids).loss.backward()
        return "works"
