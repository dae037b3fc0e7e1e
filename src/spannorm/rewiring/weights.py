"""The weights of a rewired model: what each one does, and the depth rule's init on them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from spannorm.init import init_plan, init_weights_
from spannorm.rewiring.families import Family
from spannorm.roles import Fused, known_parameters
from spannorm.scaling import Role


def parameter_roles(model: Any, family: Family) -> dict[str, Role | Fused]:
    """What `spannorm.init` has to know of the model besides Llama's names."""
    roles: dict[str, Role | Fused] = {}
    for row in (*family.others, family):
        roles |= row.matrices
    if family.found:  # of many experts the audit saw a few
        by_pattern = {re.sub(r"\.\d+(?=\.|$)", ".*", tail): what for tail, what in roles.items()}
        for name, _ in model.base_model.get_submodule(family.layers).named_parameters():
            path = name.partition(".")[2].removesuffix(".weight")
            what = by_pattern.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
            roles |= {} if what is None else {path: what}
    roles |= dict.fromkeys(family.embedding, "embedding")
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        roles[next(name for name, module in model.named_modules() if module is head)] = "head"
    return roles


@torch.no_grad()
def rescale_(model: Any) -> list[str]:
    """Multiply the matrices and output norms' gains that the depth rule names by its factors. Returns their names."""
    touched = []
    for k in list(known_parameters(model)):  # all are known before one is changed
        parts = k.layout.split(k.layout.matrix(k.parameter)) if len(k.layout.roles) > 1 else {k.role: k.parameter}
        scaled = {role: part for role, part in parts.items() if role in k.rule.init}
        for role, part in scaled.items():
            part.mul_(k.rule.init[role])
        unit = getattr(model.get_submodule(k.name.rpartition(".")[0]), "unit_gain", 1.0)
        if k.role == "norm" and k.mean != unit:  # a weight w has the gain w + 1 − unit
            k.parameter.add_(1 - unit).mul_(k.mean + 1 - unit).add_(unit - 1)
            scaled["norm"] = k.parameter
        touched += [k.name] if scaled else []
    return touched


@torch.no_grad()
def redraw_(model: Any, seed: int = 0) -> list[str]:
    """Draw every parameter of a rewired model by our base init `fan_in` and the depth rule. Returns their names.

    For a model made on meta device, call it after `to_empty`: buffers get their values too. The seed of each draw is
    (seed, name), so that models which differ only in placement have the same body.
    """
    model.tie_weights()
    plan = init_plan(model)
    for name, module in model.named_modules():
        own = any(f"{name}.{n}".lstrip(".") not in plan for n, _ in module.named_parameters(recurse=False))
        if own or any(True for _ in module.buffers(recurse=False)):
            model._init_weights(module)
    init_weights_(model, plan, seed=seed, prefix=f"{model.base_model_prefix}.")
    return list(plan)


def set_unit_gain(model: nn.Module, family: Family, classes: Collection[str]) -> None:
    """Record in each norm the weight that means gain 1 (`unit_gain`).

    Args:
        classes: names of the classes of the norms in a layer's equation; norms of other classes may count otherwise.
    """
    for module in model.modules():
        name = type(module).__name__
        if name in classes if family.found else name.endswith("Norm"):
            module.unit_gain = family.unit_gain  # type: ignore[assignment]


def is_meta(model: nn.Module) -> bool:
    """Whether its weights have no values yet."""
    return next(model.parameters()).is_meta


def tied(model: Any) -> bool:
    """Whether embedding and head are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
