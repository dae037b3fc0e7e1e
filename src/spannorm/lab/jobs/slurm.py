"""A comparison's jobs on a cluster: submitted as arrays through `submitit`, found again, and submitted again when lost.

All a job needs lies in its folder, on a file system that the nodes share. A job that is to end (time limit, preemption)
is asked to save, and Slurm queues it again; one that vanished (lost node, `scancel`) is submitted again by whoever
watches. Either way the run goes on from its last checkpoint. The watcher itself may die: the jobs go on, and the same
command finds them by the numbers noted in `slurm/tickets`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from spannorm.errors import InputError, unknown
from spannorm.files import read_json, write_json
from spannorm.train.run import RESULT

PLACES = ("here", "slurm")
REFUSED = 2
"""The exit code of a run whose recipe or folder is at fault: another try would end alike."""
PATIENCE = 3
"""How often a job may end without a result and without a new checkpoint before it counts as crashed."""
AT_ONCE = 256
GRACE = 5.0
"""Seconds that a shared file system may take to show what a job wrote last."""


@dataclass
class Work:
    """What runs on a node: the command, in a process of its own. submitit pickles it."""

    command: list[str]
    log: str
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __call__(self) -> int:
        with open(self.log, "ab") as log:
            # Slurm's signal reaches every process of the job: this one alone is to act on it
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", 'trap "" USR2; exec "$@"', "sh", *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            while (code := self.process.poll()) is None:
                time.sleep(0.2)
        return code

    def checkpoint(self) -> Any:
        """submitit's handler of the signal before a time limit or a preemption: save, then queue the same again."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None and self.process.returncode is None:
            os.kill(self.process.pid, signal.SIGTERM)
            # not Popen.wait: this handler may have interrupted poll, which holds its lock
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Work(self.command, self.log))


class Cluster:
    """Where jobs go in place of this machine's cores; see `spannorm.lab.jobs.runner.Pool`.

    Args:
        folder: for submitit's own files, on the shared file system.
        settings: Slurm's, by submitit's names: `partition`, `time` (minutes), `gpus_per_node`, `cpus_per_task`, `mem`,
            `account`, `signal_delay_s`, … `array_parallelism` is how many run at once.
        executor: None for Slurm.

    Raises:
        InputError: submitit is missing, this is no Slurm machine, or a setting is unknown.
    """

    farewell = "stopped watching; the jobs go on: run the same command to go on too, `scancel` ends them"

    def __init__(self, folder: Path, settings: Mapping[str, Any], executor: Any = None) -> None:
        self.folder = folder.absolute()
        self._slurm = executor is None
        self.executor = slurm_executor(self.folder, settings) if executor is None else executor
        self.slots: list[dict[str, str]] = [{} for _ in range(int(settings.get("array_parallelism", AT_ONCE)))]
        self._new: list[Submitted] = []
        self._listed: tuple[float, set[str]] = (-1e9, set())

    @contextmanager
    def batch(self) -> Iterator[None]:
        """All that is started inside is submitted as one array."""
        self._new = []
        with self.executor.batch(allow_implicit_submissions=True):
            yield
        for job in self._new:  # an array's numbers are known now
            self.submitted_now(job.job)
            self.note(job)
        self._new = []

    def start(self, command: Sequence[str], folder: Path, slot: Mapping[str, str], log: IO[bytes]) -> Submitted:
        """Submit a job, or find it where it has been submitted already."""
        known = self._find(folder)
        job = Submitted(self, [*command], folder, known)
        if known is None:
            job.submit()
            self._new.append(job)
        return job

    def _find(self, folder: Path) -> Any:
        """The job that a folder's ticket names, if it is still in the queue."""
        if not self._ticket(folder).is_file():
            return None
        ticket = read_json(self._ticket(folder))
        job = self.executor.job_class(folder=ticket["folder"], job_id=ticket["job"])
        return None if self.ended(job) else job

    def _ticket(self, folder: Path) -> Path:
        """Where it stands under which number a job was submitted; its own folder is the run's alone."""
        return self.folder / "tickets" / f"{folder.name}.json"

    def note(self, job: Submitted) -> None:
        """Write a submitted job's number down, for whoever watches next."""
        ticket = self._ticket(job.folder)
        ticket.parent.mkdir(parents=True, exist_ok=True)
        write_json(ticket, {"job": job.job.job_id, "folder": str(self.folder)})

    def ended(self, job: Any) -> bool:
        """Whether a job is no longer in the queue; Slurm is asked every ten seconds, for all jobs at once."""
        if not self._slurm:
            return bool(job.done())
        asked, queued = self._listed
        if time.monotonic() - asked > 10:
            queued = _queue()
            self._listed = time.monotonic(), queued
        return job.job_id not in queued

    def submitted_now(self, job: Any) -> None:
        """Count a new job as queued until Slurm is asked next."""
        self._listed[1].add(job.job_id)


