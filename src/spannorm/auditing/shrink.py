"""A configuration of Transformers with small sizes, found by their names, so that its model is built in a second."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

WIDTH, HEADS, HEAD, INNER, VOCABULARY, POSITIONS, EXPERTS = 64, 4, 16, 96, 160, 128, 4

_NAMES: tuple[tuple[int, str], ...] = (
    (WIDTH, "hidden_size dim mamba_d_ssm d_model n_embd dim_model word_embed_proj_dim hidden_size_global "
     "out_hidden_size lru_width output_hidden_size backbone_hidden_size emb_dim cross_hidden_size embed_dim "
     "embedding_dim output_embedding_size projection_dim router_hidden_size"),
    (INNER, "intermediate_size hidden_dim ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size dim_ff dff "
     "d_inner d_ff moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size mlp_dim "
     "shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size "
     "intermediate_size_mlp dense_intermediate_size feed_forward_size"),
    (2 * WIDTH, "ple_embed_dim"),
    (2 * HEADS, "mamba_n_heads mamba_num_heads"),
    (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
     "num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads "
     "indexer_n_heads index_n_heads linear_num_heads linear_num_value_heads"),
    (HEADS // 2, "linear_num_key_heads num_codebooks encoder_layers num_encoder_layers"),
    (HEAD, "head_dim indexer_head_dim dim_head d_head d_kv v_head_dim qk_nope_head_dim swa_head_dim index_head_dim "
     "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim "
     "kv_channels ssm_state_size mamba_d_state state_size attention_head_size embedding_size "
     "input_embedding_size global_head_dim"),
    (HEAD // 2, "qk_rope_head_dim rotary_dim gated_norm_rank hc_lowrank d_rel laurel_rank loop_gate_rank mamba_dt_rank "
     "time_step_rank hidden_size_per_layer_input chunk_size mamba_chunk_size index_topk indexer_budget "
     "index_block_size block_size sliding_window window_size attention_window_size local_attention "
     "attention_chunk_size sliding_window_size lsh_attn_chunk_length local_attn_chunk_length adapter_rank"),
    (2 * HEAD, "kv_lora_rank q_lora_rank o_lora_rank prompt_mid_dim qk_head_dim"),
    (VOCABULARY, "vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size "
     "encoder_hash_byte_group_vocab ngram_vocab_size_base pronunciation_vocab_size shape_vocab_size"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions "
     "context_length rel_extent model_max_length"),
    (EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k n_layers_per_attn_res_block "
     "global_attn_every_n_layers attn_layer_period expert_layer_period o_groups layer_group_size n_groups"),
    (1, "num_shared_experts n_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers "
     "moe_layer_start_index n_group topk_group num_expert_group zero_expert_num attn_layer_offset "
     "expert_layer_offset num_kv_shared_layers split_ngram_parts max_window_layers num_global_layers "
     "prompt_length loop_layer_index_start"),
)  # fmt: skip
"""Small value → the names that get it, if the configuration has a larger value."""
SMALL = {name: value for value, names in _NAMES for name in names.split()}
RATIOS = ("attention_hidden_size", "attention_head_dim")
"""Sizes whose ratio to the width, or to the width of a head, stays the same."""
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads", "num_query_groups")

DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks",
    "depth", "num_layers_per_stack",
)  # fmt: skip
"""Names of the number of blocks in configurations. If there are several, all are set."""


def depth_of(config: Any) -> int | None:
    """The number of blocks that a configuration says; of an encoder and a decoder the decoder's."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return next((n for name in DEPTHS if isinstance(n := getattr(text, name, None), int)), None)


def shrink(config: Any, depth: int) -> tuple[Any, dict[str, tuple[Any, Any]]]:
    """A small copy of a configuration, and what was changed: name → (before, after).

    Lists with an entry per block keep at least one block of each kind where `depth` has room for it.
    """
    raw = config.to_dict()
    changed: dict[str, tuple[Any, Any]] = {}
    small = _shrunk(raw, depth, changed, "")
    made = type(config).from_dict(small)
    made._attn_implementation = "eager"
    return made, changed


