"""Scaling on one machine: the same optimizer step in one process and in several, DDP and FSDP2, in turns.

    python benchmarks/processes.py [--processes 2] [--pairs 5] [--width 256] [--json FILE]

Every process has one thread (a GPU of its own where there are several). Seconds are the median step of whole runs of
`spannorm train`, the first five steps left out; the loss must come out the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from turns import DEVICE, as_dicts, in_turns, table

from spannorm.files import read_json, write_json
from spannorm.train.data import prepare_data
from spannorm.train.environment import machine, versions
from spannorm.train.recipe import DataRecipe

STEPS, FIRST = 25, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--width", type=int, default=2048 if DEVICE == "cuda" else 256)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, recipe, losses = Path(folder, "data"), Path(folder, "recipe.json"), {}
        prepare_data(DataRecipe(), data)
        model = {"hidden_size": o.width, "intermediate_size": 11 * o.width // 4, "num_attention_heads": o.width // 64}
        train = {
            "steps": STEPS,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "evaluation_sequences": 8,
            "threads": 1,
            "checkpoint_every": STEPS,
            "probe_every": STEPS,
        }
        recipe.write_text(json.dumps({"name": "scaling", "model": model | {"num_hidden_layers": 8}, "train": train}))

        def turn(processes: int, parallel: str) -> float:
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
            with tempfile.TemporaryDirectory(dir=folder) as out:
                program = ["-m", "spannorm", "train", recipe, "--out", out, "--data", data]
                changes = ["--set", f"train.parallel={parallel}"]
                # 25 steps may be too few to learn, which the exit code says: the files below tell whether it ran
                subprocess.run(
                    [sys.executable, *launcher, *map(str, program), *changes],
                    env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=False,
                )  # fmt: skip
                lines = [json.loads(line) for line in Path(out, "records.jsonl").read_text().splitlines()]
                losses[processes, parallel] = read_json(Path(out, "result.json"))["val_loss"]
            return statistics.median(line["seconds"] for line in lines[FIRST:])

        n = o.processes
        turns = {f"{n} processes, ddp": lambda: turn(n, "ddp")}
        turns |= {f"{n} processes, fsdp": lambda: turn(n, "fsdp"), "1 process": lambda: turn(1, "ddp")}
        results = in_turns(f"a step of 16 × 128 tokens, 8 blocks of width {o.width}", turns, o.pairs)
    print(table(results))
    spread = max(losses.values()) - min(losses.values())
    print(f"validation losses agree within {spread:.1e}")
    if o.json:
        about = {"pairs": o.pairs, "loss_spread": spread, "machine": machine(), "versions": versions()}
        write_json(o.json, {"results": as_dicts(results), **about})


if __name__ == "__main__":
    main()
