"""Real processes: torchrun on this machine's CPU, over gloo."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from spannorm.train.data import TokenData
from spannorm.train.recipe import Recipe
from spannorm.train.run import train

TOGETHER = Path(__file__).with_name("together.py")


def write_recipe(recipe: Recipe, path: Path) -> Path:
    raw = recipe.to_dict()
    del raw["compare"]
    path.write_text(yaml.safe_dump(raw))
    return path


def start(processes: int, *program: object) -> subprocess.Popen:
    """Start a program under torchrun; in one process, without."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, *map(str, program)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def torchrun(processes: int, *program: object) -> subprocess.CompletedProcess:
    """Run a program to its end."""
    process = start(processes, *program)
    stdout, stderr = process.communicate(timeout=1200)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def train_together(processes: int, runs: Mapping[Path, Recipe], tokens: TokenData) -> None:
    """Train each recipe into its folder, in processes started once for all of them."""
    if processes == 1 and all(recipe.train.parallel == "ddp" for recipe in runs.values()):
        for out, recipe in runs.items():
            train(recipe, out, data=tokens.directory)
        return
    for out in runs:
        out.parent.mkdir(parents=True, exist_ok=True)
    listed = [[str(write_recipe(recipe, out.with_suffix(".yaml"))), str(out)] for out, recipe in runs.items()]
    listing = out.with_suffix(".json")
    listing.write_text(json.dumps(listed))
    done = torchrun(processes, TOGETHER, listing, tokens.directory)
    assert done.returncode == 0, done.stdout + done.stderr
