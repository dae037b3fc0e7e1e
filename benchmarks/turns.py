"""Ours and its rivals in turns within one run, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Result:
    """One contestant in one row."""

    row: str
    name: str
    milliseconds: float
    """Median over the turns."""
    ratio: float
    """Ours over this one: the median over turns of the ratio of times. Below 1, ours is faster."""
    kept_mib: float | None = None
    """What backward keeps beside the parameters, MiB."""
    peak_mib: float | None = None
    """Most memory allocated, MiB; known on a GPU alone."""


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], repeats: int = 1) -> Callable[[], float]:
    """A turn: seconds of one call, the mean of `repeats`."""

    def turn() -> float:
        synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize()
        return (time.perf_counter() - began) / repeats

    return turn


def in_turns(
    row: str, turns: dict[str, Callable[[], float]], pairs: int, kept: dict[str, float] | None = None
) -> list[Result]:
    """Run all contestants `pairs` times, each time in the other order; the first is ours."""
    peaks: dict[str, float | None] = dict.fromkeys(turns)
    for name, turn in turns.items():
        turn()  # pays for compilation and caches
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            turn()
            peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(pairs):
        for name in list(turns)[:: 1 if i % 2 else -1]:
            seconds[name].append(turns[name]())
    ours = seconds[next(iter(turns))]
    return [
        Result(
            row,
            name,
            1e3 * statistics.median(times),
            statistics.median(a / b for a, b in zip(ours, times, strict=True)),
            (kept or {}).get(name),
            peaks[name],
        )
        for name, times in seconds.items()
    ]


def kept_mib(forward: Callable[[], Any], model: nn.Module | None = None) -> float:
    """What one forward pass keeps for backward, each storage counted once, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()} if model is not None else set()
    storages: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(storages.values()) / 2**20


def table(results: list[Result]) -> str:
    lines = [f"{'':44} {'ms':>9} {'ours/this':>9} {'kept MiB':>9} {'peak MiB':>9}"]
    row = None
    for r in results:
        if r.row != row:
            row = r.row
            lines.append(row)
        memory = " ".join(f"{m:9.2f}" if m is not None else f"{'':9}" for m in (r.kept_mib, r.peak_mib))
        lines.append(f"    {r.name:40} {r.milliseconds:9.3f} {r.ratio:9.3f} {memory}")
    return "\n".join(lines)


def as_dicts(results: list[Result]) -> list[dict[str, Any]]:
    return [asdict(r) for r in results]
