"""Running a comparison's jobs: as many at once as there are slots, each a process of its own that can be killed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any, Protocol

import torch
import yaml

import spannorm
from spannorm.errors import Interrupted, Stopped
from spannorm.files import checked, read_json, write_text
from spannorm.folders import own_folder
from spannorm.lab.jobs.plan import Done, Job
from spannorm.lab.results.files import JobResult
from spannorm.models import SpanNormConfig
from spannorm.train.checkpoints import rotate
from spannorm.train.data import TokenData
from spannorm.train.display import Board, Row
from spannorm.train.environment import cores
from spannorm.train.recipe import DataRecipe
from spannorm.train.recorder import RECORD, RECORDS
from spannorm.train.run import RESULT, RESULT_SHAPE, check_tokens, model_config, run_recipe

Planner = Callable[[Done], list[Job]]


class Started(Protocol):
    """A job under way, as the runner needs it; a process is one."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def wait(self) -> Any: ...


class Pool(Protocol):
    """Where jobs run: this machine's cores or GPUs, or a cluster (spannorm.lab.jobs.slurm)."""

    slots: list[dict[str, str]]
    """One for each job that may run at once: the environment variables that the job is given."""
    farewell: str
    """What Ctrl-C says, once running jobs have been asked to save or left alone."""

    def batch(self) -> AbstractContextManager[None]: ...
    def start(self, command: Sequence[str], folder: Path, slot: Mapping[str, str], log: IO[bytes], /) -> Started: ...


class LocalPool:
    """This machine, for one Runner."""

    farewell = "stopped, every running job saved"

    def __init__(self, slots: list[dict[str, str]]) -> None:
        self.slots = slots

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    def start(self, command: Sequence[str], folder: Path, slot: Mapping[str, str], log: IO[bytes]) -> Started:
        # Its own process group: Ctrl-C reaches this process alone, which then asks each worker to save and stop.
        return subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": _python_path(), **slot},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


