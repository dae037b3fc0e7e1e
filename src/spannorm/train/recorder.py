"""The records that a run writes while it trains, and when it stops. Other code reads these files, never the process.

records.jsonl   one line per optimizer step: step, loss, grad_norm, learning_rate, seconds; for a mixture of experts
                also the values in `spannorm.train.health.ROUTING`
probes.jsonl    one line per probe: step and a `spannorm.probes.Record`; for a mixture of experts also `routing`, a
                `RoutingRecord`
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spannorm.errors import Interrupted
from spannorm.files import append_json, jsonl, write_jsonl
from spannorm.train.health import ROUTING
from spannorm.train.processes import any_of, count, is_first
from spannorm.train.ramp import SHARES, Learned

logger = logging.getLogger("spannorm")

RECORDS, PROBES = "records.jsonl", "probes.jsonl"
SKIPS = 8
"""Steps in a row that may be skipped. More would mean that the weights themselves are broken."""


RECORD = {"step": int, "loss": (float, None), "grad_norm": (float, None), "learning_rate": float, "seconds": float}
PROBE = {"step": int, "loss": (float, None)}
"""The least content of a line; see `spannorm.files.checked`."""
PATIENCE = 5.0
"""Seconds that a stop waits for the end of a step."""


def exit_code(stopped_by: int | None) -> int:
    """The command line's exit code: 130 after Ctrl-C, 75 (EX_TEMPFAIL: try again) after a scheduler's signal."""
    return 130 if stopped_by == signal.SIGINT else 75


class Recorder(TrainerCallback):
    """Writes the records, stops on a loss that is not finite, and on a request to stop (Ctrl-C, SIGTERM).

    Args:
        folder: the folder of the records.
        probe: measures the current model.
        probe_every: optimizer steps between probes.
        on_step: called with each record, for a live display.
        stop_with_parent: stop when the process that started this one has ended.
        fetching: whether the next step's sequences are being read. A stop does not wait for that.
        skip_nan: undo the update of a step whose gradient is not finite, instead of stopping at its loss.
    """

    def __init__(
        self,
        folder: Path,
        probe: Callable[[], dict[str, Any]],
        probe_every: int,
        on_step: Callable[[dict[str, Any]], None],
        stop_with_parent: bool = False,
        fetching: Callable[[], bool] = lambda: False,
        skip_nan: bool = False,
    ) -> None:
        self.folder, self.probe, self.probe_every, self.on_step = folder, probe, probe_every, on_step
        self.parent = os.getppid() if stop_with_parent else None
        self.stopped_by: signal.Signals | None = None
        self.fetching, self._asked = fetching, math.inf
        self.stop_requested = False
        self.diverged = False
        self.skip_nan, self._skipped = skip_nan, 0
        self._began = self._seconds = 0.0

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Within the block, Ctrl-C or SIGTERM asks for a stop after the step; a second Ctrl-C is immediate.

        A step that takes longer than `PATIENCE` ends after its forward pass, and reading of sequences is interrupted.
        A second SIGTERM is not immediate, because a scheduler sends one to torchrun and to its processes, and torchrun
        sends one more.
        """

        def ask(number: int, _: Any) -> None:
            self.stopped_by, self._asked = signal.Signals(number), time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, PATIENCE, 1.0)
            if number == signal.SIGINT:
                signal.signal(number, before[signal.SIGINT])

        def wait_no_longer(*_: Any) -> None:
            if self.fetching():
                raise Interrupted(exit_code(self.stopped_by))

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, wait_no_longer)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run repeats the steps after its checkpoint: their earlier records are removed.
        for name in (RECORDS, PROBES) if is_first() else ():
            shape = RECORD if name == RECORDS else PROBE
            there = jsonl(self.folder / name, shape) if state.global_step else ()
            write_jsonl(self.folder / name, (r for r in there if r["step"] <= state.global_step))
        if state.global_step == 0:
            self._probe(0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if count() == 1 and time.monotonic() - self._asked > PATIENCE:
            self.stop_requested = control.should_training_stop = True
            # the weights are those of the last whole step
            checkpoint = self.folder / f"checkpoint-{state.global_step}"
            control.should_save = state.global_step > 0 and not checkpoint.exists()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.skip_nan:
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            self._skipped = 0 if math.isfinite(norm.item()) else self._skipped + 1
            if self._skipped:
                model.zero_grad()  # to None: AdamW then leaves weights and moments as they are

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds = time.perf_counter() - self._began
        orphaned = self.parent is not None and os.getppid() != self.parent
        if any_of(self.stopped_by is not None or orphaned):
            self.stop_requested = control.should_save = control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        # Trainer writes every log into each checkpoint's state file; our records are on disk already.
        state.log_history.clear()
        if "grad_norm" not in logs:
            return
        if self._skipped:  # the engine made it 0; the callbacks after this one read it too
            logs["loss"] = math.nan
        record = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs["grad_norm"],
            "learning_rate": logs["learning_rate"],
            "seconds": round(self._seconds, 6),
            **{name: logs[name] for name in ROUTING if name in logs},
            **({"skipped": True} if self._skipped else {}),
        }
        self._write(RECORDS, record)
        self.on_step(record)
        if self._skipped and is_first():
            logger.warning("step %d: the gradient is not finite; skipped.", state.global_step)
        if self._skipped > SKIPS if self._skipped else not math.isfinite(record["loss"]):
            self.diverged, control.should_training_stop, control.should_save = True, True, False
        elif state.global_step % self.probe_every == 0 or state.global_step == state.max_steps:
            self._probe(state.global_step)

    def _probe(self, step: int) -> None:
        # Every process measures the same batch, because a sharded model must run in all of them.
        self._write(PROBES, {"step": step, **self.probe()})

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if is_first():
            append_json(self.folder / name, record)


class RampEnd(TrainerCallback):
    """Ends a ramp when all that was learned is lost, because later steps add no information."""

    def __init__(self, folder: Path, unigram_loss: float) -> None:
        self.folder, self.learned = folder, Learned(unigram_loss)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        for record in jsonl(self.folder / RECORDS, RECORD):
            if record["step"] <= state.global_step:
                self.learned.lost(record["loss"])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "grad_norm" in logs and self.learned.lost(logs["loss"]) >= max(SHARES):
            control.should_training_stop, control.should_save = True, False
