"""Checkpoints that are complete or not used: each is sealed with the sizes of its files when all are written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spannorm.errors import InputError
from spannorm.files import read_json, write_json
from spannorm.models import SpanNormConfig
from spannorm.train.processes import is_first, wait_for_all

SEAL = "complete.json"
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "architectures", "use_cache")
"""Keys of a configuration that may differ between a run and its checkpoint: Trainer turns the cache off."""


class Sealer(TrainerCallback):
    """Writes the seal as the last file of every checkpoint."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        wait_for_all()  # each process writes files of its own
        if is_first():
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as complete."""
    sizes = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.name != SEAL}
    write_json(checkpoint / SEAL, {"files": sizes})


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its seal and every file is as long as it was."""
    try:
        sizes = read_json(checkpoint / SEAL)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (InputError, OSError, KeyError):
        return False


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_complete(folder: Path) -> Path | None:
    """The latest complete checkpoint of a run; later ones, cut short by a kill, are removed."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(found, key=step_of, reverse=True):
        if is_complete(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def check_config(checkpoint: Path, config: SpanNormConfig) -> None:
    """Refuse a checkpoint whose model is another than `config` describes.

    Raises:
        InputError: names every key that differs, with both values.
    """
    there = SpanNormConfig.from_pretrained(checkpoint).to_dict()
    differs = [
        f"{key} is {there.get(key)!r} there and {value!r} in the recipe"
        for key, value in config.to_dict().items()
        if key not in NOT_THE_MODEL and there.get(key) != value
    ]
    if differs:
        raise InputError(
            f"{checkpoint} holds another model than the recipe's: {'; '.join(differs)}. Choose another --out folder."
        )
