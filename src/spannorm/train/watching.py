"""Per-block norms in any run of Hugging Face's Trainer, through its own log: TensorBoard, wandb, trackio and others."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spannorm.errors import InputError
from spannorm.probes import Watch


class WatchCallback(TrainerCallback):
    """Logs what `spannorm.probes.Watch` measures, every `every` optimizer steps. Training stays bit-identical.

        trainer = Trainer(model, args, train_dataset=data)
        trainer.add_callback(WatchCallback(trainer, every=50))

    Args:
        trainer: its `log` gets the numbers.
        every: optimizer steps between measurements; None means the Trainer's `logging_steps`.
        blocks: path of the list of blocks, from the model; None means to search for it (`Watch`).
        prefix: put before each name.
    """

    def __init__(self, trainer: Any, every: int | None = None, blocks: str | None = None, prefix: str = "watch/"):
        if every is not None and every < 1:
            raise InputError(f"`every` counts optimizer steps and must be at least 1; got {every}.")
        self.trainer, self.every, self.blocks, self.prefix = trainer, every, blocks, prefix
        self.watch: Watch | None = None
        self._open = False

    def _due(self, args: TrainingArguments, step: int) -> bool:
        return step % max(1, int(self.every or args.logging_steps)) == 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._due(args, state.global_step + 1):
            optimizer = kwargs.get("optimizer") or self.trainer.optimizer
            if self.watch is None:
                self.watch = Watch(kwargs["model"], optimizer, self.blocks)
            self.watch.__enter__()
            self._open = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._open and self.watch is not None:
            self._close()
            self.trainer.log({f"{self.prefix}{name}": value for name, value in self.watch.numbers().items()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._close()
        self.watch = None

    def _close(self) -> None:
        if self._open and self.watch is not None:
            self.watch.__exit__(None, None, None)
        self._open = False
