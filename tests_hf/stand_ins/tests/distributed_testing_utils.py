"""Stands in for the processes of Transformers' FSDP, tensor and expert parallel suites: ours, by gloo on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Run `function(rank, *args)` in so many fresh processes; an error in one is raised here."""
    mp.spawn(function, args, nprocs)


def _in_group(rank: int, store: str, world_size: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    _set_rank_device(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate `function(rank, *args)`: a call with `args` runs it in `world_size` processes of one group."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            with TemporaryDirectory() as folder:
                _start_rank_processes(_in_group, (f"{folder}/store", world_size, function, args), world_size)

        return run

    return decorate
