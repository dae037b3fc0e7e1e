"""The weights of a rewired model: what each one does, and the depth rule's init on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spannorm.init import role_of, standard_normal
from spannorm.rewiring.families import Family, Fused, family_of
from spannorm.scaling import DepthRule, Role, base_std, depth_rule

Parts = dict[Role, Tensor]


def named_parts(model: Any) -> Iterator[tuple[str, Parts, DepthRule]]:
    """Each parameter once: its name, its roles with the part of each (matrices as (…, out, in)), its layer's rule."""
    family, base = family_of(model.config.model_type), model.base_model
    prefix = f"{model.base_model_prefix}." if base is not model else ""
    layers = f"{prefix}{family.layers}."
    tables = {f"{prefix}{path}.weight" for path in family.embedding}
    head = getattr(model.get_output_embeddings(), "weight", None)
    outside = depth_rule("none", 1)
    for name, parameter in model.named_parameters():
        if name in tables:
            yield name, {"embedding": parameter}, outside
        elif head is not None and parameter is head:
            yield name, {"head": parameter}, outside
        elif name.startswith(layers):
            index, _, rest = name.removeprefix(layers).partition(".")
            rule = base.get_submodule(family.layers)[int(index)].placement.rule
            yield name, _parts(rest, parameter, family, model.config), rule
        else:
            yield name, {_vector_role(name, parameter) or role_of(name): parameter}, outside


def _parts(path: str, parameter: Tensor, family: Family, config: Any) -> Parts:
    path = path.removesuffix(".weight")
    kind = family.matrices.get(path)
    if kind is None:
        return {_vector_role(path, parameter) or role_of(path): parameter}
    matrix = parameter.transpose(-2, -1) if path.endswith(family.transposed) else parameter
    return kind.split(matrix, config, -2) if isinstance(kind, Fused) else {kind: matrix}


def _vector_role(name: str, parameter: Tensor) -> Role | None:
    """Gains, and offsets of all kinds: biases, one per expert too, and GPT-OSS's attention sinks."""
    leaf = name.rpartition(".")[2]
    if leaf in ("attn_scale", "ffn_scale"):
        return "gain"
    if leaf.endswith(("bias", "sinks")):
        return "bias"
    return "norm" if parameter.ndim == 1 else None


def primary_roles(model: Any) -> dict[str, Role]:
    """What `spannorm.init` reads. It groups by what a depth rule slows, the output matrices, and none is fused."""
    return {name: next(iter(parts)) for name, parts, _ in named_parts(model)}


@torch.no_grad()
def rescale_(model: Any) -> list[str]:
    """Multiply the matrices that the depth rule names by its factors; returns their names."""
    touched = []
    for name, parts, rule in named_parts(model):
        for role, part in parts.items():
            if rule.init.get(role, 1.0) != 1.0:
                part.mul_(rule.init[role])
                touched.append(name)
    return list(dict.fromkeys(touched))


@torch.no_grad()
def redraw_(model: Any, seed: int = 0) -> list[str]:
    """Draw every parameter of a rewired model by our base init `fan_in` and the depth rule; returns their names.

    For a model made on meta device, after `to_empty`: buffers get their values too. Each draw is seeded by (seed,
    name, role), so that models which differ in placement share a body.
    """
    model.tie_weights()
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            model._init_weights(module)
    unit_gain = family_of(model.config.model_type).unit_gain
    width, shared = model.config.hidden_size, tied(model)
    for name, parts, rule in named_parts(model):
        for role, part in parts.items():
            if role in ("norm", "bias", "gain"):
                gain = 1.0 if name.endswith("head_scale") else unit_gain
                part.fill_({"norm": gain, "bias": 0.0, "gain": rule.gain}[role])
            else:
                sigma = base_std(role, part.shape[-1], part.shape[-2], width=width, tied=shared)
                key = name.removeprefix(f"{model.base_model_prefix}.") + (f":{role}" if len(parts) > 1 else "")
                part.copy_(rule.init.get(role, 1.0) * sigma * standard_normal(part.shape, seed, key))
    return [name for name, _ in model.named_parameters()]


def tied(model: Any) -> bool:
    """Whether embedding and head are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
