"""Put a placement into a Transformers model, in place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from spannorm.adopt import adopt
from spannorm.errors import InputError, unknown
from spannorm.placements import Placement, Stack
from spannorm.rewiring.configuration import MODEL_TYPE, RewiredConfig
from spannorm.rewiring.families import Family, family_of
from spannorm.rewiring.layers import RewiredBody, RewiredLayer
from spannorm.rewiring.surgery import (
    find,
    fresh_norm,
    has_own,
    move_norms,
    place_inner_norm,
    rewire_layer,
    sites,
    undone_on_error,
)  # fmt: skip
from spannorm.rewiring.weights import parameter_roles, redraw_, rescale_, set_unit_gain, tied
from spannorm.roles import known_parameters
from spannorm.values import checked

Init = Literal["rescale", "redraw", False]


@dataclass(frozen=True)
class Rewiring:
    """What `rewire` did; `print` it."""

    family: str
    placement: str
    depth_rule: str
    """Resolved."""
    num_layers: int
    kept: Mapping[str, str]
    """Role in the placement → the family's norm that now plays it."""
    added: tuple[str, ...]
    """Norms that the family does not have, by role."""
    dropped: tuple[str, ...]
    """The family's norms that the placement has no use for."""
    final_norm: bool
    init: Init
    weights: tuple[str, ...]
    """Names of the parameters that the init changed."""
    notes: tuple[str, ...]
    """What the family does that the placement does not know of, and what became of it."""

    def __str__(self) -> str:
        kept = ", ".join(f"{role} ← {name}" for role, name in self.kept.items())
        lines = [
            f"{self.num_layers} {self.family} layers rewired to {self.placement}, depth rule {self.depth_rule}",
            f"  norms kept: {kept or 'none'}",
            f"  norms added: {', '.join(self.added) or 'none'}; dropped: {', '.join(self.dropped) or 'none'}; "
            f"final norm {'kept' if self.final_norm else 'removed'}",
            f"  init: {self.init or 'left alone'}, {len(self.weights)} tensors changed",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def rewire(
    model: PreTrainedModel,
    placement: str,
    *,
    depth_rule: str | None = None,
    init: Init | None = None,
    seed: int = 0,
    **options: Any,
) -> Rewiring:
    """Put a placement into a Transformers model, in place, and say what was done.

        model = AutoModelForCausalLM.from_config(config)
        print(spannorm.rewire(model, "span", depth_rule="1/sqrt(L)"))

    Each layer becomes a subclass of its own class. The family's norms move into the layer's placement by role, norms
    of roles that the placement lacks are dropped, missing ones are added as copies with gain 1, and the final norm
    goes where the placement has none. A new placement does not keep a pretrained function: it is for training.

    Args:
        model: of a family in `spannorm.rewiring.FAMILIES`; before PEFT, FSDP or `torch.compile` wrap it.
        placement: a name of `spannorm.PLACEMENTS`.
        depth_rule: a name of `spannorm.depth_rule`; None means the placement's default.
        init: `rescale` multiplies the matrices that the depth rule names, `redraw` draws all weights anew by our base
            init `fan_in` and the depth rule, False touches none. None means `rescale`, or False on meta device (see
            `spannorm.rewiring.redraw_`), and is refused where weights were loaded from a checkpoint.
        seed: of `redraw`.
        options: the placement's own.

    Raises:
        InputError: an unknown family, placement, rule or option, a model that is rewired already or holds loaded
            weights while `init` is not given, layers that share parameters, a parameter that `init` has no role for
            (a head or an adapter of one's own), a placement that this family has no place for. Whatever is raised, the
            model is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"rewire takes a Transformers model, not a {type(model).__name__}: rewire before you wrap it, or build "
            "plain PyTorch blocks with spannorm.Block."
        )
    if model.config.model_type == MODEL_TYPE:
        raise InputError(
            "this configuration was read from a rewired model's folder as the family's: take "
            "AutoConfig.from_pretrained(…, trust_remote_code=True), or the model itself with spannorm.load."
        )
    checked(int, seed, "seed")
    row = family_of(model.config.model_type)
    layers: Any = find(model.base_model, row.layers)
    loaded = any(getattr(p, "_is_hf_initialized", False) for p in model.parameters())
    _check_model(model, row, layers, init, loaded)
    init = init if init is not None else False if _is_meta(model) else "rescale"
    stack = Stack(placement, len(layers), depth_rule, options)
    blocks = stack.blocks(model.config.hidden_size)
    _check_sites(model, row, layers, placement, blocks)
    if init:
        _check_roles(model, row)
    with undone_on_error(model):
        return _rewired(model, row, stack, blocks, init, loaded, seed)


def _rewired(
    model: Any, row: Family, stack: Stack, blocks: list[Placement], init: Init, loaded: bool, seed: int
) -> Rewiring:
    """Do it, once all is checked; the weights come last."""
    base = model.base_model
    layers: Any = find(base, row.layers)
    template = copy.deepcopy(next(norm for path in row.norms.values() if (norm := getattr(layers[0], path))))
    own_inner = [role for role in stack.inner_norms if has_own(layers[-1], row, role)]
    kept: dict[str, str] = {}
    added: set[str] = set()
    for layer, block in zip(layers, blocks, strict=True):
        for role, over in block.inner_norms.items():
            if not has_own(layer, row, role):
                place_inner_norm(layer, row, model.config, template, role, over)
                added.add(f"{role} (inner)")
        moved = move_norms(layer, row, block, template)
        kept |= {role: row.norms[role] for role in block.norms() if role in moved}
        added |= set(block.norms()) - moved
        rewire_layer(layer, row, block)
    if stack.embedding_norm:
        layers[0].embedding_norm = fresh_norm(template, row)
        added.add("embedding_norm")
    if not stack.final_norm:
        setattr(base, row.final_norm, nn.Identity())
    base.layer_path = row.layers
    adopt(base, RewiredBody)
    dropped = tuple(path for path in row.norms.values() if path not in kept.values())
    changed = bool(added or dropped) or not stack.final_norm
    notes = _notes(model, row, layers[-1], stack, own_inner, init, loaded, changed)

    _say(model, {"placement": stack.placement, "depth_rule": stack.depth_rule, "options": dict(stack.options)})
    model.parameter_roles = parameter_roles(model, row)
    set_unit_gain(model, row.unit_gain)
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


def _is_meta(model: nn.Module) -> bool:
    return next(model.parameters()).is_meta


def _check_model(model: PreTrainedModel, row: Family, layers: Any, init: object, loaded: bool) -> None:
    family = model.config.model_type
    if init not in (None, "rescale", "redraw", False):
        raise unknown("init", init, ["rescale", "redraw", "False"])
    if layers and isinstance(layers[0], RewiredLayer):
        raise InputError("this model is rewired already: build it anew to rewire it otherwise.")
    wanted = {row.attention, row.ffn, *row.norms.values(), *row.dropouts.values(), *filter(None, [row.multiplier])}
    lacking = [path for path in sorted(wanted) if layers and not hasattr(layers[0], path)]
    if not layers or lacking:
        raise InputError(
            f"the row of {family!r} does not fit {type(model).__name__}: "
            + (f"its layers have no {', '.join(lacking)}." if lacking else f"it has no layers at {row.layers!r}.")
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
    if loaded and init is None:
        raise InputError(
            "this model's weights were loaded from a checkpoint, and `init` decides what becomes of them: say "
            "init=False to keep them, init='rescale' to multiply those that the depth rule names, init='redraw' to "
            "draw them anew."
        )
    if init and _is_meta(model):
        raise InputError(
            f"init={init!r} has nothing to work on, the model is on meta device: rewire with init=False, and call "
            "spannorm.rewiring.redraw_(model) after to_empty."
        )


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


def _check_sites(model: PreTrainedModel, row: Family, layers: Any, name: str, blocks: list[Placement]) -> None:
    for layer, block in zip(layers, blocks, strict=True):
        for role in block.inner_norms:
            if not has_own(layer, row, role) and not any(True for _ in sites(layer, row, role)):
                raise InputError(
                    f"{name!r} has a norm at {role}, and the row of {model.config.model_type!r} names no matrix for "
                    "it: add its path to the row's `matrices`."
                )


def _notes(
    model: Any, row: Family, layer: Any, stack: Stack, own: list[str], init: Init, loaded: bool, changed: bool
) -> list[str]:
    """What the report has to say beyond names of norms. The last layer stands for all.

    Args:
        own: the family's own norms that stand in for inner ones.
        changed: whether a norm was added or dropped.
    """
    family, block, notes = model.config.model_type, layer.placement, []
    rule = block.rule
    same = stack.placement == row.placement and not (changed or rule.learned or rule.forward or rule.output_gain)
    if row.parallel is not None and getattr(layer, row.parallel):
        same = False
        notes.append(f"{family} runs attention and FFN side by side here; the placement runs them in turn")
    if not same:
        notes.append(f"no longer what {family} computes from the same weights: for training, not for using weights")
    if loaded and (not same or init == "redraw" or (init == "rescale" and block.rule.init)):
        warnings.warn(
            f"the loaded weights were trained as {family} has them, and rewired to {stack.placement!r} they compute "
            "something else: train the model before you use it.",
            stacklevel=3,
        )
    if row.multiplier is not None:
        factor = getattr(layer, row.multiplier)
        notes.append(f"each branch keeps {family}'s multiplier {factor}, inside what the placement adds or normalizes")
    if own:
        notes.append(f"{family}'s own norms on {', '.join(own)} stand in for the placement's")
    if "ffn_down" in block.inner_norms and any(isinstance(m, nn.Parameter) for *_, m in sites(layer, row, "ffn_down")):
        notes.append("the experts of a layer share one norm before FFN-down (our reading)")
    if row.scaled_init is not None and init == "rescale" and block.rule.init:
        notes.append(
            f"{family} draws {row.scaled_init} at 1/√(2L) itself, and rescale multiplies on top of that: "
            "init='redraw' draws by the depth rule alone"
        )
    if init == "redraw" and tied(model) and not row.scaled_embedding:
        notes.append(f"embedding and head are one matrix of std d^-1/2; {family} does not multiply it by √d on input")
    if _is_meta(model):
        notes.append("no weight has a value on meta device: after to_empty call spannorm.rewiring.redraw_(model)")
    return notes
