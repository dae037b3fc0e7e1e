"""After a spike of the loss, return to the last checkpoint and go on without the sequences before the spike.

As in PaLM (arXiv 2204.02311, §5.1): with the same weights and other data, most spikes do not come again. A run records
what it left out in `rollbacks.jsonl`, one line per rollback: `step` of the spike, `to` which step the run returned, the
`loss` of the spike. The order of the data depends only on that file and the seed. So a run that is killed after a
rollback resumes with the same losses.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spannorm.files import append_json, read_jsonl
from spannorm.train.checkpoints import last_regular, step_of
from spannorm.train.health import WINDOW, spikes
from spannorm.train.processes import any_of, on_first
from spannorm.train.recorder import RECORD, RECORDS

logger = logging.getLogger("spannorm")

ROLLBACKS = "rollbacks.jsonl"
ROLLBACK = {"step": int, "to": int, "loss": float}
ATTEMPTS = 3
"""Rollbacks to one checkpoint. If other data cause spikes too, the weights are the reason, and the run goes on."""


class SpikeGuard(TrainerCallback):
    """At a step whose loss spikes (`spannorm.train.health.spikes`), records a rollback and ends training, unsaved.

    Args:
        folder: the run's folder. Its records are read when training begins or goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.rolled_back = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        before = [r["loss"] for r in read_jsonl(self.folder / RECORDS, RECORD) if r["step"] <= state.global_step]
        self.losses.extend(loss for loss in before if loss is not None)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        loss = logs["loss"] if "grad_norm" in logs else math.nan
        if not math.isfinite(loss):
            return  # `train.on_nan` decides about losses that are not finite
        if any_of(bool(spikes([*self.losses, loss]))) and on_first(
            lambda: self._roll_back(state.global_step, loss, args.save_steps)
        ):
            self.rolled_back, control.should_training_stop, control.should_save = True, True, False
        self.losses.append(loss)

    def _roll_back(self, step: int, loss: float, every: float) -> bool:
        checkpoint = last_regular(self.folder, every)
        to = step_of(checkpoint) if checkpoint else 0
        if [past["to"] for past in read_jsonl(self.folder / ROLLBACKS, ROLLBACK)].count(to) == ATTEMPTS:
            logger.warning("step %d: the loss spikes (%.3f) after %d rollbacks to step %d; the run goes on.",
                           step, loss, ATTEMPTS, to)  # fmt: skip
            return False
        append_json(self.folder / ROLLBACKS, {"step": step, "to": to, "loss": loss})
        logger.warning("step %d: the loss spikes (%.3f); back to step %d, and on without the sequences in between.",
                       step, loss, to)  # fmt: skip
        return True
