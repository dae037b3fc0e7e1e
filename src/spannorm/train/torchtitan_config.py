"""A recipe as a Python file for torchtitan. This only writes text, so torchtitan need not be installed."""

from __future__ import annotations

from pprint import pformat
from typing import Any

from spannorm.errors import InputError
from spannorm.train.data import TokenData
from spannorm.train.recipe import Recipe
from spannorm.train.run import model_config

MODEL = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "qk_norm"),
    *("placement", "depth_rule", "placement_options", "norm", "base_init", "initializer_range", "init_seed"),
    "embedding_multiplier",
)
TRAIN = (
    *("steps", "sequence_length", "batch_size", "accumulation", "learning_rate", "schedule", "warmup_steps"),
    *("decay_fraction", "final_learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("clip_norm", "precision", "activation_checkpointing", "checkpoint_every", "seed"),
)

TEMPLATE = '''"""The recipe {name} for torchtitan 0.3.0, printed by `spannorm train … --print-torchtitan`.

    torchrun --nproc_per_node 8 -m torchtitan.train --module {module} --config {function}

Same weights at the start, same sequences in the same order and same optimizer groups as `spannorm train`. torchtitan's
own are: the learning rate's curve (its warm-up begins at another share of the peak), how attention
computes, checkpoints, and what is done on spikes. On several processes set
--training.local_batch_size so that processes times it divides {sequences}.
"""

from spannorm.torchtitan.recipes import from_recipe

MODEL = {model}
TRAIN = {train}


def {function}():
    return from_recipe(name={name!r}, model=MODEL, train=TRAIN, data={data!r})
'''


def torchtitan_config(recipe: Recipe, tokens: TokenData) -> str:
    """The file, for tokens that are prepared already.

    Raises:
        InputError: a setting that torchtitan 0.3.0 does not have.
    """
    config, t = model_config(recipe, tokens), recipe.train
    rope: Any = config.rope_parameters
    for wrong, what in (
        (bool(config.num_experts), "a mixture's auxiliary losses: start from its qwen3 mixtures (docs/torchtitan.md)"),
        (t.optimizer != "adamw", f"optimizer {t.optimizer}"),
        (t.schedule == "ramp", "schedule ramp"),
        (rope["rope_type"] != "default", f"RoPE of the type {rope['rope_type']}"),
        (config.attention_bias or config.mlp_bias, "biases"),
    ):
        if wrong:
            raise InputError(f"torchtitan 0.3.0 has nothing for {what}.")
    model = {key: getattr(config, key) for key in MODEL} | {"rope_theta": rope["rope_theta"]}
    name = "".join(c if c.isalnum() else "_" for c in recipe.name)
    function = name if name.isidentifier() else f"run_{name}"
    return TEMPLATE.format(
        name=recipe.name,
        module=f"{function}_titan",
        function=function,
        data=str(tokens.directory),
        sequences=t.batch_size * t.accumulation,
        model=_written(model),
        train=_written({key: getattr(t, key) for key in TRAIN}),
    )


def _written(mapping: dict[str, Any]) -> str:
    return pformat(mapping, sort_dicts=False, width=100)
