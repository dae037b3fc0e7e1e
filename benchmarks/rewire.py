"""Step time of a Llama rewired to `pre`, `post` and `span` against the untouched one, in turns.

    python benchmarks/rewire.py [--rounds 40] [--threads 1] [--json FILE]

Each round times one training step of every model, in an order that turns from round to round; a model's ratio is the
median over rounds of its step's time over the untouched model's in the same round. Other work on the machine hits all.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from step import step_of
from transformers import LlamaConfig, LlamaForCausalLM
from turns import timed

import spannorm
from spannorm.files import write_json
from spannorm.train.environment import machine, versions

SIZES = {"vocab_size": 257, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}
BATCH, LENGTH = 4, 128


def turn_of(placement: str | None, depth: int) -> Callable[[], float]:
    """One optimizer step of a model, untouched or rewired; returns its seconds."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **SIZES))
    if placement is not None:
        spannorm.rewire(model, placement)
    return timed(step_of(model, torch.randint(0, 257, (BATCH, LENGTH)), use_cache=False))


def measure(depth: int, rounds: int) -> dict[str, float]:
    """Median ratio of each model's step time to the untouched one's."""
    steps = {name or "untouched": turn_of(name, depth) for name in (None, "pre", "post", "span")}
    seconds: list[dict[str, float]] = []
    for turn in range(rounds + 2):  # two rounds to warm up
        names = list(steps)
        turned = names[turn % len(names) :] + names[: turn % len(names)]
        seconds.append({name: steps[name]() for name in turned})
    return {name: statistics.median(s[name] / s["untouched"] for s in seconds[2:]) for name in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'blocks':>6}  {'model':9}  step time / untouched")
    for depth in (4, 16):
        for name, ratio in measure(depth, options.rounds).items():
            rows.append({"depth": depth, "model": name, "step_time_ratio": ratio})
            print(f"{depth:6}  {name:9}  {ratio:.3f}")
    print(json.dumps(machine()))
    if options.json:
        about = {"threads": options.threads, "rounds": options.rounds}
        write_json(options.json, {"rows": rows, **about, "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
