"""Measuring a model made of placements: signal, gradient and collapse by layer. PyTorch only.

`Probe` watches any forward and backward pass; `measure` makes one. The other functions change one thing and measure
what it does: `skip_gradient`, `branch_shares`, `block_skip_costs`, `update_sizes`. What each number is: docs/probes.md.
"""

from spannorm.probes.experiments import (
    BranchShares,
    UpdateSizes,
    block_skip_costs,
    branch_shares,
    measure,
    skip_gradient,
    update_sizes,
)
from spannorm.probes.probe import Probe
from spannorm.probes.record import Record

__all__ = [
    "BranchShares",
    "Probe",
    "Record",
    "UpdateSizes",
    "block_skip_costs",
    "branch_shares",
    "measure",
    "skip_gradient",
    "update_sizes",
]
