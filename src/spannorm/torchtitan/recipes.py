"""A recipe's model and training as torchtitan's configuration; `spannorm train RECIPE --print-torchtitan` calls it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.validate import Validator
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.config_utils import get_attention_config, make_ffn_config, make_gqa_config
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from torchtitan.models.qwen3.parallelize import parallelize_qwen3
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer as TitanTrainer

from spannorm.torchtitan.block import PlacementConfig
from spannorm.torchtitan.tokens import TokenDataLoader
from spannorm.torchtitan.trainer import Trainer, with_placement

_LATER = {"weight": skip_param_init}  # the placement's plan replaces it


def dense_model(m: Mapping[str, Any], attn_backend: str = "flex") -> Qwen3Model.Config:
    """torchtitan's dense Qwen 3 with the sizes of a configuration of ours. Its RoPE has Hugging Face's order."""
    dim, heads, eps = m["hidden_size"], m["num_attention_heads"], m["rms_norm_eps"]
    channels = m["head_dim"] or dim // heads

    def norm(size: int) -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=size, eps=eps)

    def layer() -> Qwen3TransformerBlock.Config:
        return Qwen3TransformerBlock.Config(
            attention_norm=norm(dim),
            ffn_norm=norm(dim),
            attention=make_gqa_config(
                dim=dim,
                n_heads=heads,
                n_kv_heads=m["num_key_value_heads"],
                head_dim=channels,
                wqkv_param_init=_LATER,
                wo_param_init=_LATER,
                inner_attention=get_attention_config(attn_backend),
                fuse_qkv=True,
                rope=CosSinRoPE.Config(dim=channels, max_seq_len=m["max_position_embeddings"], theta=m["rope_theta"]),
                qk_norm=norm(channels) if m["qk_norm"] else None,
            ),
            feed_forward=make_ffn_config(
                dim=dim, hidden_dim=m["intermediate_size"], w1_param_init=_LATER, w2w3_param_init=_LATER
            ),
        )

    return Qwen3Model.Config(
        dim=dim,
        vocab_size=m["vocab_size"],
        enable_weight_tying=m["tie_word_embeddings"],
        tok_embeddings=Embedding.Config(num_embeddings=m["vocab_size"], embedding_dim=dim, param_init=_LATER),
        norm=norm(dim),
        lm_head=Linear.Config(in_features=dim, out_features=m["vocab_size"], param_init=_LATER),
        layers=[layer() for _ in range(m["num_hidden_layers"])],
    )


def from_recipe(
    *, name: str, model: Mapping[str, Any], train: Mapping[str, Any], data: str, attn_backend: str = "flex"
) -> Trainer.Config:
    """torchtitan's configuration for a recipe.

    Args:
        model: keys of `SpanNormConfig`, all those that `--print-torchtitan` prints.
        train: keys of `TrainRecipe`.
        data: the folder of the tokens.
        attn_backend: torchtitan's name, `flex` or `varlen`.
    """
    t = train
    decays = {"cosine": {"decay_type": "cosine"}, "wsd": {"decay_type": "linear", "decay_ratio": t["decay_fraction"]}}
    half = "float32" if t["precision"] == "fp32" else "bfloat16"
    spec = ModelSpec(
        name=name,
        flavor=name,
        model=dense_model(model, attn_backend),
        parallelize_fn=parallelize_qwen3,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )
    config = TitanTrainer.Config(
        loss=CrossEntropyLoss.Config(global_vocab_size=model["vocab_size"]),
        hf_assets_path=f"{data}/tokenizer",
        model_spec=spec,
        optimizer=default_adamw(
            lr=t["learning_rate"],
            betas=(t["adam_beta1"], t["adam_beta2"]),
            eps=t["adam_epsilon"],
            weight_decay=t["weight_decay"],
        ),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=t["warmup_steps"],
            min_lr_factor=t["final_learning_rate"],
            **decays[t["schedule"]],  # type: ignore[arg-type]
        ),
        training=TrainingConfig(
            local_batch_size=t["batch_size"],
            global_batch_size=t["batch_size"] * t["accumulation"],
            seq_len=t["sequence_length"],
            steps=t["steps"],
            max_norm=t["clip_norm"] or float("inf"),
            mixed_precision_param=half,  # type: ignore[arg-type]
        ),
        dataloader=TokenDataLoader.Config(dataset_path=data, seed=t["seed"]),
        metrics=MetricsProcessor.Config(log_freq=1),
        parallelism=ParallelismConfig(),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=t["checkpoint_every"], last_save_model_only=True, last_save_in_hf=True
        ),
        activation_checkpoint=FullAC.Config() if t["activation_checkpointing"] else None,  # type: ignore[arg-type]
        validator=Validator.Config(enable=False),
    )
    chosen = PlacementConfig(
        name=model["placement"],
        depth_rule=model["depth_rule"],
        options=json.dumps(model["placement_options"] or {}),
        norm=model["norm"],
        base_init=model["base_init"],
        initializer_range=model["initializer_range"],
        init_seed=model["init_seed"],
        embedding_multiplier=model["embedding_multiplier"],
    )
    return with_placement(config, chosen)
