"""What the theory says of placements, rules and depths: the part of the depth check that builds no model.

It needs neither Transformers nor text, and is quick to start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from spannorm import theory
from spannorm.errors import InputError
from spannorm.placements import Stack
from spannorm.train.recipe import Recipe, TrainRecipe, load_recipe, overridden

DEFAULT = Recipe(
    name="depth-check",
    model={"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4},
    train=TrainRecipe(sequence_length=64, batch_size=4, learning_rate=3e-3, warmup_steps=5, schedule="wsd"),
)
"""Small enough for 128 blocks on a laptop; a wider model lies closer to the theory."""

_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads")
_CALLED = {"tied": "tie_word_embeddings", "eps": "rms_norm_eps"}
"""Fields of `Body` that the configuration calls otherwise."""


def sizes(recipe: Path | None, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that sizes the models: a file's, or `DEFAULT`, with `key=value` overrides laid over it."""
    return load_recipe(recipe, overrides) if recipe else overridden(DEFAULT, overrides)


@dataclass(frozen=True)
class Quantity:
    """One quantity of one stack at one step: what the theory says and what models do (mean over seeds)."""

    placement: str
    depth_rule: str
    depth: int
    step: int
    quantity: str
    predicted: float | None
    measured: float | None

    @property
    def relative_error(self) -> float | None:
        if self.predicted is None or self.measured is None or not self.measured:
            return None
        return self.predicted / self.measured - 1

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "relative_error": self.relative_error}


@dataclass(frozen=True)
class Case:
    """One placement under one rule at one depth: its recipe, its stack, and the model of its sublayers."""

    recipe: Recipe
    stack: Stack
    body: theory.Body

    @property
    def key(self) -> tuple[str, str, int]:
        return self.stack.placement, str(self.stack.depth_rule), self.stack.num_layers

    def predicted(self, repeat: float = 0.0, num_layers: int | None = None) -> theory.Prediction:
        """Its theory, at another depth where one is given.

        Args:
            repeat: the chance that two positions of a sequence hold the same token; see
                `spannorm.lab.depth.check.repeats`.

        Raises:
            NoRule: the theory cannot follow the placement.
        """
        placement, rule, depth = self.key
        body = replace(self.body, repeat=repeat)
        return theory.predict(placement, num_layers or depth, depth_rule=rule, body=body, **self.stack.options)


def cases(recipe: Recipe, placements: Sequence[str], depth_rules: Sequence[str], depths: Sequence[int]) -> list[Case]:
    """Every combination, checked before any time is spent; `default` stands for the placement's own rule.

    Raises:
        InputError: an unknown placement, rule or model key; no depth.
    """
    if not (placements and depth_rules and depths):
        raise InputError("name at least one placement, one depth rule and one depth.")
    cases: dict[tuple[str, str, int], Case] = {}
    for placement in placements:
        for rule in depth_rules:
            for depth in depths:
                named = None if rule == "default" else rule
                chosen = {"placement": placement, "depth_rule": named, "num_hidden_layers": depth}
                sized = replace(recipe, model={**recipe.model, **chosen})
                case = Case(
                    sized, Stack(placement, depth, named, recipe.model.get("placement_options") or {}), body_of(sized)
                )
                cases.setdefault(case.key, case)
    return list(cases.values())


def body_of(recipe: Recipe) -> theory.Body:
    """What the theory needs to know of a recipe's model.

    Where the recipe says more than the three sizes, the model's configuration is made and asked, which checks it too.
    """
    length = recipe.train.sequence_length
    if set(recipe.model) - {"placement", "depth_rule", "num_hidden_layers"} == set(_SIZES):
        return theory.Body(**{name: recipe.model[name] for name in _SIZES}, sequence_length=length)
    from spannorm.train.run import model_config  # which loads Transformers

    config = model_config(recipe)
    names = {f.name: _CALLED.get(f.name, f.name) for f in fields(theory.Body)}
    known = {name: getattr(config, called) for name, called in names.items() if hasattr(config, called)}
    return theory.Body(**known, sequence_length=length)


def predictions(p: theory.Prediction) -> dict[str, float]:
    """A prediction by the quantities that are measured too."""
    gains = {"skip_gain": p.log_skip_gain, "total_gain": p.log_total_gain}
    return {
        **{
            f"variance:{site}": float(np.nanmean(v))
            for site, v in p.variance.items()
            if site != "output" or not math.isnan(sum(v))  # of several streams there is one at the end alone
        },
        "variance": p.variance["output"][-1],
        **{name: math.exp(min(value, 700.0)) for name, value in gains.items()},
        "attention_share": p.total_attention_share,
        "ffn_share": p.total_ffn_share,
        "token_cosine": p.correlation[-1],
    }


def theory_of(chosen: Sequence[Case], on_case: Callable[[Case], None] = lambda _: None) -> dict[str, Any]:
    """The theory's rows for every case, nothing measured: what `spannorm theory --json` writes.

    Args:
        on_case: called before each case.
    """
    rows = []
    for case in chosen:
        on_case(case)
        predicted = predictions(case.predicted())
        rows += [Quantity(*case.key, 0, name, number(value), None) for name, value in predicted.items()]
    return {"repeat": 0.0, "rows": [row.to_dict() for row in rows], "profiles": []}


def number(value: float | None) -> float | None:
    """A number that JSON can hold, or None."""
    return value if value is not None and math.isfinite(value) else None
