"""Checkpoints that are complete or not used: each is sealed with the fingerprints of its files when all are written."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from spannorm.errors import InputError
from spannorm.files import read_json, write_json
from spannorm.models import SpanNormConfig
from spannorm.models.modeling import RENAMED
from spannorm.train.processes import is_first, wait_for_all

logger = logging.getLogger("spannorm")

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
    """Mark a checkpoint as complete: the size and SHA-256 of each of its files."""
    (checkpoint / "training_args.bin").unlink(missing_ok=True)  # Trainer's, a pickle that nobody reads
    write_json(checkpoint / SEAL, {"files": {name: fingerprint(checkpoint / name) for name in files_of(checkpoint)}})


def files_of(checkpoint: Path) -> list[str]:
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    return [path.relative_to(checkpoint).as_posix() for path in paths]


def fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def damage(checkpoint: Path) -> str | None:
    """What has happened to a sealed checkpoint since, naming the file; None where nothing has."""
    try:
        sealed = {name: (file["bytes"], file["sha256"]) for name, file in read_json(checkpoint / SEAL)["files"].items()}
    except (InputError, KeyError, TypeError, AttributeError):
        return f"{checkpoint / SEAL} is not readable"
    for name in sorted({*sealed, *files_of(checkpoint)}):
        path = checkpoint / name
        if name not in sealed:
            return f"{path} was added"
        if not path.is_file():
            return f"{path} is missing"
        here = fingerprint(path)
        size, digest = sealed[name]
        if here["bytes"] != size:
            return f"{path} holds {here['bytes']} of {size} bytes"
        if here["sha256"] != digest:
            return f"{path} was altered"
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_complete(folder: Path) -> Path | None:
    """The latest sound checkpoint of a run; later ones, cut short by a kill or damaged since, are removed.

    Raises:
        InputError: there are sealed checkpoints, and every one is damaged.
    """
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    damaged: dict[Path, str] = {}
    for checkpoint in sorted(found, key=step_of, reverse=True):
        if not (checkpoint / SEAL).exists():
            shutil.rmtree(checkpoint)
            continue
        wrong = damage(checkpoint)
        if wrong is None:
            for path, why in damaged.items():
                logger.warning("%s: going on from %s.", why, checkpoint.name)
                shutil.rmtree(path)
            return checkpoint
        damaged[checkpoint] = wrong
    if damaged:
        raise InputError(
            f"no checkpoint in {folder} is sound: {'; '.join(damaged.values())}. Delete them to begin anew."
        )
    return None


@contextmanager
def refusing_pickles(checkpoint: Path | None) -> Iterator[None]:
    """Within the block, a file of the checkpoint that is more than tensors and numbers is an `InputError`."""
    try:
        yield
    except UnpicklingError:
        raise InputError(
            f"{checkpoint} holds a pickle that is more than tensors and numbers. It could run code, so it is refused: "
            "delete this checkpoint, and the run goes on from the one before."
        ) from None


def check_config(checkpoint: Path, config: SpanNormConfig) -> None:
    """Refuse a checkpoint whose model is another than `config` describes.

    Raises:
        InputError: names every key that differs, with both values; or the parameters have the names of 0.1.
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
    if (weights := checkpoint / SAFE_WEIGHTS_NAME).exists():
        with safe_open(weights, "pt") as file:
            old = [name for name in file.keys() if any(re.search(pattern, name) for pattern in RENAMED)]  # noqa: SIM118
        if old:
            raise InputError(
                f"{checkpoint} was written by spannorm 0.1, which had other names for some parameters ({old[0]}): its "
                "optimizer state does not fit. Take the weights with spannorm.load, and begin a new run."
            )
