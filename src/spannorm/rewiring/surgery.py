"""The change of one layer: which of its parts the placement uses, which it adds, and where they go."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from spannorm.adopt import adopt
from spannorm.inner_norms import READ_BY, add_inner_norm
from spannorm.placements import Placement
from spannorm.rewiring.families import Family
from spannorm.rewiring.layers import FamilyNorm, NormedExperts, RewiredLayer
from spannorm.roles import Fused


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises, the model gets its old modules back. Values of weights are not restored."""
    before = [
        (module, type(module), {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        raise


def find(owner: nn.Module, path: str) -> Any:
    """The object at a dotted path, or None."""
    try:
        return attrgetter(path)(owner)
    except AttributeError:
        return None


def has_own(layer: nn.Module, row: Family, role: str) -> bool:
    """Whether the family normalizes this itself."""
    return role in row.own_norms and find(layer, row.own_norms[role]) is not None


def sites(layer: nn.Module, row: Family, role: str) -> Iterator[tuple[str, Fused, Any]]:
    """Where an inner norm goes: path, whose rows the matrix there writes, and the projection or experts' parameter."""
    for path, kind in row.matrices.items():
        layout, found = kind if isinstance(kind, Fused) else Fused((kind,)), find(layer, path)
        if found is not None and READ_BY.get(role, role) in layout.roles:
            yield path, layout, found


def rewire_layer(layer: Any, row: Family, block: Placement) -> None:
    """Make a layer call the placement, which by then holds all its norms."""
    layer.argument_names = list(signature(type(layer).forward).parameters)[2:]
    layer.family, layer.embedding_norm, layer.last_norm = row, None, None
    layer.placement = block
    adopt(layer, RewiredLayer)


def move_norms(layer: Any, row: Family, block: Placement, template: nn.Module) -> set[str]:
    """Fill the placement's norms by role: the layer's own, or new ones. Returns the roles of the layer's own."""
    own = {role: find(layer, path) for role, path in row.norms.items()}
    moved = {role for role in block.norms() if own.get(role) is not None}
    weight = next(layer.parameters())
    block.to(weight.device, weight.dtype)  # before the norms come in: the family's may be fp32 in a model of bf16
    for role in block.norms():
        norm = own[role] if role in moved else fresh_norm(template, row)
        adopt(norm, FamilyNorm)
        block.add_module(role, norm)
    for path in row.norms.values():
        owner, _, name = path.rpartition(".")
        delattr(layer.get_submodule(owner), name)
    return moved


def eps_of(norm: nn.Module) -> float:
    """The norm's epsilon, by its names in Transformers. OLMo's norm keeps none: it has PyTorch's LayerNorm's, 1e-5."""
    found = (getattr(norm, name, None) for name in ("variance_epsilon", "eps"))
    return next((eps for eps in found if isinstance(eps, float)), 1e-5)


def fresh_norm(template: nn.Module, row: Family, size: int | None = None) -> nn.Module:
    """A new norm of the family's own kind with gain 1, over the stream or over `size` channels."""
    norm: Any = copy.deepcopy(template)
    for name, parameter in template.named_parameters():
        value = row.unit_gain if name == "weight" else 0.0
        setattr(norm, name, nn.Parameter(torch.full_like(parameter[:1].expand(size or len(parameter)), value)))
    if size and hasattr(norm, "normalized_shape"):
        norm.normalized_shape = (size,)
    return norm


def place_inner_norm(layer: nn.Module, row: Family, config: Any, template: nn.Module, role: str, over: str) -> None:
    """Put one of a placement's inner norms into the sublayer, over each head (`over="head"`) or the whole width."""
    for path, layout, found in list(sites(layer, row, role)):
        owner, _, name = path.rpartition(".")
        sublayer: Any = layer.get_submodule(owner)
        layout = layout.of(config)
        if isinstance(found, nn.Parameter):
            sublayer.input_norm = fresh_norm(template, row, layout.matrix(found).shape[-1])
            adopt(sublayer, NormedExperts)
            continue
        heads = config.num_attention_heads
        if role in ("k", "v"):
            heads = getattr(config, "num_key_value_heads", None) or heads
        add_inner_norm(sublayer, name, layout, role, over, heads, lambda size: fresh_norm(template, row, size))
