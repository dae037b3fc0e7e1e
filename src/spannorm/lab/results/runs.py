"""A job's records and probes, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spannorm.lab.results.files import LARGEST, JobResult, read_lines
from spannorm.lab.results.groups import values_of
from spannorm.train.health import ROUTING
from spannorm.train.ramp import SHARES

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Finite values by optimizer step."""

    steps: Array
    values: Array


@dataclass(frozen=True)
class Run:
    """One job, with its records and probes read."""

    seed: int | None
    status: str
    reason: str | None
    val_loss: float | None
    test_loss: float | None
    loss: Series
    grad_norm: Series
    learning_rate: Series
    probes: list[dict[str, Any]] = field(default_factory=list)
    """The first and the last probe (one, if there is only one)."""
    through: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """`gradient_rms` and `signal_rms` through training: the probes' steps, and (probes, layers)."""
    collapse: dict[str, list[float]] = field(default_factory=dict)
    """See `spannorm.train.collapse`."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """By task; see `spannorm.evaluate.harness.evaluate`."""
    routing: dict[str, Series] = field(default_factory=dict)
    """Of a mixture of experts: what its routers did, by name of `spannorm.train.health.ROUTING`."""
    all_lost: bool = False
    """Whether it is a ramp that ended because all that was learned was lost."""


def read_run(directory: Path, job: JobResult, unread: list[str]) -> Run:
    folder = directory / "jobs" / job["job"]
    records = read_lines(folder / "records.jsonl", unread)
    probes = read_lines(folder / "probes.jsonl", unread)

    def series(key: str) -> Series:
        pairs = np.array([(r["step"], r[key]) for r in records if r.get(key) is not None], dtype=np.float64)
        pairs = pairs.reshape(-1, 2)
        pairs = pairs[(np.abs(pairs) < LARGEST).all(axis=1)]
        return Series(pairs[:, 0], pairs[:, 1])

    def layers(key: str) -> tuple[Array, Array]:
        measured = [probe for probe in probes if probe.get(key)]
        measured = [probe for probe in measured if len(probe[key]) == len(measured[0][key])]
        rows = [[np.nan if v is None else v for v in probe[key]] for probe in measured]
        return np.array([probe["step"] for probe in measured], dtype=np.float64), np.array(rows, dtype=np.float64)

    return Run(
        job["seed"],
        job["status"],
        job["reason"],
        next(iter(values_of([job], "val_loss")), None),
        next(iter(values_of([job], "test_loss")), None),
        series("loss"),
        series("grad_norm"),
        series("learning_rate"),
        probes if len(probes) < 2 else [probes[0], probes[-1]],
        {key: layers(key) for key in ("gradient_rms", "signal_rms")},
        job.get("collapse") or {},
        job.get("evaluation") or {},
        {name: measured for name in ROUTING if len((measured := series(name)).steps)},
        bool(job["tolerated"]) and job["tolerated"]["rates"][f"{max(SHARES):g}"] is not None,
    )
