"""Checkpoints that are complete, or not used. When all files are written, a seal with their hashes is added.

`checkpoints.json` lists the checkpoints that the run has begun to write. Only these are ever removed. A copy of a
checkpoint, or another run's checkpoint, stays.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
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
from spannorm.models.checkpoint import RENAMED
from spannorm.train.processes import is_first, wait_for_all

logger = logging.getLogger("spannorm")

SEAL = "complete.json"
LIST = "checkpoints.json"
KEPT = 2
"""Checkpoints of a run that stay on disk."""
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "architectures", "use_cache")
"""Keys of a configuration that may differ between a run and its checkpoint: Trainer turns the cache off."""
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")


class Sealer(TrainerCallback):
    """Writes the seal as the last file of every checkpoint, and removes the run's older ones."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        wait_for_all()  # each process writes files of its own
        if is_first():
            folder = Path(str(args.output_dir))
            seal(folder / f"checkpoint-{state.global_step}")
            rotate(folder, every=args.save_steps)


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as complete: its step, and the size and SHA-256 of each of its files."""
    (checkpoint / "training_args.bin").unlink(missing_ok=True)  # Trainer's, a pickle that is never read
    files = {name: fingerprint(checkpoint / name) for name in files_of(checkpoint)}
    write_json(checkpoint / SEAL, {"step": step_of(checkpoint), "files": files})


def begin(checkpoint: Path) -> None:
    """List a checkpoint that is about to be written.

    Raises:
        InputError: a folder that this run did not write, or a symbolic link, is in its place.
    """
    names = listed(checkpoint.parent)
    if os.path.lexists(checkpoint) and (checkpoint.name not in names or checkpoint.is_symlink()):
        raise InputError(f"{checkpoint} is in the way and was not written by this run: move it to another place.")
    if checkpoint.name not in names:
        write_json(checkpoint.parent / LIST, {"checkpoints": [*names, checkpoint.name]})


def listed(folder: Path) -> list[str]:
    """The names of the checkpoints that the run has begun to write and not removed."""
    if not (folder / LIST).is_file():
        return []
    names = read_json(folder / LIST, {"checkpoints": [str]})["checkpoints"]
    return [name for name in dict.fromkeys(names) if _NAME.fullmatch(name)]


def rotate(folder: Path, keep: int = KEPT, every: float = math.inf) -> None:
    """Remove the run's own sealed checkpoints except the latest. Their steps decide, because a clock may be wrong.

    Args:
        every: the latest whose step is a multiple of this stays too: a rollback returns to it.
    """
    names = listed(folder)
    sealed = sorted((folder / name for name in names if _sealed(folder / name)), key=step_of, reverse=True)
    regular = next((checkpoint for checkpoint in sealed if step_of(checkpoint) % every == 0), None)
    _remove(folder, [checkpoint for checkpoint in sealed[keep:] if checkpoint != regular])


def last_regular(folder: Path, every: float) -> Path | None:
    """As `last_complete`, of the checkpoints whose step is a multiple of `every`. Those that a stop wrote are removed:
    with them, a run that was stopped would return to another step than one that was not."""
    _remove(folder, [path for name in listed(folder) if step_of(path := folder / name) % every])
    return last_complete(folder)


def _sealed(checkpoint: Path) -> bool:
    return not checkpoint.is_symlink() and (checkpoint / SEAL).is_file()


def _from_before(checkpoint: Path) -> bool:
    """Whether an unlisted checkpoint may be the run's all the same: there was no list, or no step in the seal, yet."""
    try:
        step = read_json(checkpoint / SEAL, {"step?": int}).get("step")
    except InputError:
        return True
    return step is None or (step == step_of(checkpoint) and not (checkpoint.parent / LIST).is_file())


def _remove(folder: Path, checkpoints: Iterable[Path]) -> None:
    """Remove listed checkpoints; one that a kill leaves in part stays listed, and is removed at the next start."""
    names = listed(folder)
    gone = [path.name for path in checkpoints if path.name in names and not path.is_symlink()]
    for name in gone:
        shutil.rmtree(folder / name, ignore_errors=True)
    if gone:
        left = [name for name in names if name not in gone or (folder / name).exists()]
        write_json(folder / LIST, {"checkpoints": left})


def files_of(checkpoint: Path) -> list[str]:
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    return [path.relative_to(checkpoint).as_posix() for path in paths]


def fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def damage(checkpoint: Path) -> str | None:
    """What changed in a sealed checkpoint, with the name of the file; None if nothing did."""
    try:
        sealed = read_json(checkpoint / SEAL, {"files": {str: {"bytes": int, "sha256": str}}})["files"]
    except InputError:
        return f"{checkpoint / SEAL} is not readable"
    for name in sorted({*sealed, *files_of(checkpoint)}):
        path = checkpoint / name
        if name not in sealed:
            return f"{path} was added"
        if not path.is_file():
            return f"{path} is missing"
        here, then = fingerprint(path), sealed[name]
        if here["bytes"] != then["bytes"]:
            return f"{path} holds {here['bytes']} of {then['bytes']} bytes"
        if here["sha256"] != then["sha256"]:
            return f"{path} was altered"
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_complete(folder: Path) -> Path | None:
    """The latest undamaged checkpoint of a run. Later ones that are incomplete or damaged are removed.

    A checkpoint from a version without a list is read, and not removed.

    Raises:
        InputError: there are sealed checkpoints, and every one is damaged.
    """
    names = listed(folder)
    unlisted = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.name not in names]
    names += [path.name for path in unlisted if _sealed(path) and _from_before(path)]
    there = [folder / name for name in names if (folder / name).is_dir() and not (folder / name).is_symlink()]
    _remove(folder, [checkpoint for checkpoint in there if not _sealed(checkpoint)])
    damaged: dict[Path, str] = {}
    for checkpoint in sorted(filter(_sealed, there), key=step_of, reverse=True):
        wrong = damage(checkpoint)
        if wrong is None:
            for why in damaged.values():
                logger.warning("%s: going on from %s.", why, checkpoint.name)
            _remove(folder, damaged)
            return checkpoint
        damaged[checkpoint] = wrong
    if damaged:
        raise InputError(
            f"no checkpoint in {folder} is sound: {'; '.join(damaged.values())}. Delete them to begin anew."
        )
    return None


def check_way(folder: Path, after: int, every: int, last: int) -> None:
    """Refuse, before training starts, files in the place of a future checkpoint (of a step after `after`)."""
    names = listed(folder)
    for path in folder.glob("checkpoint-*"):
        if _NAME.fullmatch(path.name) and path.name not in names:
            step = step_of(path)
            if after < step <= last and (step % every == 0 or step == last):
                raise InputError(
                    f"{path} is in the way of a checkpoint to come and was not written by this run: move it to "
                    "another place."
                )


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
    """Refuse a checkpoint whose model differs from `config`.

    Raises:
        InputError: names every key that differs, with both values; or the parameters have the names of version 0.1.
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
