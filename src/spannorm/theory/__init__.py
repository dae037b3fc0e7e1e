"""What a placement does to signal and gradient at initialization, computed without building the model.

It runs each placement's own equation, and needs only PyTorch and NumPy. docs/theory.md derives it.
`spannorm depth-check` compares it with real models.
"""

from spannorm.theory.body import Body
from spannorm.theory.covariance import ACTIVATIONS
from spannorm.theory.field import NoRule
from spannorm.theory.predict import EXACT, Prediction, predict
from spannorm.theory.verdict import FACTOR, Verdict, advised_rule, times, verdict

__all__ = [
    "ACTIVATIONS", "EXACT", "FACTOR", "Body", "NoRule", "Prediction", "Verdict", "advised_rule", "predict", "times",
    "verdict",
]  # fmt: skip
