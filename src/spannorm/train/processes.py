"""The processes of one run, as torchrun starts them: all ranks train; rank 0 writes and prints."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from spannorm.errors import InputError, Stopped

T = TypeVar("T")


def join() -> None:
    """Connect with the other processes of this run, if torchrun started any: NCCL on GPUs, gloo on CPUs."""
    _state()


def leave() -> None:
    """Disconnect from the other processes. Otherwise the interpreter may end while their threads run, and abort."""
    if distributed.is_initialized():
        gc.collect()  # models in shards hold the group
        wait_for_all()
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number, known before `join`."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes have joined."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def on_first(do: Callable[[], T]) -> T:
    """Run `do` in the first process and return its result in every process. All of them raise its `InputError`."""
    told: list[tuple[T | None, InputError | None]] = [(None, None)]
    if is_first():
        try:
            told = [(do(), None)]
        except InputError as error:
            told = [(None, error)]
    if count() > 1:
        distributed.broadcast_object_list(told, src=0, device=_state().device)
    value, refusal = told[0]
    if refusal is not None:
        raise refusal
    return value  # type: ignore[return-value]


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if count() == 1:
        return flag
    flags = torch.tensor(int(flag), device=_state().device)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags.item())


def wait_for_all() -> None:
    """Return when every process has called this."""
    _state().wait_for_everyone()


@contextmanager
def noticing_loss() -> Iterator[None]:
    """Within the block, the error of a process that lost another process becomes `Stopped`: the cause is elsewhere."""
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise
        raise Stopped("another process of this run is gone, what came after the last checkpoint with it", 75) from error


def _state() -> Any:
    from accelerate import PartialState  # slow to import, and the command line needs only `is_first`

    return PartialState(cpu=not torch.accelerator.is_available())
