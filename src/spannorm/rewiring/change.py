"""The change itself: one model, one row that fits it, one placement."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spannorm.adopt import adopt
from spannorm.errors import InputError, unknown
from spannorm.placements import Placement, Stack
from spannorm.rewiring.configuration import RewiredConfig
from spannorm.rewiring.families import Family
from spannorm.rewiring.layers import RewiredBody, RewiredLayer
from spannorm.rewiring.report import Init, Rewiring, notes_of
from spannorm.rewiring.surgery import (
    eps_of,
    find,
    fresh_norm,
    has_own,
    move_norms,
    place_inner_norm,
    rewire_layer,
    sites,
    undone_on_error,
)
from spannorm.rewiring.weights import is_meta, parameter_roles, redraw_, rescale_, set_unit_gain
from spannorm.roles import known_parameters


def change(
    model: PreTrainedModel,
    row: Family,
    placement: str,
    depth_rule: str | None = None,
    init: Init | None = None,
    seed: int = 0,
    options: Any = None,
) -> Rewiring:
    """Put a placement into a model of this family; the arguments are `spannorm.rewire`'s.

    Raises:
        InputError: as there, before anything is changed.
    """
    options = dict(options or {})
    check_first(model, init)
    base: Any = model.base_model
    layers: Any = find(base, row.layers)
    loaded = _loaded(model)
    rows = _rows(model, row, layers)
    init = init if init is not None else False if is_meta(model) else "rescale"
    stack = Stack(placement, len(layers), depth_rule, options, eps=eps_of(_norms(layers, rows)[0]))
    text: Any = model.config.get_text_config(decoder=True)
    blocks = stack.blocks(text.hidden_size)
    _check_sites(model, rows, layers, stack, blocks)

    if init and not row.found:  # what an audit has no role for is left to its module
        _check_roles(model, row)
    with undone_on_error(model):
        return _changed(model, row, rows, stack, blocks, init, loaded, seed)


def _changed(
    model: Any, row: Family, rows: list[Family], stack: Stack, blocks: list[Placement], init: Init, loaded: bool,
    seed: int,
) -> Rewiring:  # fmt: skip
    """Do it, once all is checked; the weights come last."""
    layers: Any = find(model.base_model, row.layers)
    norms = _norms(layers, rows)
    template, classes = copy.deepcopy(norms[0]), {type(norm).__name__ for norm in norms}
    own_inner = [role for role in stack.inner_norms if has_own(layers[-1], rows[-1], role)]
    text = model.config.get_text_config(decoder=True)
    kept, added = _rewire_layers(layers, rows, blocks, text, template, init)
    added |= _rewire_ends(model.base_model, row, layers, stack, template)
    own_norms = dict.fromkeys(path for own in rows for path in own.norms.values())
    dropped = tuple(path for path in own_norms if path not in kept.values())
    changed = bool(added or dropped) or stack.final_norm != bool(row.final_norm)
    notes = notes_of(model, row, layers[-1], stack, own_inner, init, loaded, changed)

    _say(model, {"placement": stack.placement, "depth_rule": stack.depth_rule, "options": dict(stack.options)})
    model.parameter_roles = parameter_roles(model, row)
    if row.found:
        model.keeps_unknown_parameters = True
    set_unit_gain(model, row, classes)
    weights = rescale_(model) if init == "rescale" else redraw_(model, seed) if init == "redraw" else []
    return Rewiring(
        family=model.config.model_type,
        placement=stack.placement,
        depth_rule=str(stack.depth_rule),
        num_layers=len(layers),
        kept=kept,
        added=tuple(sorted(added)),
        dropped=dropped,
        final_norm=stack.final_norm,
        init=init,
        weights=tuple(weights),
        notes=tuple(notes),
    )


def _norms(layers: Any, rows: list[Family]) -> list[nn.Module]:
    """The layers' own norms."""
    return [
        norm for layer, own in zip(layers, rows, strict=True) for p in own.norms.values() if (norm := find(layer, p))
    ]


def _rewire_layers(
    layers: Any, rows: list[Family], blocks: list[Placement], text: Any, template: nn.Module, init: Init
) -> tuple[dict[str, str], set[str]]:
    """Give each layer its placement and norms. Returns the norms that were kept, by role, and what was added."""
    kept: dict[str, str] = {}
    added: set[str] = set()
    for layer, block, own in zip(layers, blocks, rows, strict=True):
        for role, over in block.inner_norms.items():
            if not has_own(layer, own, role):
                place_inner_norm(layer, own, text, template, role, over)
                added.add(f"{role} (inner)")
        moved = move_norms(layer, own, block, template)
        kept |= {role: own.norms[role] for role in block.norms() if role in moved}
        new = set(block.norms()) - moved
        for role in new if not init else ():  # `init` sets the gains of all, and without it new ones need theirs
            if (weight := block.get_submodule(role)._parameters.get("weight")) is not None:
                nn.init.constant_(weight, own.unit_gain + block.norm_gain(role) - 1.0)
        added |= new
        rewire_layer(layer, own, block)
    return kept, added


def _rewire_ends(base: Any, row: Family, layers: Any, stack: Stack, template: nn.Module) -> set[str]:
    """Put norms after the embedding and before the head, or take the last one away. Returns what was added."""
    added: set[str] = set()
    if stack.embedding_norm:
        layers[0].embedding_norm = fresh_norm(template, row)
        added.add("embedding_norm")
    if stack.final_norm and not row.final_norm:
        layers[-1].last_norm = fresh_norm(template, row)
        added.add("final norm")
    elif row.final_norm and not stack.final_norm:
        owner, _, name = row.final_norm.rpartition(".")
        setattr(base.get_submodule(owner), name, nn.Identity())
    base.layer_path = row.layers
    adopt(base, RewiredBody)
    return added


