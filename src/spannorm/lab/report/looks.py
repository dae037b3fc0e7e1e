"""How an arm is drawn, in every figure and table: one colour per placement, one dash and shade per depth rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.colors import to_hex, to_rgb

# Okabe and Ito's vermilion, blue and green for the three that every comparison is about; the rest keep apart
# in lightness as well as in hue, and never fall below 3:1 on white.
_PROTAGONISTS = {"span": "#d55e00", "pre": "#0072b2", "post": "#009e73"}
_HUES = (
    *("#b3478c", "#b07a00", "#4b3b9b", "#3a93c4", "#7a1f2b", "#6f6f6f"),
    *("#5e7d1e", "#e0608a", "#14505c", "#8b5a2b", "#8f7ad1", "#222222"),
)
_DASHES: tuple[tuple[float, ...], ...] = ((), (4.5, 1.6), (1.2, 1.3), (6, 1.4, 1.2, 1.4), (9, 2.2))
_SHADES = (0.0, -0.32, 0.27)  # with five dashes: fifteen depth rules before one repeats


@dataclass(frozen=True)
class Look:
    """Colour and dash of an arm's line."""

    color: str
    dash: tuple[float, ...]

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.color, "linestyle": (0, self.dash) if self.dash else "-"}


def looks(arms: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Look]:
    """A look for every (placement, variant): hue by placement, dash and shade by variant."""
    pairs = list(arms)
    others = sorted({placement for placement, _ in pairs} - _PROTAGONISTS.keys())
    hues = _PROTAGONISTS | {name: _HUES[i % len(_HUES)] for i, name in enumerate(others)}
    variants = sorted({variant for _, variant in pairs}, key=lambda name: (name != "none", name))
    return {
        (placement, variant): Look(
            _shade(hues[placement], _SHADES[variants.index(variant) % len(_SHADES)]),
            _DASHES[variants.index(variant) % len(_DASHES)],
        )
        for placement, variant in pairs
    }


def _shade(color: str, amount: float) -> str:
    """Towards white above zero, towards black below."""
    goal = 1.0 if amount > 0 else 0.0
    return str(to_hex([part + (goal - part) * abs(amount) for part in to_rgb(color)]))