def _queue() -> set[str]:
    """The numbers of this user's jobs that are queued or running, arrays spelled out."""
    wanted = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    for attempt in range(30):  # a controller that restarts does not answer for a while
        asked = subprocess.run(wanted, capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            return set(asked.stdout.split())
        time.sleep(min(2**attempt, 60))
    raise InputError(f"squeue does not answer: {asked.stderr.strip()}")


class Submitted:
    """A job as the runner sees it: like a process."""

    def __init__(self, cluster: Cluster, command: list[str], folder: Path, job: Any = None) -> None:
        self.cluster, self.command, self.folder, self.job = cluster, command, folder, job
        self._tries, self._saved, self._gone = 0, _saved(folder), None

    _gone: float | None

    def submit(self) -> None:
        """Hand the job to the scheduler."""
        self._saved, self._gone = _saved(self.folder), None
        self.job = self.cluster.executor.submit(Work(self.command, str(self.folder / "log.txt")))

    def poll(self) -> int | None:
        """None while it is queued, running, or on its way to be tried again; its exit code otherwise."""
        ended, result = self.cluster.ended(self.job), (self.folder / RESULT).is_file()
        if not ended and not result:
            self._gone = None
            return None
        self._gone = self._gone or time.monotonic()
        if time.monotonic() - self._gone < GRACE and not (ended and result):
            return None
        if result:
            return 0
        code = _exit_code(self.job)
        self._tries = 0 if _saved(self.folder) > self._saved else self._tries + 1
        if code == REFUSED or self._tries >= PATIENCE:
            return 1 if code is None else code
        self.submit()
        self.cluster.submitted_now(self.job)
        self.cluster.note(self)
        return None

    def terminate(self) -> None:
        """Nothing: who stops watching does not stop the jobs."""

    def wait(self) -> None:
        """Nothing."""


def _saved(folder: Path) -> int:
    """The step of a run's last checkpoint."""
    return max((int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*[0-9]")), default=0)


def _exit_code(job: Any) -> int | None:
    """What the command returned; None where the job was lost on the way."""
    if not job.paths.result_pickle.is_file():
        return None
    try:
        return int(job.result())
    except Exception:  # the traceback of a job that failed before its command ran: submitit has logged it
        return None


def slurm_executor(folder: Path, settings: Mapping[str, Any]) -> Any:
    """submitit's executor for Slurm, with our settings."""
    submitit = _submitit()
    if shutil.which("sbatch") is None:
        raise InputError("--on slurm needs sbatch: run it on a machine that can submit, or print jobs with --dry-run.")
    # a long run may meet its time limit often: each time it has saved
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=10_000)
    try:
        executor.update_parameters(**_parameters(settings))
    except ValueError as error:
        raise InputError(f"--slurm: {error}") from None
    return executor


def cluster(on: str, out: Path, words: Sequence[str]) -> Cluster | None:
    """What `--on` names: None for `here`.

    Args:
        words: of `--slurm`.
    """
    if on not in PLACES:
        raise unknown("--on", on, PLACES)
    if on == "here" and words:
        raise InputError("--slurm is for --on slurm.")
    return Cluster(out / "slurm", parse_settings(words)) if on == "slurm" else None


def sbatch_text(folder: Path, commands: Sequence[str], settings: Mapping[str, Any]) -> str:
    """What would be submitted: the batch file of one array, and the command of each of its tasks."""
    _submitit()
    from submitit.slurm.slurm import _make_sbatch_string

    try:
        text = _make_sbatch_string(
            "python -m submitit.core._submit …", folder.absolute(), map_count=len(commands), **_parameters(settings)
        )
    except TypeError as error:
        raise InputError(f"--slurm: {error}") from None
    tasks = [f"# task {i}: {command} --worker" for i, command in enumerate(commands)]
    return "\n".join([text.rstrip(), "", *tasks])


def _parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"job_name": "spannorm", "array_parallelism": AT_ONCE, **settings}


def _submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError:
        raise InputError("--on slurm needs submitit: pip install 'spannorm[slurm]'.") from None
    return submitit


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """`partition=gpu`, `time=240` → settings; whole numbers become numbers."""
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"--slurm takes KEY=VALUE, such as partition=gpu; {word!r} has no '='.")
        settings[key] = int(value) if value.isdigit() else value
    return settings
