"""Put a placement into a Transformers model, in place."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from spannorm.errors import InputError
from spannorm.rewiring.change import change, check_first
from spannorm.rewiring.configuration import MODEL_TYPE
from spannorm.rewiring.found import family_of, rehearse
from spannorm.rewiring.report import Init, Rewiring
from spannorm.values import checked


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
        model: of a family in `spannorm.rewiring.FAMILIES`, or one whose wiring an audit recovers; before PEFT, FSDP or
            `torch.compile` wrap it.
        placement: a name of `spannorm.PLACEMENTS`.
        depth_rule: a name of `spannorm.depth_rule`; None means the placement's default.
        init: `rescale` multiplies the matrices that the depth rule names, `redraw` draws all weights anew by our base
            init `fan_in` and the depth rule, False touches none. None means `rescale`, or False on meta device (see
            `spannorm.rewiring.redraw_`), and is refused where weights were loaded from a checkpoint.
        seed: of `redraw`.
        options: the placement's own.

    Raises:
        InputError: a family that neither the table nor an audit knows, an unknown placement, rule or option, a
            model that is rewired already or holds loaded weights while `init` is not given, layers that share
            parameters, a parameter that `init` has no role for (a head or an adapter of one's own), a placement
            that this family has no place for. Whatever is raised, the model is as it was.
    """
    _check_kind(model)
    checked(int, seed, "seed")
    check_first(model, init)
    row = family_of(model)
    if row.found:
        rehearse(model, row, placement, depth_rule, init, options)
    return change(model, row, placement, depth_rule, init, seed, options)


def _check_kind(model: Any) -> None:
    """Refuse what is no model of Transformers, and one whose folder was opened without this package."""
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
