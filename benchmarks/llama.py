"""Training speed of our model against Transformers' Llama of the same size, under the same Trainer, in turns.

    python benchmarks/llama.py [--rounds 10] [--steps 10] [--threads 1] [--json FILE]

Prints tokens per second (medians over all steps but each turn's first) and the ratio ours / Llama's. Other work on
the machine hits both, since they take turns of a few seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from spannorm.files import write_json
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.train.engine import Engine, arguments
from spannorm.train.environment import machine, versions
from spannorm.train.recipe import TrainRecipe

SIZES = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
BATCH, LENGTH = 4, 128


class Timer(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def build(name: str, depth: int) -> torch.nn.Module:
    sizes = {**SIZES, "num_hidden_layers": depth, "max_position_embeddings": LENGTH}
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return SpanNormForCausalLM(SpanNormConfig(placement=name, **sizes))


def measure(models: dict[str, torch.nn.Module], rounds: int, steps: int) -> dict[str, float]:
    """Median tokens per second of each model, trained in turns."""
    ids = torch.randint(0, 256, (steps * BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    recipe = TrainRecipe(steps=steps, batch_size=BATCH, warmup_steps=1, checkpoint_every=10**9)
    timers = {name: Timer() for name in models}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, model in models.items():
                args = arguments(recipe, Path(folder))
                args.save_strategy = "no"
                engine = Engine(model, args, recipe=recipe, train_dataset=data, callbacks=[timers[name]])
                engine.remove_callback(PrinterCallback)
                done = len(timers[name].seconds)
                engine.train()
                del timers[name].seconds[done]
    return {name: BATCH * LENGTH / statistics.median(timer.seconds) for name, timer in timers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'blocks':>6}  {'model':6}  {'tokens/s':>9}  ours / Llama")
    for depth in (4, 32):
        models = {name: build(name, depth) for name in ("llama", "pre", "post", "span")}
        speeds = measure(models, options.rounds, options.steps)
        for name, speed in speeds.items():
            rows.append({"depth": depth, "model": name, "tokens_per_second": speed, "ratio": speed / speeds["llama"]})
            print(f"{depth:6}  {name:6}  {speed:9,.0f}  {speed / speeds['llama']:.3f}")
    about = {"threads": options.threads, "rounds": options.rounds, "steps": options.steps}
    print(json.dumps(machine()))
    if options.json:
        write_json(options.json, {"rows": rows, **about, "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
