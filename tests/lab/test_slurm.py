"""Jobs of a comparison through submitit: found again, submitted again, and no run loses more than a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from one_node import missing, one_node

from spannorm.errors import InputError
from spannorm.lab.compare import compare
from spannorm.lab.jobs import slurm
from spannorm.lab.jobs.slurm import Cluster, Submitted, Work, cluster, sbatch_text
from spannorm.train.recipe import CompareRecipe, Recipe

submitit = pytest.importorskip("submitit")

SETTINGS = {"partition": "gpu", "time": 240, "gpus_per_node": 1, "array_parallelism": 4}


def losses(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Every job's training losses by step, as they stand in the end."""
    found = {}
    for path in sorted(out.glob("jobs/*/records.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [(row["step"], row["loss"]) for row in rows]
    return found


def test_a_dry_run_says_what_would_be_submitted(tmp_path: Path) -> None:
    text = sbatch_text(tmp_path, ["python -m spannorm train a", "python -m spannorm train b"], SETTINGS)
    for line in ("--partition=gpu", "--time=240", "--gpus-per-node=1", "--array=0-1%2", "--signal=USR2@90"):
        assert f"#SBATCH {line}" in text
    assert "# task 1: python -m spannorm train b --worker" in text


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="no '='"):
        slurm.parse_settings(["partition"])
    with pytest.raises(InputError, match="partitoin"):
        sbatch_text(Path("."), ["a"], {"partitoin": "gpu"})
    with pytest.raises(InputError, match="slurm"):
        cluster("slrum", Path("."), ())
    with pytest.raises(InputError, match="--on slurm"):
        cluster("here", Path("."), ["partition=gpu"])
    assert cluster("here", Path("."), ()) is None


class Scheduler:
    """A scheduler that a test commands: its jobs are numbers, and end when they are told to."""

    def __init__(self, folder: Path) -> None:
        self.submitted, self.gone, self.folder = 0, set(), folder

    def submit(self, work: Work) -> SimpleNamespace:
        self.submitted += 1
        return self.job_class(self.folder, str(self.submitted))

    def job_class(self, folder: Path, job_id: str) -> SimpleNamespace:
        result = Path(folder) / f"{job_id}.pkl"
        done = lambda: job_id in self.gone  # noqa: E731
        paths = SimpleNamespace(result_pickle=result)
        return SimpleNamespace(job_id=job_id, done=done, paths=paths, result=lambda: int(result.read_text()))

    def end(self, code: int | None = None) -> None:
        if code is not None:
            (self.folder / f"{self.submitted}.pkl").write_text(str(code))
        self.gone.add(str(self.submitted))


def a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Scheduler, Submitted]:
    monkeypatch.setattr(slurm, "GRACE", 0.0)
    scheduler = Scheduler(tmp_path)
    (tmp_path / "run").mkdir()
    job = Submitted(Cluster(tmp_path, {}, scheduler), ["true"], tmp_path / "run")
    job.submit()
    return scheduler, job


def test_a_lost_job_is_submitted_again_and_as_often_as_it_got_further(tmp_path: Path, monkeypatch) -> None:
    scheduler, job = a_job(tmp_path, monkeypatch)
    for step in range(1, 9):
        assert job.poll() is None and scheduler.submitted == step
        (job.folder / f"checkpoint-{10 * step}").mkdir()
        scheduler.end()
        assert job.poll() is None, "lost, and back in the queue"
    assert json.loads((tmp_path / "tickets" / "run.json").read_text())["job"] == "9"
    (job.folder / "result.json").write_text("{}")
    assert job.poll() == 0


def test_one_that_gets_no_further_ends_and_so_does_one_at_fault_itself(tmp_path: Path, monkeypatch) -> None:
    scheduler, job = a_job(tmp_path, monkeypatch)
    for _ in range(slurm.PATIENCE - 1):
        scheduler.end(75)
        assert job.poll() is None
    scheduler.end(75)
    assert job.poll() == 75 and scheduler.submitted == slurm.PATIENCE
    (tmp_path / "again").mkdir()
    scheduler, job = a_job(tmp_path / "again", monkeypatch)
    scheduler.end(slurm.REFUSED)
    assert job.poll() == slurm.REFUSED and scheduler.submitted == 1


def test_work_saves_before_it_is_queued_again(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(75)))"
    )
    work = Work([sys.executable, "-c", f"{code}\nprint('up', flush=True)\ntime.sleep(60)"], str(tmp_path / "log"))
    before = signal.signal(signal.SIGALRM, lambda *_: again.append(work.checkpoint()))
    again: list = []
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    assert work() == 75 and (tmp_path / "log").read_text() == "up\nsaved\n"
    signal.signal(signal.SIGALRM, before)
    assert again[0].function.command == work.command and again[0].function.process is None


