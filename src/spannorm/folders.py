"""Output folders: one that this package wrote, or a new one. Other people's files are neither overwritten nor removed.

A folder is ours if it holds the file that describes it (such as a run's `run.json`). Without that file, it may hold
only what is written before it. So a folder with other files is refused before anything is changed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from spannorm.errors import InputError
from spannorm.files import read_json, writing_to

_OWN = re.compile(r"\.lock|\.writable-\d+|\..+\.\d+\.new|\..+\.[0-9a-f]{32}\.partial")
"""Hidden names that this package uses: the lock, and half-written files of a killed process."""


@dataclass(frozen=True)
class Kind:
    """What the package writes into one kind of output folder."""

    name: str
    mark: str
    """The file that describes the folder. Where it is, the folder is ours."""
    shape: object
    """The content of that file; see `spannorm.files.checked`."""
    writes: tuple[str, ...]
    """Further names that are written. A symbolic link in their place is refused, because it would lead elsewhere."""
    first: tuple[str, ...] = ()
    """Names that may exist before the mark."""


RUN = Kind(
    "a run",
    "run.json",
    {"recipe": dict, "data": {"sha256": str}},
    ("records.jsonl", "probes.jsonl", "rollbacks.jsonl", "checkpoints.json", "model", "tensorboard", "result.json"),
    ("data", "recipe.yaml", "log.txt"),  # the last two from the comparison that the run is a job of
)
COMPARISON = Kind(
    "a comparison",
    "comparison.json",
    {"recipe": dict},
    ("jobs", "results.json", "report.html", "figures"),
    ("data", "slurm"),
)
EVALUATION = Kind("an evaluation", "results.json", {"model": str, "tasks": dict}, ())
_KINDS = (RUN, COMPARISON, EVALUATION)


def claim(folder: Path, kind: Kind) -> bool:
    """Whether the folder was begun as one of this kind; False if it is new. Nothing is written.

    Raises:
        InputError: it is a file, holds something else, or has a symbolic link where the package would write.
    """
    with writing_to(folder):
        return _claimed(folder, kind)


def _claimed(folder: Path, kind: Kind) -> bool:
    if not folder.exists():
        if folder.is_symlink():
            raise InputError(f"{folder} is a symbolic link to nothing: choose another --out folder.")
        return False
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: choose another --out folder.")
    begun = (folder / kind.mark).is_file()
    if begun:
        read_json(folder / kind.mark, kind.shape)
    else:
        names = [path.name for path in sorted(folder.iterdir()) if not _OWN.fullmatch(path.name)]
        strange = [name for name in names if name not in kind.first]
        if strange:
            other = next((k.name for k in _KINDS if k is not kind and k.mark in strange), "something else")
            other = "a single run" if other == "a run" else other
            shown = ", ".join(strange[:5]) + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
            raise InputError(f"{folder} already holds {other} ({shown}): choose another, or an empty, --out folder.")
    for name in (kind.mark, *kind.writes, *kind.first):
        if (folder / name).is_symlink() and not (name == "data" and (folder / name).is_dir()):
            raise InputError(
                f"{folder / name} is a symbolic link, and what is written there would land elsewhere: put a real file "
                "or folder in its place, or choose another --out folder."
            )
    return begun


def own_folder(path: Path) -> Path:
    """A folder inside an output folder, made if it is missing. A symbolic link or a file in its place is refused."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path} must be a folder, and is a file or a symbolic link: move it away.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def sweep(folder: Path) -> None:
    """Remove half-written files of killed processes, in a folder in which only this process works."""
    for path in folder.iterdir():
        if path.is_symlink() or not _OWN.fullmatch(path.name) or path.name == ".lock":
            continue
        if path.is_file():
            path.unlink(missing_ok=True)
    sweep_partial(folder)


def sweep_partial(folder: Path) -> None:
    """Remove the half-written folders in `folder` that no running process has locked (`partial_folder`)."""
    for path in folder.glob(".*.partial"):
        if not _OWN.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        with suppress(OSError):  # another process removes it at the same time
            held = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(held)


@contextmanager
def partial_folder(goal: Path) -> Iterator[Path]:
    """A new folder beside `goal`, to be filled and then renamed to it. It is locked as long as this process runs.

    Its name is unique, so that two processes with the same goal do not write into each other's files. If it still
    exists at the end, it is removed.
    """
    while True:
        path = goal.with_name(f".{goal.name[:180]}.{uuid4().hex}.partial")
        path.mkdir()
        held = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                break
        except BlockingIOError:
            pass
        os.close(held)  # another process removed it between the two lines above
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(held)
