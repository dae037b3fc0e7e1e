"""Faults that really happen: what was lost, what is said, and that the run ends as if nothing had been."""

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_fixtures import start, torchrun, write_recipe
from safetensors.torch import load_file

from spannorm.errors import InputError, Stopped
from spannorm.train.checkpoints import SEAL, last_complete, seal
from spannorm.train.data import TokenData
from spannorm.train.engine import Engine
from spannorm.train.recipe import Recipe, recipe_from_dict
from spannorm.train.recorder import Recorder
from spannorm.train.rollback import SpikeGuard
from spannorm.train.run import train
from spannorm.train.sequences import TrainingSequences, Windows


def records(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().split("\n")[:-1]]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    assert records(a) == records(b)
    assert (a / "probes.jsonl").read_text() == (b / "probes.jsonl").read_text()
    left, right = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def often(recipe: Recipe) -> Recipe:
    """Checkpoints so often that half of all moments lie inside one."""
    return replace(recipe, train=replace(recipe.train, checkpoint_every=2))


@pytest.fixture(scope="module")
def finished(often: Recipe, tokens: TokenData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(often, out, data=tokens.directory)
    return out


def child(do: Callable[[], object]) -> int:
    """Run something in a fork of this process; its number."""
    pid = os.fork()
    if pid == 0:
        try:
            do()
        finally:
            os._exit(0)
    return pid


def unsealed(out: Path) -> bool:
    return any(not (c / SEAL).exists() for c in out.glob("checkpoint-*"))


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_like_the_uninterrupted_one(
    often: Recipe, tokens: TokenData, finished: Path, tmp_path: Path, kills: int
) -> None:
    out, draw, inside = tmp_path / "run", random.Random(7), 0
    for kill in range(kills):
        pid = child(lambda: train(often, out, data=tokens.directory))
        until = time.monotonic() + 0.1 + draw.random() * 0.6
        # every other kill falls inside a checkpoint's writing
        while time.monotonic() < until + 30 and (not unsealed(out) if kill % 2 else time.monotonic() < until):
            if (out / "result.json").exists():
                break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        inside += unsealed(out)
        done = len(records(out)) if (out / "records.jsonl").exists() else 0
        sound = last_complete(out)
        assert done - (int(sound.name[11:]) if sound else 0) <= 3, "more than a checkpoint interval is lost"
        if (out / "result.json").exists():
            shutil.rmtree(out)
    assert inside, "no kill fell inside a checkpoint"
    train(often, out, data=tokens.directory)
    assert_same_run(out, finished)


def half_done(finished: Path, out: Path) -> Path:
    """A copy of the finished run as a kill after its last checkpoint would have left it."""
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    shutil.rmtree(out / "model")
    return out


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize("harm", [flip_a_bit, cut, Path.unlink], ids=["flipped", "cut", "gone"])
def test_a_damaged_file_is_named_and_the_last_sound_checkpoint_used(
    often: Recipe, tokens: TokenData, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm, name: str
) -> None:
    out = half_done(finished, tmp_path / "run")
    harm(out / "checkpoint-40" / name)
    with caplog.at_level(logging.WARNING, "spannorm"):
        assert last_complete(out) == out / "checkpoint-38"
    assert str(out / "checkpoint-40" / name) in caplog.text and "going on from checkpoint-38" in caplog.text
    if name == "model.safetensors":
        train(often, out, data=tokens.directory)
        assert_same_run(out, finished)


def test_where_every_checkpoint_is_damaged_the_run_is_not_begun_anew_in_silence(
    often: Recipe, tokens: TokenData, finished: Path, tmp_path: Path
) -> None:
    out = half_done(finished, tmp_path / "run")
    for checkpoint in out.glob("checkpoint-*"):
        flip_a_bit(checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"no checkpoint .* is sound: .*checkpoint-40/model.safetensors was altered"):
        train(often, out, data=tokens.directory)
    assert len(list(out.glob("checkpoint-*"))) == 2, "nothing was thrown away"


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_is_refused_and_never_run(
    often: Recipe, tokens: TokenData, finished: Path, tmp_path: Path, name: str
) -> None:
    out = half_done(finished, tmp_path / "run")
    shutil.rmtree(out / "checkpoint-40")
    torch.save({"state": Evil(tmp_path / "ran")}, out / "checkpoint-38" / name)
    seal(out / "checkpoint-38")
    with pytest.raises(InputError, match=r"checkpoint-38 holds a pickle .* refused"):
        train(often, out, data=tokens.directory)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_holds_no_pickle_that_nobody_reads(finished: Path) -> None:
    left = {path.name for path in (finished / "checkpoint-40").iterdir() if path.suffix in (".pt", ".pth", ".bin")}
    assert left == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}, "each is read with weights_only"