def _say(model: Any, rewiring: dict[str, Any]) -> None:
    """Write into the model's configuration how it was rewired: into a copy, for other models may share it."""
    old = model.config
    if isinstance(old, RewiredConfig) and getattr(old, "rewiring", None) == rewiring:
        return
    new: Any = copy.deepcopy(old)
    if not isinstance(new, RewiredConfig):
        adopt(new, RewiredConfig)
    new.rewiring = rewiring
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def _loaded(model: nn.Module) -> bool:
    return any(getattr(p, "_is_hf_initialized", False) for p in model.parameters())


def check_first(model: nn.Module, init: object) -> None:
    """What can be refused before the model's family is known."""
    if init not in (None, "rescale", "redraw", False):
        raise unknown("init", init, ["rescale", "redraw", "False"])
    if any(isinstance(module, RewiredLayer) for module in model.modules()):
        raise InputError("this model is rewired already: build it anew to rewire it otherwise.")
    if _loaded(model) and init is None:
        raise InputError(
            "this model's weights were loaded from a checkpoint, and `init` decides what becomes of them: say "
            "init=False to keep them, init='rescale' to multiply those that the depth rule names, init='redraw' to "
            "draw them anew."
        )
    if init and is_meta(model):
        raise InputError(
            f"init={init!r} has nothing to work on, the model is on meta device: rewire with init=False, and call "
            "spannorm.rewiring.redraw_(model) after to_empty."
        )


def _rows(model: PreTrainedModel, row: Family, layers: Any) -> list[Family]:
    """The row of each layer, of its own kind."""
    family = model.config.model_type
    if not layers:
        raise InputError(
            f"the row of {family!r} does not fit {type(model).__name__}: it has no layers at {row.layers!r}."
        )
    owner: dict[int, int] = {}
    for b, layer in enumerate(layers):
        for parameter in layer.parameters():
            if (other := owner.setdefault(id(parameter), b)) != b:
                raise InputError(
                    f"layers {other} and {b} share parameters, and each layer gets a placement and an init of its own: "
                    "give each its own modules."
                )
    for flag, reason in row.unsupported.items():
        if getattr(model.config, flag):
            raise InputError(f"{family} with `{flag}` cannot be rewired: {reason}.")
    rows = []
    for b, layer in enumerate(layers):
        own = row.of(layer)
        if own is None:
            raise InputError(f"{family}: block {b}, {type(layer).__name__}, is of a kind that the audit did not see.")
        wanted = {own.attention, own.ffn, *own.norms.values(), *own.dropouts.values(), *filter(None, [own.multiplier])}
        lacking = [path for path in sorted(wanted) if find(layer, path) is None and not _there(layer, path)]
        if lacking:
            raise InputError(
                f"the row of {family!r} does not fit {type(model).__name__}: its layers have no {', '.join(lacking)}."
            )
        rows.append(own)
    return rows


def _there(layer: nn.Module, path: str) -> bool:
    """Whether a path leads to something, None included."""
    owner, _, name = path.rpartition(".")
    return hasattr(find(layer, owner) if owner else layer, name)


def _check_roles(model: PreTrainedModel, row: Family) -> None:
    try:
        for _ in known_parameters(model, parameter_roles(model, row)):
            pass
    except InputError as error:
        parameter = str(error).partition(": ")[0]
        raise InputError(
            f"init has to know what every parameter does, and {parameter}: rewire first and add heads and adapters "
            "afterwards, or say init=False."
        ) from None


def _check_sites(
    model: PreTrainedModel, rows: list[Family], layers: Any, stack: Stack, blocks: list[Placement]
) -> None:
    family, name = model.config.model_type, stack.placement
    for layer, block, row in zip(layers, blocks, rows, strict=True):
        if row.unsplit and (apart := _told_apart(block, row)):
            raise InputError(
                f"{name!r} with depth rule {block.rule.name!r} treats {', '.join(apart)} apart, and which rows of "
                f"{row.unsplit[0]} are whose an audit does not tell: write a row for {family!r} that says so by a "
                "`Fused`."
            )
        norm = next((n for path in row.norms.values() if (n := find(layer, path)) is not None), None)
        if block.rule.output_gain and norm is not None and getattr(norm, "weight", None) is None:
            raise InputError(
                f"depth rule {block.rule.name!r} sets the initial gain of the norms on the branches' outputs, and the "
                f"norms of {family!r} have no gain: choose a rule without `:gain`."
            )
        for role in block.inner_norms:
            if has_own(layer, row, role):
                continue
            found = list(sites(layer, row, role))
            if not found:
                raise InputError(
                    f"{name!r} has a norm at {role}, and the row of {family!r} names no matrix for it: add its path to "
                    "the row's `matrices`."
                )
            for path, _, matrix in found:
                owner = layer.get_submodule(path.rpartition(".")[0])
                if row.found and isinstance(matrix, nn.Parameter) and not hasattr(owner, "_apply_gate"):
                    raise InputError(f"{name!r} has a norm at {role}, and {type(owner).__name__} has no place for one.")


def _told_apart(block: Placement, row: Family) -> list[str]:
    """Those of q, k and v that a placement normalizes, or that its depth rule treats unlike the others."""
    normed = [role for role in ("q", "k", "v") if role in block.inner_norms and role not in row.own_norms]
    rule = block.rule
    for table in (rule.init, rule.learning_rate, rule.weight_decay, rule.eps):
        values = [table.get(role, 1.0) for role in ("q", "k", "v")]
        if len(set(values)) > 1:
            return ["q", "k", "v"]
    return normed