def _shrunk(raw: Mapping[str, Any], depth: int, changed: dict[str, tuple[Any, Any]], prefix: str) -> dict[str, Any]:
    small: dict[str, Any] = {}
    before = next((raw[name] for name in DEPTHS if isinstance(raw.get(name), int)), None)
    if before is None:  # the list of blocks says how many there are
        before = next((len(raw[n]) for n in ("layers_block_type", "layer_types") if raw.get(n)), None)
    kept = _kept_blocks(raw, before, depth)
    width = next((raw[n] for n in ("hidden_size", "d_model", "n_embd") if isinstance(raw.get(n), int)), None)
    heads = next((raw[n] for n in ("num_attention_heads", "n_head") if isinstance(raw.get(n), int)), None)
    vocabulary = SMALL["vocab_size"]
    for name, value in raw.items():
        new = copy.deepcopy(value)
        if isinstance(value, dict):
            if value and all(str(k).isdigit() for k in value):  # by block
                at = {b: i for i, b in enumerate(kept or range(depth))}
                new = {at[int(k)]: _shrunk(v, depth, {}, "") if isinstance(v, dict) else v
                       for k, v in value.items() if int(k) in at}  # fmt: skip
            else:
                new = _shrunk(value, depth, changed, f"{prefix}{name}.")
        elif isinstance(value, bool) or value is None:
            pass
        elif isinstance(value, (list, tuple)):
            if before and len(value) == before and kept:
                new = [value[i] for i in kept]
            if name.endswith(("token_id", "token_ids")):
                new = [_token(v, vocabulary) for v in value]
        elif isinstance(value, int):
            if name in DEPTHS:
                new = depth
            elif name.endswith(("token_id", "token_index", "_token", "_index")) and value >= vocabulary:
                new = _token(value, vocabulary)
            elif name in KEY_HEADS:
                new = min(heads, HEADS) if heads and value == heads else min(value, HEADS // 2)
            elif name in RATIOS and width:
                per_head = heads if name.endswith("head_dim") and heads else 1
                new = max(1, round(value * per_head / width * WIDTH / (HEADS if per_head > 1 else 1)))
            elif name in SMALL:
                new = min(value, SMALL[name])
        small[name] = new
        if new != value and not isinstance(value, dict):
            changed[prefix + name] = value, new
    return _consistent(small, raw, depth)


def _consistent(small: dict[str, Any], raw: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Sizes that must add up or divide each other."""
    if "n_recurrent_layers" in small:  # a dictionary of Dory's counts attention and feed-forward apart
        types = small["layer_types"][::2] if "mlp" in small["layer_types"] else small["layer_types"]
        types = (types * depth)[:depth]
        small |= {"n_input_layers": 1, "n_recurrent_layers": depth - 2, "n_output_layers": 1, "layer_types": types,
                  "num_hidden_layers": depth}  # fmt: skip
    if "decoder_layers" in raw and raw.get("encoder_layers") == raw["decoder_layers"]:
        small["encoder_layers"] = depth  # caches of decoders alone are made as long as the encoder
    if "loop_layer_index_end" in small:
        small |= {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": depth - 1}
    if "hybrid_layer_ids" in small:
        small["hybrid_layer_ids"] = [b for b, kind in enumerate(small["layers_block_type"]) if kind == "hybrid"]
    if "final_w_init_variance_scale" in small:  # a configuration works it out from its depth, and keeps it
        small["final_w_init_variance_scale"] = 2.0 / depth
    parts = ("qk_nope_head_dim", "qk_rope_head_dim")
    by_block = [v for v in (raw.get("per_layer_config") or {}).values() if isinstance(v, Mapping)]
    for values in ({**raw, **own} for own in ({}, *by_block)):  # of all blocks, or of some
        if all(isinstance(values.get(p), int) for p in parts) and values.get("head_dim") == sum(
            values[p] for p in parts
        ):
            small["head_dim"] = sum(small[p] for p in parts)
    for name in ("out_features", "out_indices", "stage_names"):  # of backbones: worked out from the depth
        small.pop(name, None)
    if isinstance(raw.get("num_heads"), (list, tuple)):  # stages, each of its own width
        small |= {name: raw[name] for name in ("embed_dim", "num_heads") if name in raw}
    elif isinstance(small.get("image_size"), int) and isinstance(small.get("patch_size"), int):
        small["image_size"] = 3 * small["patch_size"]
    if "expand" in small and "num_heads" in small and "head_dim" in small:
        small["num_heads"] = small["hidden_size"] * small["expand"] // small["head_dim"]
    if "qk_head_dim" in small and isinstance(small.get("qk_nope_head_dim"), int):
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if isinstance(small.get("qk_rope_head_dim"), int) and raw.get("head_dim") == raw.get("qk_rope_head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]
    return small


def _token(value: Any, vocabulary: int) -> Any:
    return vocabulary - 1 - value % 8 if isinstance(value, int) and value >= vocabulary else value


def _kept_blocks(raw: Mapping[str, Any], before: int | None, depth: int) -> list[int]:
    """Which blocks stand for all: the first of each kind that the lists tell apart, then the second of each."""
    lists = [v for v in raw.values() if isinstance(v, (list, tuple)) and before and len(v) == before]
    if not before or not lists:
        return []
    kinds: dict[Any, list[int]] = {}
    for b, kind in enumerate(zip(*(map(str, v) for v in lists), strict=True)):
        kinds.setdefault(kind, []).append(b)
    turns = [b for row in zip_longest(*kinds.values()) for b in row if b is not None]
    return (sorted(turns[:depth]) * depth)[:depth]
