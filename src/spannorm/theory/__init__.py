"""What a placement does to signal and gradient at initialization, worked out without building the model.

Standard library and NumPy alone. docs/theory.md derives it, `spannorm depth-check` holds it against real models.
"""

from spannorm.theory.body import Body
from spannorm.theory.kernel import ACTIVATIONS
from spannorm.theory.placements import PLACEMENTS
from spannorm.theory.predict import EXACT, Prediction, predict
from spannorm.theory.verdict import FACTOR, Verdict, advised_rule, times, verdict

__all__ = [
    "ACTIVATIONS",
    "EXACT",
    "FACTOR",
    "PLACEMENTS",
    "Body",
    "Prediction",
    "Verdict",
    "advised_rule",
    "predict",
    "times",
    "verdict",
]
