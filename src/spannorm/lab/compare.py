"""A comparison: arms × grid as independent, resumable jobs, several at once, and their results in one file.

A comparison's folder:

    comparison.json   the recipe
    data/             tokens, shared by all jobs
    jobs/<job>/       one run each (see spannorm.train.run), with log.txt
    results.json      every arm's row, with recipe, versions, machine and data hash
    report.html       drawn from the files above alone
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from spannorm.errors import InputError, Stopped
from spannorm.files import alone_in, make_folder, read_json, write_json, write_text, writing_to
from spannorm.lab.report import draw_report
from spannorm.train.data import TokenData, prepare_data
from spannorm.train.display import Board, Row
from spannorm.train.environment import cores, machine, versions
from spannorm.train.recipe import DataRecipe, Recipe, recipe_from_dict, set_key
from spannorm.train.recorder import RECORDS
from spannorm.train.run import RESULT, differences, model_config, run_recipe

COMPARISON, RESULTS = "comparison.json", "results.json"


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    name: str
    """Its folder: readable, and fixed by what the run depends on."""
    overrides: Mapping[str, Any]
    """How it differs from the recipe, by dotted key."""
    recipe: Recipe
    tables: tuple[str, ...]
    """The tables it stands in."""


def jobs_of(recipe: Recipe) -> list[Job]:
    """Every arm with every combination of the grid, in the order written, each checked.

    Raises:
        InputError: no arms, the same run twice, or an arm that no model can be built from.
    """
    arms, grid = recipe.compare.arms, recipe.compare.grid
    if not arms:
        raise InputError("compare.arms lists no arm: give one mapping per arm, such as {model.placement: span}.")
    jobs: dict[str, Job] = {}
    for arm in arms:
        for values in itertools.product(*grid.values()):
            overrides = {**arm, **dict(zip(grid, values, strict=True))}
            table = str(overrides.pop("table", ""))
            raw = json.loads(json.dumps(run_recipe(recipe)))
            for key, value in overrides.items():
                set_key(raw, key, value)
            job_recipe = recipe_from_dict(raw)
            config = model_config(job_recipe)
            t = job_recipe.train
            digest = hashlib.sha256(json.dumps(run_recipe(job_recipe), sort_keys=True).encode()).hexdigest()[:8]
            words = f"{config.placement}-{config.depth_rule}-lr{t.learning_rate:g}-seed{t.seed}"
            name = re.sub(r"[^\w.+-]+", "_", words.replace("/", "-")) + f"-{digest}"
            tables = jobs[name].tables if name in jobs else ()
            if table in tables:
                raise InputError(f"compare lists the same run twice: {overrides}.")
            jobs[name] = Job(name, overrides, job_recipe, (*tables, table))
    return list(jobs.values())


def compare(recipe: Recipe, out: Path, *, imports: Sequence[Path] = ()) -> dict[str, Any]:
    """Run a comparison, or go on with it, and return what `results.json` holds.

    Args:
        imports: Python files that every job runs first, to register placements of the user's own.

    Several jobs run at once: one per GPU, or as many as the cores carry at `train.threads` each (0: one thread).
    A finished job is never run twice; an interrupted one goes on from its last checkpoint.

    Raises:
        InputError: bad recipe or folder, before any time is spent.
        Stopped: Ctrl-C, after the running jobs have saved.
    """
    jobs = jobs_of(recipe)
    make_folder(out)
    with alone_in(out), writing_to(out):
        _check_same_comparison(recipe, out)
        data = {job.recipe.data: _data_folder(out, job.recipe.data) for job in jobs}
        tokens = {which: prepare_data(which, folder) for which, folder in data.items()}
        for job in jobs:
            model_config(job.recipe, tokens[job.recipe.data])
        write_json(out / COMPARISON, {"recipe": recipe.to_dict()})
        about = _about(recipe, tokens[recipe.data] if recipe.data in tokens else next(iter(tokens.values())))
        runner = _Runner(out, jobs, data, imports)
        try:
            runner.run(
                recipe.name, lambda: write_json(out / RESULTS, {**about, "complete": False, "arms": runner.arms()})
            )
        finally:
            results = {**about, "complete": runner.complete(), "arms": runner.arms()}
            write_json(out / RESULTS, results)
            draw_report(out)
    return results


def _check_same_comparison(recipe: Recipe, out: Path) -> None:
    if (out / COMPARISON).is_file():
        there = read_json(out / COMPARISON)["recipe"]
        different = differences(there, json.loads(json.dumps(recipe.to_dict())))
        if different:
            raise InputError(
                f"{out} already holds another comparison: {'; '.join(different)}. Choose another --out folder."
            )
    elif (out / "run.json").is_file():
        raise InputError(f"{out} already holds a single run: choose another --out folder.")


def _data_folder(out: Path, recipe: DataRecipe) -> Path:
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:8]
    return out / "data" / digest


def _about(recipe: Recipe, tokens: TokenData) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "recipe": recipe.to_dict(),
        "model_config": model_config(recipe, tokens).to_dict(),
        "versions": versions(),
        "machine": machine(),
        "data": {
            "corpus": recipe.data.corpus,
            "sha256": tokens.sha256,
            "corpus_sha256": tokens.corpus_sha256,
            "tokenizer": recipe.data.tokenizer,
            "vocab_size": tokens.vocab_size,
            "training_tokens": tokens.splits["train"].tokens,
        },
    }


class _Runner:
    """Keeps as many jobs going as there are places, and knows how each stands."""

    def __init__(self, out: Path, jobs: list[Job], data: Mapping[DataRecipe, Path], imports: Sequence[Path]) -> None:
        self.out, self.jobs, self.data, self.imports = out, jobs, data, imports
        self.rows = {job.name: Row.of(job.recipe, model_config(job.recipe)) for job in jobs}
        self._read: dict[str, int] = dict.fromkeys(self.rows, 0)
        self._free = _places(jobs[0].recipe.train.threads)
        self._running: dict[str, tuple[subprocess.Popen[bytes], dict[str, str], IO[bytes]]] = {}

    def run(self, title: str, on_finish: Callable[[], None]) -> None:
        """Run all jobs to their end, showing them live; `on_finish` is called whenever one has ended."""
        with Board(title, list(self.rows.values())) as board:
            for job in self.jobs:
                self._follow(job)
            waiting = [job for job in self.jobs if self.rows[job.name].status == "waiting"]
            try:
                while waiting or self._running:
                    while waiting and self._free:
                        self._start(waiting.pop(0))
                    time.sleep(0.25)
                    for job in self.jobs:
                        if job.name in self._running and self._follow(job):
                            on_finish()
                    board.refresh()
            except KeyboardInterrupt:
                self._stop()
                raise Stopped("stopped, every running job saved") from None
            finally:
                board.refresh()

    def _start(self, job: Job) -> None:
        folder = self.out / "jobs" / job.name
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", yaml.safe_dump(run_recipe(job.recipe), sort_keys=False))
        place = self._free.pop(0)
        log = open(folder / "log.txt", "ab")  # noqa: SIM115 — closed when the job has ended
        command = [sys.executable, "-m", "spannorm", "train", str(folder / "recipe.yaml"), "--out", str(folder)]
        command += ["--data", str(self.data[job.recipe.data]), "--worker"]
        command += [word for path in self.imports for word in ("--import", str(path))]
        # Its own process group: Ctrl-C reaches this process alone, which then asks each worker to save and stop.
        process = subprocess.Popen(
            command,
            env={**os.environ, **place},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self._running[job.name] = process, place, log
        self.rows[job.name].status = "running"

    def _follow(self, job: Job) -> bool:
        """Take in what a job has written; True when it has just ended."""
        row, folder = self.rows[job.name], self.out / "jobs" / job.name
        code = self._running[job.name][0].poll() if job.name in self._running else None
        records, self._read[job.name] = _read_from(folder / RECORDS, self._read[job.name])
        if records and records[0]["step"] <= row.step:  # the job was resumed and rewrote its records
            row.restart()
        row.add(records)
        if (folder / RESULT).is_file() and (code is not None or job.name not in self._running):
            result = read_json(folder / RESULT)
            row.status, row.note = result["status"], f"failed: {result['reason']}" if result["reason"] else ""
        elif code is not None:
            row.status, row.note = "failed", f"crashed (exit code {code}), see {folder / 'log.txt'}"
        if code is None:
            return False
        _, place, log = self._running.pop(job.name)
        log.close()
        self._free.append(place)
        return True

    def _stop(self) -> None:
        """Ask the running jobs to save, and wait for them."""
        for process, _, _ in self._running.values():
            process.terminate()
        for name, (process, _, log) in self._running.items():
            process.wait()
            log.close()
            self.rows[name].status = "stopped"
        self._running.clear()

    def complete(self) -> bool:
        """Whether every job has a result, if only that it failed to train."""
        return all((self.out / "jobs" / job.name / RESULT).is_file() for job in self.jobs)

    def arms(self) -> list[dict[str, Any]]:
        """Every job's row of `results.json`: its result, or how far it came."""
        rows = []
        for job in self.jobs:
            path, row = self.out / "jobs" / job.name / RESULT, self.rows[job.name]
            known = {
                "job": job.name,
                "tables": list(job.tables),
                "overrides": dict(job.overrides),
                "placement": row.placement,
                "depth_rule": row.depth_rule,
                "seed": row.seed,
                "learning_rate": row.learning_rate,
                "status": row.status,
                "reason": row.note or None,
                "steps": row.steps,
                "steps_done": row.step,
            }
            rows.append({**known, **read_json(path)} if path.is_file() else known)
        return rows


def _places(threads: int) -> list[dict[str, str]]:
    """The environment of each job that may run at once: a GPU each, or its share of the cores."""
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        return [{"CUDA_VISIBLE_DEVICES": device} for device in devices]
    threads = threads or 1
    return [{"OMP_NUM_THREADS": str(threads)} for _ in range(max(1, cores() // threads))]


def _read_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a JSONL file from an offset on, and where the next read starts."""
    if not path.is_file():
        return [], 0
    if path.stat().st_size < offset:
        offset = 0
    with open(path, "rb") as file:
        file.seek(offset)
        chunk = file.read()
    whole = chunk[: chunk.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole)