class Runner:
    """Runs what a planner asks for, asks again whenever a job has ended, and knows how each stands.

    Args:
        out: the comparison's folder.
        tokens: those of each data section. A finished job on other tokens is an `InputError`.
        imports: files that every job runs first.
        at_once: jobs at a time; 0 means one per GPU, or as many as the cores carry.
        pool: where they run; None means here.
    """

    def __init__(
        self,
        out: Path,
        plan: Planner,
        tokens: Mapping[DataRecipe, TokenData],
        imports: Sequence[Path],
        at_once: int = 0,
        pool: Pool | None = None,
    ) -> None:
        self.out, self.plan, self.tokens, self.imports = out, plan, tokens, imports
        self.jobs: list[Job] = []
        self.rows: dict[str, Row] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self._read: dict[str, int] = {}
        self._configs: dict[str, SpanNormConfig] = {}
        self._running: dict[str, tuple[Started, dict[str, str], IO[bytes]]] = {}
        self.update()
        self.pool = pool or LocalPool(slots(self.jobs[0].recipe.train.threads, at_once))
        self._free = list(self.pool.slots)

    def update(self) -> None:
        """Read what is finished, and plan as far as that allows."""
        known = -1
        while known < len(self.results):
            known = len(self.results)
            self.jobs = self.plan({name: _outcome(result) for name, result in self.results.items()})
            for job in self.jobs:
                if job.name not in self.rows:
                    self.rows[job.name] = Row.of(job.recipe, self._config(job))
                    self._read[job.name] = 0
                    self._follow(job)

    def _config(self, job: Job) -> SpanNormConfig:
        """A job's model, the seed aside: thousands of jobs share a few, and each takes milliseconds."""
        key = json.dumps([job.recipe.model, job.recipe.train.sequence_length])
        if key not in self._configs:
            self._configs[key] = model_config(job.recipe)
        return self._configs[key]

    def run(self, title: str, on_finish: Callable[[], object]) -> None:
        """Run all jobs to their end, showing them live; `on_finish` is called whenever one has ended."""
        with Board(title, list(self.rows.values())) as board:
            try:
                while self._running or self._waiting():
                    if self._free and self._waiting():
                        with self.pool.batch():
                            while self._free and (waiting := self._waiting()):
                                self._start(waiting[0])
                    time.sleep(0.25)
                    ended = [job for job in self.jobs if job.name in self._running and self._follow(job)]
                    if ended:
                        self.update()
                        board.rows = list(self.rows.values())
                        on_finish()
                    board.refresh()
            except (KeyboardInterrupt, Interrupted) as stop:
                self._stop()
                raise Stopped(self.pool.farewell, getattr(stop, "exit_code", 130)) from None
            finally:
                board.refresh()

    def commands(self) -> list[str]:
        """A command for each job that can be run now, with its recipe written."""
        return [shlex.join(self._prepared(job)) for job in self._waiting()]

    def _waiting(self) -> list[Job]:
        return [job for job in self.jobs if self.rows[job.name].status == "waiting"]

    def _prepared(self, job: Job) -> list[str]:
        """Write a job's recipe and return the command that runs it."""
        folder = self.folder(job)
        own_folder(folder.parent)
        own_folder(folder)
        write_text(folder / "recipe.yaml", yaml.safe_dump(run_recipe(job.recipe), sort_keys=False))
        command = [sys.executable, "-P", "-m", "spannorm", "train", str(folder / "recipe.yaml"), "--out", str(folder)]
        command += ["--data", str(self.tokens[job.recipe.data].directory)]
        return command + [word for path in self.imports for word in ("--import", str(path))]

    def folder(self, job: Job) -> Path:
        return self.out / "jobs" / job.name

    def _start(self, job: Job) -> None:
        command = [*self._prepared(job), "--worker"]
        slot = self._free.pop(0)
        # not through a symbolic link; closed when the job has ended
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        log = open(os.open(self.folder(job) / "log.txt", flags, 0o666), "ab")  # noqa: SIM115
        process = self.pool.start(command, self.folder(job), slot, log)
        self._running[job.name] = process, slot, log
        self.rows[job.name].status = "running"

    def _follow(self, job: Job) -> bool:
        """Take in what a job has written; True when it has just ended."""
        row, folder = self.rows[job.name], self.folder(job)
        code = self._running[job.name][0].poll() if job.name in self._running else None
        records, self._read[job.name] = _read_from(folder / RECORDS, self._read[job.name])
        if records and records[0]["step"] <= row.step:  # the job was resumed and rewrote its records
            row.restart()
        row.add(records)
        if (folder / RESULT).is_file() and (code is not None or job.name not in self._running):
            check_tokens(folder, self.tokens[job.recipe.data])
            result = self.results[job.name] = read_json(folder / RESULT, RESULT_SHAPE)
            rotate(folder, keep=0)  # a finished run is only read: hundreds would fill a disk
            row.status, row.note = result["status"], f"failed: {result['reason']}" if result["reason"] else ""
        elif code in (75, 130):  # a scheduler stops every process, and a job has saved
            row.status = "stopped"
        elif code is not None:
            row.status, row.note = "crashed", f"crashed (exit code {code}), see {folder / 'log.txt'}"
        if code is None:
            return False
        _, slot, log = self._running.pop(job.name)
        log.close()
        self._free.append(slot)
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
        return all(job.name in self.results for job in self.jobs)

    def job_results(self) -> list[JobResult]:
        """Every job as `results.json` has it: its result, or how far it came."""
        results = []
        for job in self.jobs:
            row = self.rows[job.name]
            known = {
                "job": job.name,
                "tables": list(job.tables),
                "arm": job.arm,
                "condition": dict(job.condition),
                "stage": job.stage,
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
            results.append({**known, **self.results.get(job.name, {})})
        return results


def _python_path() -> str:
    """Where a worker finds this package. `-P` keeps the current directory out of its search: only what was installed
    or named is imported."""
    package, path = str(Path(spannorm.__file__).parents[1]), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys(filter(None, [*path, package])))


def _outcome(result: Mapping[str, Any]) -> float | None:
    return None if result["status"] == "failed" else result["val_loss"]


def slots(threads: int, at_once: int = 0) -> list[dict[str, str]]:
    """The environment of each job that may run at once: a GPU each, or its share of the cores.

    Args:
        at_once: how many; where there are more than GPUs they share them. 0 means one per GPU or per `threads` cores.
    """
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        return [{"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} for i in range(at_once or len(devices))]
    threads = threads or 1
    return [{"OMP_NUM_THREADS": str(threads)} for _ in range(at_once or max(1, cores() // threads))]


def _read_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a JSONL file from an offset on, and where the next read starts."""
    if not path.is_file():  # nor a pipe, which would never end
        return [], 0
    if path.stat().st_size < offset:
        offset = 0
    with open(path, "rb") as file:
        file.seek(offset)
        chunk = file.read()
    whole = chunk[: chunk.rfind(b"\n") + 1]
    return [record for line in whole.splitlines() if (record := _record(line))], offset + len(whole)


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of a run's records; None of one that somebody changed, which the report counts."""
    try:
        return dict(checked(json.loads(line), RECORD, ""))
    except (ValueError, RecursionError):
        return None
