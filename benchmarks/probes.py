"""What a probe costs: the time of a training step with `Probe` on, over the same step with it off, in turns.

    python benchmarks/probes.py [--rounds 15] [--threads 1] [--placement span] [--json FILE]

The ratio is the median over rounds of on / off within a round, so that other work on the machine hits both.
`everything` is what `Probe(model)` measures; the other rows leave out the L × L similarity, the ranks, or both.
`measure` is an extra forward and backward pass in evaluation mode, as `spannorm train` makes at each probe.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step import step_of
from turns import timed

from spannorm.files import write_json
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.probes import Probe, measure
from spannorm.train.environment import machine, versions

SHAPES = ((64, 32), (256, 8), (64, 128))
"""(width, blocks)"""
BATCH, LENGTH = 4, 128
PROBES: dict[str, dict[str, bool]] = {
    "bare": {"similarity": False, "rank": False},
    "and similarity": {"rank": False},
    "and rank": {"similarity": False},
    "everything": {},
}


def ratios(placement: str, width: int, depth: int, rounds: int) -> tuple[float, dict[str, float]]:
    """Median seconds of a step without a probe, and each kind of probing over it."""
    config = SpanNormConfig(
        vocab_size=257,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=depth,
        num_attention_heads=4,
        placement=placement,
    )
    model = SpanNormForCausalLM(config).train()
    ids = torch.randint(0, 257, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    bare = step_of(model, ids)

    def step(options: dict[str, bool] | None) -> None:
        with nullcontext() if options is None else Probe(model, **options) as probe:
            bare()
        if probe is not None:
            probe.record()

    kinds: dict[str, Callable[[], Any]] = {"off": lambda: step(None)}
    kinds |= {name: partial(step, options) for name, options in PROBES.items()}
    kinds["measure"] = lambda: measure(model, lambda: model(ids, labels=ids).loss)
    for work in kinds.values():
        work()
    turns = [{name: timed(work)() for name, work in kinds.items()} for _ in range(rounds)]
    return (
        statistics.median(turn["off"] for turn in turns),
        {name: statistics.median(turn[name] / turn["off"] for turn in turns) for name in kinds if name != "off"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--placement", default="span")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print("width  blocks  ms/step  " + "  ".join([*PROBES, "measure"]))
    for width, depth in SHAPES:
        base, found = ratios(options.placement, width, depth, options.rounds)
        rows.append({"width": width, "depth": depth, "seconds_per_step": base, "ratios": found})
        cells = [f"{ratio:{len(name)}.2f}" for name, ratio in found.items()]
        print(f"{width:5}  {depth:6}  {1e3 * base:7.0f}  " + "  ".join(cells))
    about = {"placement": options.placement, "batch": BATCH, "length": LENGTH, "threads": options.threads}
    print(json.dumps(machine()))
    if options.json:
        write_json(options.json, {"rows": rows, **about, "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
