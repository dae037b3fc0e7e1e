"""Saved weights of this and earlier versions: their names, and whether they fit the configuration."""

from __future__ import annotations

from typing import Any

from spannorm.errors import InputError
from spannorm.models.configuration import SpanNormConfig

# Since 0.1 inner norms stand beside their projections, and what belongs to the first block is in it.
RENAMED = {
    **{f"{role}_proj.output_norm": f"{role}_norm" for role in "qkv"},
    "o_proj.input_norm": "attn_out_norm",
    "o_proj.head_scale": "head_scale_norm.weight",
    "down_proj.input_norm": "ffn_down_norm",
    "placement.attn_scale": "placement.gains_norm.attn_scale",
    "placement.ffn_scale": "placement.gains_norm.ffn_scale",
    "model.embedding_norm": "model.layers.0.embedding_norm",
    "^embedding_norm": "layers.0.embedding_norm",
}
"""Old names of parameters and their new names, as Transformers' `key_mapping`."""


def check_feed_forwards(config: SpanNormConfig, info: dict[str, Any]) -> None:
    """Refuse a checkpoint whose feed-forwards are dense where the configuration has experts, or the reverse.

    Args:
        info: what `from_pretrained` returns with `output_loading_info=True`.

    Raises:
        InputError: names a missing weight.
    """
    unexpected = {name.partition(".mlp.")[0] for name in info["unexpected_keys"] if ".mlp." in name}
    for name in info["missing_keys"]:
        if name.partition(".mlp.")[0] in unexpected:
            kind = "mixtures of experts" if config.num_experts else "dense feed-forwards"
            raise InputError(
                f"the configuration asks for {kind} where the checkpoint has none ({name} is missing): load it "
                "with the configuration it was saved with."
            )
