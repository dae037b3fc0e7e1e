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
    """Put a placement into a Transformers model, in place, and report what was done.

        model = AutoModelForCausalLM.from_config(config)
        print(spannorm.rewire(model, "span", depth_rule="1/sqrt(L)"))

    Each layer becomes a subclass of its own class. The family's norms move into the layer's placement by role. Norms
    whose role the placement lacks are dropped, and missing norms are added as copies with gain 1. The final norm is
    removed if the placement has none. A new placement does not keep what a pretrained model computes: it needs
    training.

    Args:
        model: of a family in `spannorm.rewiring.FAMILIES`, or one whose wiring an audit finds. Call this before PEFT,
            FSDP or `torch.compile` wrap the model.
        placement: a name of `spannorm.PLACEMENTS`.
        depth_rule: a name of `spannorm.depth_rule`; None means the placement's default.
        init: `rescale` multiplies the matrices that the depth rule names. `redraw` draws all weights anew, by our base
            init `fan_in` and the depth rule. False changes no weights that were there. None means `rescale`, or False
            on meta device (see `spannorm.rewiring.redraw_`); it is refused if weights were loaded from a checkpoint.
        seed: the seed of `redraw`.
        options: the placement's own options.

    Raises:
        InputError: a family that neither the table nor an audit knows, an unknown placement, rule or option, a
            model that is rewired already or holds loaded weights while `init` is not given, layers that share
            parameters, a parameter for which `init` has no role (such as your own head or adapter), a placement
            that does not fit this family. After an error the model is as before.
    """
    _check_kind(model)
    checked(int, seed, "seed")
    check_first(model, init)
    row = family_of(model)
    if row.found:
        rehearse(model, row, placement, depth_rule, init, options)
    return change(model, row, placement, depth_rule, init, seed, options)


def _check_kind(model: Any) -> None:
    """Refuse an object that is no Transformers model, and a rewired folder that was opened without this package."""
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