@pytest.fixture(scope="module")
def comparison(recipe: Recipe) -> Recipe:
    t = replace(recipe.train, steps=20, checkpoint_every=5, probe_every=20)
    arms = ({"model.placement": "pre"}, {"model.placement": "span"})
    return replace(recipe, train=t, compare=CompareRecipe(arms=arms))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # submitit lets go of a local job's process before it has ended
def test_a_comparison_through_submitit_has_all_its_results(comparison: Recipe, tmp_path: Path) -> None:
    short = replace(comparison, train=replace(comparison.train, steps=5, probe_every=5))
    pool = Cluster(tmp_path / "slurm", {"array_parallelism": 2}, submitit.LocalExecutor(tmp_path / "slurm"))
    results = compare(short, tmp_path, pool=pool)
    assert results["complete"] and [arm["steps_done"] for arm in results["jobs"]] == [5, 5]
    assert [len(rows) for rows in losses(tmp_path).values()] == [5, 5]


RECIPE_STEPS, EVERY = 400, 50


def command(out: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "spannorm", "compare", str(out.parent / "recipe.yaml"), "--out", str(out)]
    return [*words, "--on", "slurm", "--slurm", "time=30", "--slurm", "cpus_per_task=1", *more]


def until(what, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "the cluster does not get there"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_faults_of_a_real_slurm_lose_no_more_than_a_checkpoint(comparison: Recipe, tmp_path: Path) -> None:
    """A run of 400 steps with a checkpoint every 50, one for each fault: it goes on and ends as if nothing had been."""
    t = replace(comparison.train, steps=RECIPE_STEPS, checkpoint_every=EVERY, probe_every=RECIPE_STEPS, batch_size=32)
    recipe = replace(comparison, train=t, compare=CompareRecipe(arms=({"model.placement": "span"},)))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(recipe.to_dict()))))
    compare(recipe, tmp_path / "here")
    (expected,) = losses(tmp_path / "here").values()

    def step(out: Path) -> int:
        (name,) = losses(tmp_path / "here")
        path = out / "jobs" / name / "records.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        return json.loads(lines[-1])["step"] if lines else 0

    with one_node(tmp_path / "cluster") as node:

        def fault(name: str, hit) -> None:
            out = tmp_path / name
            watcher = subprocess.Popen(command(out), env=node.environment, stdout=subprocess.DEVNULL)
            until(lambda: step(out) > 2 * EVERY)
            reached, seen = step(out), []
            watcher = hit(watcher, out) or watcher
            until(lambda: bool(seen.append(step(out)) or watcher.poll() is not None), 500)
            assert watcher.wait() == 0, (out / "jobs").glob("*/log.txt")
            (rows,) = losses(out).values()
            assert rows == expected, "bit for bit"
            again = max(before - after for before, after in zip([reached, *seen], seen, strict=False))
            print(f"{name:28} at step {reached:3}: {max(again, 0):3} steps done twice")
            assert again <= EVERY

        def queue() -> list[str]:
            return node.ask("squeue", "--noheader", "--array", "--format=%A").split()

        def preempted(watcher, out) -> None:
            node.ask("sbatch", "--partition=high", "--exclusive", "--time=1", "--output=/dev/null", "--wrap", "sleep 5")

        def killed_watcher(watcher, out):
            watcher.send_signal(signal.SIGKILL)
            watcher.wait()
            jobs = queue()
            again = subprocess.Popen(command(out), env=node.environment, stdout=subprocess.DEVNULL)
            time.sleep(8)
            assert queue() == jobs, "found, not submitted twice"
            return again

        def lost_node(watcher, out) -> None:
            node.kill("slurmd")
            os.system(f"kill -9 {' '.join(workers(out))}")
            time.sleep(1)
            node.start("slurmd")

        def controller(watcher, out) -> None:
            node.kill("slurmctld")
            time.sleep(3)
            node.start("slurmctld")

        fault("cancelled by hand", lambda watcher, out: node.ask("scancel", *queue()) and None)
        fault("preempted and queued again", preempted)
        fault("coordinator killed", killed_watcher)
        fault("controller restarted", controller)
        fault("node lost", lost_node)
        fault("signal of the time limit", lambda watcher, out: node.ask("scancel", "--signal=USR2", *queue()) and None)


def workers(out: Path) -> list[str]:
    """The processes of a job on this node."""
    found = subprocess.run(["pgrep", "-f", f"{out}/"], capture_output=True, text=True, check=False).stdout.split()
    return [pid for pid in found if "compare" not in Path(f"/proc/{pid}/cmdline").read_text()]
