"""Any placement inside torchtitan's own models: Llama 3, Qwen 3, and Qwen 3's mixture of experts.

    torchrun --nproc_per_node 8 -m torchtitan.train --module spannorm.torchtitan --config llama3_8b \\
        --placement.name span --placement.depth_rule "1/sqrt(L):forward"

Attention and feed-forward are torchtitan's. Norms, skips, branch factors, init and the optimizer's factors are ours.
`--config` accepts every name in torchtitan's registries of `llama3` and `qwen3` (docs/torchtitan.md). Needs
`pip install 'spannorm[torchtitan]'`.
"""

from spannorm.torchtitan.block import PlacementConfig
from spannorm.torchtitan.model import Llama3, Qwen3, place
from spannorm.torchtitan.trainer import Trainer, placed_spec, with_placement

__all__ = ["Llama3", "PlacementConfig", "Qwen3", "Trainer", "place", "placed_spec", "with_placement"]
