"""Measuring a model made of placements: signal, gradient and collapse by layer. PyTorch only.

`Probe` watches any forward and backward pass; `measure` runs one. The other functions change one thing and measure the
effect: `gradient_paths`, `block_skip_costs`, `update_sizes`, `depth_use`. `Watch` measures an optimizer step of any
model with blocks. docs/probes.md explains each number.
"""

from spannorm.probes.depth import DepthUse, depth_use
from spannorm.probes.experiments import (
    UpdateSizes,
    block_skip_costs,
    measure,
    update_sizes,
)
from spannorm.probes.paths import GradientPaths, gradient_paths
from spannorm.probes.probe import Probe
from spannorm.probes.record import Record
from spannorm.probes.watch import Watch

__all__ = [
    "DepthUse", "GradientPaths", "Probe", "Record", "UpdateSizes", "Watch", "block_skip_costs", "depth_use",
    "gradient_paths", "measure", "update_sizes",
]  # fmt: skip
