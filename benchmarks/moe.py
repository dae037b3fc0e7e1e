"""Training speed of our mixture of experts against Transformers' Qwen3-MoE of the same size, and of `grouped_mm`
against `eager`, under the same Trainer, in turns.

    python benchmarks/moe.py [--rounds 10] [--steps 10] [--threads 1] [--depth 16] [--experts 8 32 128] [--json FILE]

Prints tokens per second (medians over all steps but each turn's first) and ratios. Both compute their load-balancing
loss; ours also records the routers' health at every step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from llama import LENGTH, SIZES, measure
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from spannorm.files import write_json
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.train.environment import machine, versions

NAMES = {
    "placement.attn_norm": "input_layernorm",
    "placement.ffn_norm": "post_attention_layernorm",
}


def build(depth: int, experts: int) -> dict[str, torch.nn.Module]:
    """Each model with either implementation of its experts; Qwen3-MoE gets PreNorm's weights, and so its routing."""
    sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": depth, "max_position_embeddings": LENGTH}
    sizes |= {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 88, "norm_topk_prob": True}
    models: dict[str, Any] = {}
    for how in ("grouped_mm", "eager"):
        pre, span = (SpanNormForCausalLM(SpanNormConfig(placement=p, qk_norm=True, **sizes)) for p in ("pre", "span"))
        qwen = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **sizes, num_key_value_heads=4, head_dim=16, output_router_logits=True, router_aux_loss_coef=0.01
            )
        )
        state = pre.state_dict()
        for ours, theirs in NAMES.items():
            state = {name.replace(ours, theirs): value for name, value in state.items()}
        qwen.load_state_dict(state)
        models |= {f"qwen3_moe {how}": qwen, f"pre {how}": pre, f"span {how}": span}
        for model in (qwen, pre, span):
            model.set_experts_implementation(how)
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'experts':>7}  {'model':21}  {'tokens/s':>9}  to Qwen3-MoE  step time to eager's")
    for experts in options.experts:
        speeds = measure(build(options.depth, experts), options.rounds, options.steps)
        for name, speed in speeds.items():
            whose, how = name.split()
            ratio, to_eager = speed / speeds[f"qwen3_moe {how}"], speeds[f"{whose} eager"] / speed
            rows.append({"experts": experts, "model": name, "tokens_per_second": speed, "ratio": ratio})
            print(f"{experts:7}  {name:21}  {speed:9,.0f}  {ratio:12.3f}  {to_eager:.3f}")
    about = {key: getattr(options, key) for key in ("threads", "rounds", "steps", "depth")}
    print(json.dumps(machine()))
    if options.json:
        write_json(options.json, {"rows": rows, **about, "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
