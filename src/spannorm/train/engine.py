"""The engine: Hugging Face's Trainer with our parameter groups and data order."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments

from spannorm.errors import InputError
from spannorm.routing import RoutingMeter
from spannorm.train.checkpoints import begin
from spannorm.train.optimizers import build_optimizer
from spannorm.train.processes import on_first
from spannorm.train.recipe import TrainRecipe
from spannorm.train.schedule import share_of_peak

_NAMES = {f.name for f in fields(TrainingArguments)}
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"
"""Renamed within Transformers 5; the old name warns on the newer releases."""


class Engine(Trainer):
    """`Trainer`, except that the data set is already in the run's order, that roles decide decay and learning rate, and
    that the schedule is the recipe's (schedule.py).

    For a mixture of experts it logs the routers' health at every step. The logged loss is the cross-entropy alone, so
    that curves, spikes and failures have the same meaning as for a dense model.
    """

    def __init__(
        self,
        model: Any,
        *args: Any,
        recipe: TrainRecipe,
        **kwargs: Any,
    ) -> None:
        self.recipe, self.loss_chunk = recipe, recipe.loss_chunk
        super().__init__(model, *args, **kwargs)
        self.fetching = False
        self._skip_nan = recipe.on_nan == "skip"
        self._routing = RoutingMeter(getattr(model.config, "num_experts_per_tok", 0))
        self._auxiliary: list[torch.Tensor] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.loss_chunk:
            inputs = {**inputs, "loss_chunk": self.loss_chunk}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and outputs.get("z_loss") is not None:
            self._routing.add(outputs.router_logits)
            self._auxiliary.append(torch.stack([outputs.aux_loss, outputs.z_loss]).detach())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # Trainer resets its sum of losses by subtracting it from itself. NaN − NaN is NaN, so it would stay NaN.
        return loss.nan_to_num(0.0, 0.0, 0.0) if self._skip_nan else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "grad_norm" in logs and self._auxiliary:
            parts = torch.stack(self._auxiliary).sum(0)
            parts, self._routing.sums = self.accelerator.reduce((parts, self._routing.sums), reduction="sum")
            balance, z = parts.tolist()
            config = self.accelerator.unwrap_model(self.model).config
            logs["loss"] -= config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
            logs |= {"router_aux_loss": balance, "router_z_loss": z, **self._routing.take().summary()}
            self._auxiliary = []
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:  # type: ignore[has-type]
            args = self.args
            self.optimizer = build_optimizer(
                self.model if model is None else model,
                self.recipe.optimizer,
                learning_rate=args.learning_rate,
                weight_decay=args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2),
                epsilon=args.adam_epsilon,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:  # type: ignore[has-type]
            chosen = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(chosen, lambda done: share_of_peak(self.recipe, done + 1))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """A step's sequences. They are read before its first pass."""
        self.fetching = True
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self.fetching = False

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        on_first(lambda: begin(folder / f"checkpoint-{self.state.global_step}"))
        super()._save_checkpoint(model, trial)

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The model's state dict."""
        return dict(self.accelerator.unwrap_model(self.model).state_dict())

    def mean_loss(self, sequences: Dataset[Any], name: str) -> float:
        """Mean loss over sequences of equal length, nats per token."""
        return float(self.evaluate(sequences, metric_key_prefix=name)[f"{name}_loss"])


def passes(t: TrainRecipe, processes: int) -> tuple[int, int]:
    """Sequences per forward pass, and the number of passes, for each process's share of an optimizer step.

    Raises:
        InputError: a step's sequences do not divide among the processes.
    """
    share, rest = divmod(t.batch_size * t.accumulation, processes)
    if rest:
        raise InputError(
            f"a step's {t.batch_size * t.accumulation} sequences (train.batch_size · train.accumulation) must divide "
            f"evenly among {processes} processes."
        )
    batch = next(b for b in range(min(t.batch_size, share), 0, -1) if share % b == 0)
    return batch, share // batch


def arguments(t: TrainRecipe, out: Path, processes: int = 1) -> TrainingArguments:
    """A recipe's training section as Trainer's arguments."""
    batch_size, accumulation = passes(t, processes)
    return TrainingArguments(
        output_dir=str(out),
        max_steps=t.steps,
        per_device_train_batch_size=batch_size,
        # Trainer counts the last batch's filling-up with several processes, unless a batch is one sequence.
        per_device_eval_batch_size=t.batch_size if processes == 1 else 1,
        gradient_accumulation_steps=accumulation,
        learning_rate=t.learning_rate,
        weight_decay=t.weight_decay,
        adam_beta1=t.adam_beta1,
        adam_beta2=t.adam_beta2,
        adam_epsilon=t.adam_epsilon,
        max_grad_norm=t.clip_norm,
        bf16=uses_bf16(t),
        torch_compile=t.compile,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=t.checkpoint_every,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        seed=t.seed,
        **{_CHECKPOINTING: t.activation_checkpointing},
    )


def precision_of(t: TrainRecipe) -> str:
    """`bf16` or `fp32`: what the recipe's precision comes to on this machine."""
    return "bf16" if uses_bf16(t) else "fp32"


def uses_bf16(t: TrainRecipe) -> bool:
    """Whether the forward pass runs under bf16 autocast. `auto` means yes on a GPU with bf16."""
    if t.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return t.precision == "bf16"
