"""Put a placement into a Transformers model that you already have: `rewire`. Load a saved one: `load`."""

from spannorm.rewiring.families import FAMILIES, Family
from spannorm.rewiring.loading import RewiredAuto, load
from spannorm.rewiring.report import Rewiring
from spannorm.rewiring.rewire import rewire
from spannorm.rewiring.weights import redraw_
from spannorm.roles import Fused

__all__ = ["FAMILIES", "Family", "Fused", "RewiredAuto", "Rewiring", "load", "redraw_", "rewire"]
