"""The report of `rewire`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from spannorm.placements import Stack
from spannorm.rewiring.families import Family
from spannorm.rewiring.surgery import sites
from spannorm.rewiring.weights import is_meta, tied

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
    """Role in the placement → the family's norm that now has it."""
    added: tuple[str, ...]
    """New norms that the family does not have, by role."""
    dropped: tuple[str, ...]
    """The family's norms that the placement does not use."""
    final_norm: bool
    init: Init
    weights: tuple[str, ...]
    """Names of the parameters that the init changed."""
    notes: tuple[str, ...]
    """What the family does that the placement does not have, and how it was treated."""

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


def notes_of(
    model: Any, row: Family, layer: Any, stack: Stack, own: list[str], init: Init, loaded: bool, changed: bool
) -> list[str]:
    """The report's remarks beyond names of norms. They are read from the last layer.

    Args:
        own: the family's own norms that replace inner norms.
        changed: whether a norm was added or dropped.
    """
    family, block, notes = model.config.model_type, layer.placement, []
    if row.found:
        how = f"to {row.off:.0e} of the largest value" if row.off else "to the bit"
        notes.append(f"no row was written for {family}: an audit found its wiring, and it holds {how} in a small model")
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
            stacklevel=4,
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
    if is_meta(model):
        notes.append("no weight has a value on meta device: after to_empty call spannorm.rewiring.redraw_(model)")
    return notes
