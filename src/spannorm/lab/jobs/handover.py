"""Finished runs from another machine or an earlier day: taken over by what they are, so that none is made twice.

A run is the same as another when its recipe (its name and where its text lies aside), its precision, the hash of its
tokens, their vocabulary and `RUNS_SINCE` are the same. What code of the user's own does (`--import`) is not looked at.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spannorm import folders
from spannorm.errors import InputError
from spannorm.files import make_folder, read_json, write_json, writing_to
from spannorm.folders import own_folder
from spannorm.lab.jobs.plan import Done, Job
from spannorm.train.data import TokenData
from spannorm.train.engine import precision_of
from spannorm.train.environment import RUNS_SINCE
from spannorm.train.recipe import DataRecipe
from spannorm.train.recorder import PROBES, RECORDS
from spannorm.train.run import RESULT, RESULT_SHAPE, RUN, run_recipe

_RUN_SHAPE = {
    **folders.RUN.shape, "versions": {"spannorm": str}, "runs_since?": str, "machine": dict,  # type: ignore[dict-item]
    "data": {"sha256": str, "vocab_size": int},
}  # fmt: skip
FORMAT = 1
"""Of the file that `merge` writes; a file without the number is of format 1 too."""
_SHAPE = {"format?": int, "finished": [{"run": _RUN_SHAPE, "result": RESULT_SHAPE}]}


@dataclass(frozen=True)
class Finished:
    """A run that has its result."""

    run: dict[str, Any]
    """What its `run.json` holds."""
    result: dict[str, Any]
    """What its `result.json` holds."""
    source: Path
    """The file it was read from, or its own folder, which has its records too."""

    @property
    def identity(self) -> str:
        since = self.run.get("runs_since") or self.run["versions"]["spannorm"]  # 0.1.0 wrote its version alone
        recipe, precision = self.run["recipe"], self.result.get("precision", "fp32")
        return identity(recipe, self.run["data"]["sha256"], since, precision, self.run["data"]["vocab_size"])


def identity(recipe: Mapping[str, Any], tokens_sha256: str, runs_since: str, precision: str, vocab_size: int) -> str:
    """A hash of all that decides how a run ends, but for the machine's rounding.

    Args:
        recipe: of one run (`run_recipe`). Its tokens stand for its `data`, and its name is free.
        runs_since: `RUNS_SINCE` of the code that ran it.
        precision: `fp32` or `bf16`: what the recipe's `auto` came to.
        vocab_size: of the tokenizer.
    """
    decides = {key: value for key, value in recipe.items() if key not in ("name", "data")}
    decides["train"] = {key: value for key, value in decides["train"].items() if key != "precision"}
    rest = [tokens_sha256, runs_since, precision, vocab_size]
    return hashlib.sha256(json.dumps([decides, *rest], sort_keys=True).encode()).hexdigest()


def read_finished(path: Path) -> list[Finished]:
    """The finished runs of a comparison's folder, or of a file that `merge` wrote.

    Raises:
        InputError: there is none, or a file is not as it was written.
    """
    if path.is_file():
        merged = read_json(path, _SHAPE)
        if merged.get("format", FORMAT) != FORMAT:
            raise InputError(
                f"{path} has format {merged['format']}, and this version of spannorm reads {FORMAT}: update it."
            )
        return [Finished(run["run"], run["result"], path) for run in merged["finished"]]
    runs = [
        Finished(read_json(folder / RUN, _RUN_SHAPE), read_json(folder / RESULT, RESULT_SHAPE), folder)
        for folder in sorted(path.glob("jobs/*"))
        if (folder / RUN).is_file() and (folder / RESULT).is_file()
    ]
    if not runs:
        raise InputError(
            f"{path} has no finished run: give a comparison's folder (with jobs/), or a file that `spannorm results "
            "merge` wrote."
        )
    return runs


def merge(paths: Iterable[Path], out: Path) -> tuple[int, int]:
    """Write the finished runs of several folders or files as one file; of equal runs the first.

    Returns how many are in it, and how many were equal to one of them.
    """
    read = [run for path in paths for run in read_finished(path)]
    first = _first_of_each(read)
    kept = [{"run": run.run, "result": run.result} for _, run in sorted(first.items())]
    make_folder(out.parent)
    with writing_to(out.parent):
        write_json(out, {"format": FORMAT, "finished": kept})
    return len(kept), len(read) - len(kept)


def _first_of_each(runs: Iterable[Finished]) -> dict[str, Finished]:
    """By identity; of equal runs the first."""
    first: dict[str, Finished] = {}
    for run in runs:
        first.setdefault(run.identity, run)
    return first


def handed_over(
    plan: Callable[[Done], list[Job]], paths: Sequence[Path], tokens: Mapping[DataRecipe, TokenData], out: Path
) -> Callable[[Done], list[Job]]:
    """A planner that puts the result of every job that was finished elsewhere into the comparison's folder.

    A job that was begun here goes on here. The result says where it is from, under `taken_from`.

    Args:
        paths: folders or files, as `read_finished` takes them; of equal runs the first is taken.
        out: the comparison's folder.
    """
    known = _first_of_each(run for path in paths for run in read_finished(path))

    def jobs(done: Done) -> list[Job]:
        planned = plan(done)
        for job in planned:
            folder = out / "jobs" / job.name
            if job.name in done or (folder / RUN).exists():
                continue
            data, precision = tokens[job.recipe.data], precision_of(job.recipe.train)
            same = identity(run_recipe(job.recipe), data.sha256, RUNS_SINCE, precision, data.vocab_size)
            if run := known.get(same):
                _take(run, job, folder)
        return planned

    return jobs if known else plan


def _take(run: Finished, job: Job, folder: Path) -> None:
    own_folder(folder.parent)
    own_folder(folder)
    write_json(folder / RUN, run.run | {"recipe": run_recipe(job.recipe)})
    if run.source.is_dir():
        for name in (RECORDS, PROBES):
            if (run.source / name).is_file():
                shutil.copyfile(run.source / name, folder / name)
    origin = {key: run.run["machine"].get(key) for key in ("processor", "device")}
    write_json(folder / RESULT, run.result | {"taken_from": {"source": str(run.source), **origin}})