def broken_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The batches of these optimizer steps give a loss that is not a number."""
    sound = Engine.compute_loss

    def compute_loss(self: Engine, model, *args, **kwargs):
        loss = sound(self, model, *args, **kwargs)
        return loss * float("nan") if model.training and self.state.global_step + 1 in steps else loss

    monkeypatch.setattr(Engine, "compute_loss", compute_loss)


def test_a_nan_batch_stops_the_run_and_is_named(
    often: Recipe, tokens: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at(monkeypatch, 7)
    result = train(often, tmp_path / "run", data=tokens.directory)
    assert (result["reason"], result["steps_done"]) == ("non-finite", 7)
    assert not (tmp_path / "run" / "model").exists()


def test_a_nan_batch_is_skipped_where_the_recipe_says_so(
    often: Recipe, tokens: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken_at(monkeypatch, 7, 20)
    skipping = replace(often, train=replace(often.train, on_nan="skip"))
    with caplog.at_level(logging.WARNING, "spannorm"):
        result = train(skipping, tmp_path / "run", data=tokens.directory)
    assert result["status"] == "ok" and result["skipped_steps"] == [7, 20] and "step 7:" in caplog.text
    assert [r["loss"] for r in records(tmp_path / "run") if r.get("skipped")] == [None, None]


def test_a_skipped_step_is_no_loss_of_zero_to_what_watches_the_loss(
    often: Recipe, tokens: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at(monkeypatch, 7)
    seen: list[list[float]] = []
    watched = SpikeGuard.on_log

    def on_log(self: SpikeGuard, *args: Any, **kwargs: Any) -> None:
        watched(self, *args, **kwargs)
        seen.append(list(self.losses))

    monkeypatch.setattr(SpikeGuard, "on_log", on_log)
    skipping = replace(often, train=replace(often.train, on_nan="skip", on_spike="rollback"))
    train(skipping, tmp_path / "run", data=tokens.directory)
    taken = [r["loss"] for r in records(tmp_path / "run") if not r.get("skipped")]
    assert seen[-1] == pytest.approx(taken, abs=1e-12) and 0.0 not in taken


def test_a_skipped_step_leaves_the_weights_as_they_were(
    recipe: Recipe, tokens: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at(monkeypatch, 6)
    t = replace(recipe.train, steps=6, checkpoint_every=5, on_nan="skip", probe_every=99)
    train(replace(recipe, train=t), tmp_path / "run", data=tokens.directory)
    before, after = (load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (5, 6))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_steps_that_are_all_broken_end_the_run(
    often: Recipe, tokens: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at(monkeypatch, *range(5, 41))
    result = train(replace(often, train=replace(often.train, on_nan="skip")), tmp_path / "run", data=tokens.directory)
    assert (result["reason"], result["steps_done"]) == ("non-finite", 13)


def program(recipe: Recipe, tokens: TokenData, out: Path) -> list[object]:
    path = write_recipe(recipe, out.with_suffix(".yaml"))
    return ["-m", "spannorm", "train", path, "--out", out, "--data", tokens.directory]


def wait_for_steps(out: Path, steps: int) -> None:
    until = time.monotonic() + 120
    while not (out / "records.jsonl").is_file() or len(records(out)) < steps:
        assert time.monotonic() < until, "the run did not get going"
        time.sleep(0.005)


def ranks_of(launcher: int) -> list[int]:
    """The processes that torchrun has started, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()

    def rank(pid: str) -> str:
        return re.findall(r"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_text())[0]

    return [int(pid) for pid in sorted(children, key=rank)]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_schedulers_sigterm_saves_and_asks_for_a_requeue(
    recipe: Recipe, tokens: TokenData, finished: Path, tmp_path: Path, processes: int
) -> None:
    out = tmp_path / "run"
    process = start(processes, *program(recipe, tokens, out))
    wait_for_steps(out, 5)
    everyone = [process.pid, *(ranks_of(process.pid) if processes > 1 else ())]
    for pid in everyone:  # as SLURM does: all processes of the step, and torchrun passes its own on
        os.kill(pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert stderr.count("saved. Go on with: spannorm train") == 1
    if processes == 1:
        assert process.returncode == 75
    checkpoint = last_complete(out)
    assert checkpoint is not None and int(checkpoint.name[11:]) == len(records(out)), "no step is lost"
    assert torchrun(processes, *program(recipe, tokens, out)).returncode == 0
    assert len(records(out)) == recipe.train.steps
    if processes == 1:
        assert_same_run(out, finished)


@pytest.mark.parametrize("after", ["run.json", ""])
def test_a_stop_does_not_wait_for_a_step_that_has_not_begun(
    recipe: Recipe, tokens: TokenData, tmp_path: Path, after: str
) -> None:
    out = tmp_path / "run"
    endless = replace(recipe, train=replace(recipe.train, accumulation=10**6))
    process = start(1, *program(endless, tokens, out))
    until = time.monotonic() + 120
    while not (out / after if after else out.with_suffix(".yaml")).exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    time.sleep(3)
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in ((75,) if after else (75, -signal.SIGTERM)), stderr  # before Python listens
    assert "Traceback" not in stderr


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def together(
    request: pytest.FixtureRequest, often: Recipe, tokens: TokenData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    """A recipe for two processes, and its run that nothing interrupted."""
    recipe = replace(often, train=replace(often.train, parallel=request.param))
    out = tmp_path_factory.mktemp(request.param) / "run"
    ran = torchrun(2, *program(recipe, tokens, out))
    assert ran.returncode == 0, ran.stderr
    return recipe, out


@pytest.mark.slow
def test_of_several_processes_any_may_be_killed_at_any_moment(
    together: tuple[Recipe, Path], tokens: TokenData, tmp_path: Path
) -> None:
    recipe, uninterrupted = together
    out, draw, inside = tmp_path / "run", random.Random(11), 0
    for kill in range(20):
        done = len(records(out)) if (out / "records.jsonl").exists() else 0
        at = done + draw.randrange(1, 8)
        process = start(2, *program(recipe, tokens, out))
        wait_for_steps(out, min(at, recipe.train.steps))
        ranks = ranks_of(process.pid)
        victims = draw.choice([ranks[:1], ranks[1:], [process.pid, *ranks]])
        until = time.monotonic() + 1
        while kill % 2 and time.monotonic() < until and not unsealed(out):
            pass  # every other kill is aimed at a checkpoint's writing
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
        inside += unsealed(out)
        if (out / "result.json").exists():  # it was done before it was killed
            shutil.rmtree(out)
            continue
        assert process.returncode != 0
        if victims == ranks[1:]:
            assert "another process of this run is gone" in stderr
        sound = last_complete(out)
        assert len(records(out)) - (int(sound.name[11:]) if sound else 0) <= 3, "more than an interval is lost"
    assert inside, "no kill fell inside a checkpoint"
    assert torchrun(2, *program(recipe, tokens, out)).returncode == 0
    assert_same_run(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("together", ["fsdp"], indirect=True)
@pytest.mark.parametrize("harm", [flip_a_bit, cut], ids=["flipped", "cut"])
def test_a_damaged_shard_is_named_and_the_last_sound_checkpoint_used(
    together: tuple[Recipe, Path], tokens: TokenData, tmp_path: Path, harm
) -> None:
    recipe, uninterrupted = together
    out = half_done(uninterrupted, tmp_path / "run")
    shard = max((out / "checkpoint-40" / "shards").glob("*.safetensors"))
    harm(shard)
    ran = torchrun(2, *program(recipe, tokens, out))
    assert ran.returncode == 0 and str(shard) in ran.stderr and "going on from checkpoint-38" in ran.stderr
    assert_same_run(out, uninterrupted)


ON_A_SMALL_DISK = """
disk=$1 room=$2 small=$3 large=$4; shift 4
mount -t tmpfs -o size=$room none $disk || exit 77
"$@"; echo $?
cp -r $disk/run $small
mount -o remount,size=100m $disk
"$@"; echo $?
cp -r $disk/run $large
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [0.4, 1.2, 1.5, 1.9, 2.4])
def test_on_a_full_disk_a_run_ends_with_one_message_and_goes_on_with_room(
    often: Recipe, tokens: TokenData, finished: Path, tmp_path: Path, checkpoints: float
) -> None:
    """A disk that is full indeed, with room for so many checkpoints: two are kept while a third is written."""
    disk, small, large = (tmp_path / name for name in ("disk", "small", "large"))
    disk.mkdir()
    room = int(checkpoints * sum(path.stat().st_size for path in (finished / "checkpoint-40").iterdir()))
    run = [
        sys.executable,
        *program(often, tokens, tmp_path / "run"),
    ]  # its recipe outside the mount
    run[run.index(tmp_path / "run")] = disk / "run"
    shell = ["unshare", "--user", "--mount", "--map-root-user", "sh", "-c", ON_A_SMALL_DISK, "sh"]
    ran = subprocess.run(
        [str(x) for x in (*shell, disk, room, small, large, *run)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if ran.returncode == 77 or "unshare failed" in ran.stderr:
        pytest.skip(f"this machine lets nobody mount a disk of his own: {ran.stderr.strip()}")
    codes = [line for line in ran.stdout.splitlines() if line.isdigit()]
    assert codes == ["2", "0"], ran.stdout + ran.stderr
    assert ran.stderr.count("error: ") == 1 and "Traceback" not in ran.stderr
    assert "cannot write to" in ran.stderr and "run the same command again" in ran.stderr
    sound = last_complete(small)
    done = len(records(small)) if (small / "records.jsonl").exists() else 0
    assert not (small / "result.json").exists()
    assert done - (int(sound.name[11:]) if sound else 0) <= 3, "more than a checkpoint interval is lost"
    assert_same_run(large, finished)


SPIKE = 150
"""Past the 128 steps that a spike is held against."""


@pytest.fixture(scope="module")
def long(recipe: Recipe) -> Recipe:
    train = replace(recipe.train, steps=160, checkpoint_every=20, probe_every=99, on_spike="rollback")
    return replace(recipe, train=train)


def poisoned(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, tokens: TokenData, *steps: int) -> None:
    """The sequences that these steps would read hold noise instead of text, whenever they are read."""
    t = recipe.train
    per_step = t.batch_size * t.accumulation
    drawn: list[int] = []
    sound = Windows.__getitem__
    with monkeypatch.context() as watched:
        watched.setattr(Windows, "__getitem__", lambda self, index: drawn.append(index))
        sequences = TrainingSequences(tokens, t.sequence_length, 10 * t.steps * per_step, t.seed)
        for step in steps:
            for item in range((step - 1) * per_step, step * per_step):
                sequences[item]

    def noisy(self: Windows, index: int) -> dict[str, torch.Tensor]:
        if self.split != "train" or index not in drawn:
            return sound(self, index)
        draw = torch.Generator().manual_seed(index)
        ids = torch.randint(128, 256, (self.sequence_length,), generator=draw)
        return {"input_ids": ids, "labels": ids.clone()}

    monkeypatch.setattr(Windows, "__getitem__", noisy)


def test_a_spike_is_rolled_back_and_its_sequences_left_out(
    long: Recipe, tokens: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    poisoned(monkeypatch, long, tokens, SPIKE)
    kept = train(replace(long, train=replace(long.train, on_spike="keep")), tmp_path / "kept", data=tokens.directory)
    assert kept["spikes"] and kept["rollbacks"] == []
    with caplog.at_level(logging.WARNING, "spannorm"):
        result = train(long, tmp_path / "run", data=tokens.directory)
    spike = records(tmp_path / "kept")[SPIKE - 1]["loss"]
    assert result["rollbacks"] == [{"step": SPIKE, "to": 140, "loss": spike}]
    assert (result["spikes"], result["steps_done"]) == (0, 160) and f"step {SPIKE}: the loss spikes" in caplog.text
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, 161))
    assert records(tmp_path / "run")[:140] == records(tmp_path / "kept")[:140]

    # Uninterrupted, on data whose steps 141 to 150 were never there.
    monkeypatch.undo()
    there = TrainingSequences.__getitem__
    per_step = long.train.batch_size * long.train.accumulation

    def without(self: TrainingSequences, item: int) -> dict[str, torch.Tensor]:
        self.count = 10**6
        return there(self, item if item < 140 * per_step else item + 10 * per_step)

    monkeypatch.setattr(TrainingSequences, "__getitem__", without)
    train(long, tmp_path / "never", data=tokens.directory)
    assert_same_run(tmp_path / "run", tmp_path / "never")


def test_a_run_that_was_stopped_rolls_back_to_where_an_uninterrupted_one_does(
    long: Recipe, tokens: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, long, tokens, SPIKE)
    train(long, tmp_path / "whole", data=tokens.directory)
    ends, out = Recorder.on_step_end, tmp_path / "run"

    def stopping(at: int) -> Callable[..., None]:
        def on_step_end(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == at:
                self.stopped_by = signal.SIGTERM
            ends(self, args, state, control, **kwargs)

        return on_step_end

    for at in (143, 145, 147):  # more stops than checkpoints that stay
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Recorder, "on_step_end", stopping(at))
            train(long, out, data=tokens.directory)
    result = train(long, out, data=tokens.directory)
    assert [(r["step"], r["to"]) for r in result["rollbacks"]] == [(SPIKE, 140)]
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("again", [2, pytest.param(9, marks=pytest.mark.slow)])
def test_after_a_rollback_a_killed_run_goes_on_as_if_it_had_not_been(
    long: Recipe, tokens: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: int
) -> None:
    # the second spike comes on what the first rollback moved forward
    poisoned(monkeypatch, long, tokens, SPIKE, SPIKE + 10 + 4)
    result = train(long, tmp_path / "whole", data=tokens.directory)
    assert [(r["step"], r["to"]) for r in result["rollbacks"]] == [(150, 140), (154, 140)]
    out, draw = tmp_path / "run", random.Random(3)
    for _ in range(again):
        pid = child(lambda: train(long, out, data=tokens.directory))
        at = draw.randrange(130, 159)
        until = time.monotonic() + 120
        while time.monotonic() < until and not (out / "result.json").exists():
            if (out / "records.jsonl").exists() and len(records(out)) >= at:
                break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    train(long, out, data=tokens.directory)
    assert_same_run(out, tmp_path / "whole")
    assert (out / "rollbacks.jsonl").read_text() == (tmp_path / "whole" / "rollbacks.jsonl").read_text()


def test_where_other_data_spike_too_the_run_goes_on_after_three_attempts(
    long: Recipe, tokens: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, long, tokens, *range(SPIKE, SPIKE + 40))
    result = train(long, tmp_path / "run", data=tokens.directory)
    assert [(r["step"], r["to"]) for r in result["rollbacks"]] == [(150, 140), (141, 140), (141, 140)]
    assert result["spikes"] and result["steps_done"] == 160


def test_a_ramp_is_not_rolled_back() -> None:
    with pytest.raises(InputError, match=r"ramp looks for the rate .* train.on_spike at keep"):
        recipe_from_dict({"train": {"schedule": "ramp", "on_spike": "rollback"}})
