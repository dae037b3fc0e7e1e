"""Watching a training run: per block, the size of activations, of gradients and of updates. For any model of blocks."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from spannorm.errors import InputError
from spannorm.probes.blocks import find_blocks
from spannorm.probes.statistics import apart, exact, power


class Watch(AbstractContextManager["Watch"]):
    """Measures one optimizer step, of any number of micro-batches, and leaves it bit-identical.

        watch = Watch(model, optimizer)
        with watch:
            for batch in micro_batches:
                (model(**batch).loss / len(micro_batches)).backward()
            optimizer.step()
        wandb.log(watch.numbers(), step=step)

    Gradients are those that the optimizer receives: summed over micro-batches, and clipped if you clip them. It keeps a
    copy of all parameters during the optimizer's step. If the parameters are sharded, every rank must use it.

    Args:
        model: any module with a list of blocks; not compiled, because compiled code runs no hooks.
        optimizer: the one that steps.
        blocks: path of the list of blocks, such as `model.layers`; None means the blocks that hold a `placement`, or
            else the longest list of modules, if it also has the most parameters.

    Raises:
        InputError: no list of blocks was found, or several.
    """

    def __init__(self, model: nn.Module, optimizer: Any, blocks: str | None = None) -> None:
        self.blocks = find_blocks(model, blocks)
        self.model = model
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        self._groups = {name: _group(name, self.blocks) for name, _ in model.named_parameters()}
        self._numbers: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        self._powers: dict[str, list[Tensor]] = defaultdict(list)
        self._numbers = {}
        self._before: dict[str, Tensor] = {}
        self._hooks = ExitStack()
        for b, path in enumerate(self.blocks):
            block = self.model.get_submodule(path)
            self._hooks.callback(block.register_forward_hook(self._leaving(f"block_{b:03d}")).remove)
        self._hooks.callback(self.optimizer.register_step_pre_hook(self._stepping).remove)
        self._hooks.callback(self.optimizer.register_step_post_hook(self._stepped).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        for name, powers in self._powers.items():
            self._numbers[name] = torch.stack([p.float() for p in powers]).mean().sqrt()

    def _leaving(self, block: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            x = out[0] if isinstance(out, (tuple, list)) else out
            if not isinstance(x, Tensor):
                return
            if torch._C._current_graph_task_id() == -1:  # not a recomputation of activation checkpointing
                with apart(x):
                    self._powers[f"activation_rms/{block}"].append(power(x))
            if torch.is_grad_enabled() and x.requires_grad:
                x.register_hook(lambda gradient: self._arrives(block, gradient))

        return hook

    def _arrives(self, block: str, gradient: Tensor) -> None:
        with apart(gradient):
            self._powers[f"activation_gradient_rms/{block}"].append(power(gradient))

    @torch.no_grad()
    def _stepping(self, *_: Any) -> None:
        sums: dict[str, list[Tensor]] = defaultdict(list)
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                sums[self._groups[name]].append(_square(p.grad))
                self._before[name] = p.detach().clone()
        for group, squares in sums.items():
            self._numbers[f"gradient_norm/{group}"] = torch.stack(squares).sum().sqrt()

    @torch.no_grad()
    def _stepped(self, *_: Any) -> None:
        moved: dict[str, list[Tensor]] = defaultdict(list)
        there: dict[str, list[Tensor]] = defaultdict(list)
        count: dict[str, int] = defaultdict(int)
        for name, p in self.model.named_parameters():
            old = self._before.pop(name, None)
            if old is not None:
                group = self._groups[name]
                moved[group].append(_square(exact(p.detach()) - exact(old)))
                there[group].append(_square(old))
                count[group] += p.numel()
        for group in moved:
            change, size = torch.stack(moved[group]).sum(), torch.stack(there[group]).sum()
            self._numbers[f"update_rms/{group}"] = (change / count[group]).sqrt()
            self._numbers[f"update_ratio/{group}"] = (change / size).sqrt()

    def numbers(self) -> dict[str, float]:
        """The last step's numbers, by names such as `update_rms/block_003`; `rest` is all that is in no block.

        `activation_rms`: RMS of a block's output, mean over micro-batches. `activation_gradient_rms`: RMS of the loss's
        gradient with respect to it. `gradient_norm`: length of the gradient with respect to a block's parameters.
        `update_rms`: RMS of their change. `update_ratio`: that divided by their RMS before the step.

        Raises:
            InputError: no forward pass and no step ran inside `with`.
        """
        if not any(name.startswith("activation") for name in self._numbers):
            raise InputError(
                "nothing was measured: run a forward pass inside `with watch:`, and of a compiled model watch the "
                "module that was given to torch.compile, called itself."
            )
        return {name: value.item() for name, value in sorted(self._numbers.items())}


def _group(name: str, blocks: list[str]) -> str:
    return next((f"block_{b:03d}" for b, path in enumerate(blocks) if name.startswith(f"{path}.")), "rest")


def _square(x: Tensor) -> Tensor:
    """Sum of squares; for a sharded tensor over all shards."""
    total = torch.linalg.vector_norm(exact(x)).square()
    return total.full_tensor() if hasattr(total, "full_tensor") else total
