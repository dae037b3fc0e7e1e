"""A comparison's files as arms: what each was, how its runs went, and how it looks in every figure and table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_hex, to_rgb
from numpy.typing import NDArray

from spannorm.errors import InputError
from spannorm.files import checked, read_text
from spannorm.text import plain, plain_in
from spannorm.train.health import ROUTING
from spannorm.train.ramp import SHARES

Array = NDArray[np.float64]
Job = dict[str, Any]
Groups = dict[tuple[str, str], dict[float | None, list[Job]]]
"""Jobs by arm (placement, variant), then by learning rate."""

# Okabe and Ito's vermilion, blue and green for the three that every comparison is about; the rest keep apart
# in lightness as well as in hue, and never fall below 3:1 on white.
_PROTAGONISTS = {"span": "#d55e00", "pre": "#0072b2", "post": "#009e73"}
_HUES = (
    *("#b3478c", "#b07a00", "#4b3b9b", "#3a93c4", "#7a1f2b", "#6f6f6f"),
    *("#5e7d1e", "#e0608a", "#14505c", "#8b5a2b", "#8f7ad1", "#222222"),
)
_DASHES: tuple[tuple[float, ...], ...] = ((), (4.5, 1.6), (1.2, 1.3), (6, 1.4, 1.2, 1.4), (9, 2.2))
_SHADES = (0.0, -0.32, 0.27)  # with five dashes: fifteen depth rules before one repeats

LARGEST = 1e38  # float32 ends here: what is larger was never measured
_ARM_KEYS = ("model.placement", "model.depth_rule", "train.seed", "train.learning_rate")


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, everywhere."""

    color: str
    dash: tuple[float, ...]

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.color, "linestyle": (0, self.dash) if self.dash else "-"}


@dataclass(frozen=True)
class Series:
    """Finite values by optimizer step."""

    steps: Array
    values: Array


@dataclass(frozen=True)
class Run:
    """One job of an arm, with its records read."""

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


@dataclass(frozen=True)
class Rate:
    """An arm at one learning rate: the validation losses of the seeds that held, and the reasons of the rest."""

    learning_rate: float | None
    losses: list[float]
    failures: list[str]


@dataclass(frozen=True)
class Arm:
    """A placement with its depth rule (and what else it overrides), as the figures draw it."""

    placement: str
    variant: str
    look: Look
    rates: list[Rate]
    learning_rate: float | None
    """The one drawn."""
    runs: list[Run]
    """The seeds at that learning rate: under a protocol the fresh ones, as soon as there are any."""
    confirmed: bool = False
    """Whether they are fresh: others than the one on which the rate was chosen."""

    @property
    def label(self) -> str:
        return self.placement if self.variant == self.placement else f"{self.placement} {self.variant}"

    @property
    def failed(self) -> bool:
        return bool(self.runs) and all(run.status == "failed" for run in self.runs)

    @property
    def shown(self) -> list[Run]:
        """The seeds that make the mean line: those that held, or all if none did."""
        return self.runs if self.failed else [run for run in self.runs if run.status != "failed"]


def looks(arms: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Look]:
    """A look for every (placement, variant): hue by placement, dash and shade by variant."""
    pairs = list(arms)
    others = sorted({placement for placement, _ in pairs} - _PROTAGONISTS.keys())
    hues = _PROTAGONISTS | {name: _HUES[i % len(_HUES)] for i, name in enumerate(others)}
    variants = sorted({variant for _, variant in pairs}, key=lambda name: (name != "none", name))
    return {
        (placement, variant): Look(
            _shade(hues[placement], _SHADES[variants.index(variant) % len(_SHADES)]),
            _DASHES[variants.index(variant) % len(_DASHES)],
        )
        for placement, variant in pairs
    }


def _shade(color: str, amount: float) -> str:
    """Towards white above zero, towards black below."""
    goal = 1.0 if amount > 0 else 0.0
    return str(to_hex([part + (goal - part) * abs(amount) for part in to_rgb(color)]))


_NUMBER = (float, None)
_METRIC = {"value?": float, "stderr?": float}
_ROW = {
    "job": str, "placement": str, "depth_rule": str, "status": str,
    **dict.fromkeys(("reason?", "arm?", "stage?"), str),
    **dict.fromkeys(("seed?", "steps?", "steps_done?"), int),
    **dict.fromkeys(("learning_rate?", "val_loss?", "test_loss?", "bits_per_byte?", "unigram_loss?"), float),
    **dict.fromkeys(("initial_loss?", "max_grad_norm?", "spikes?", "spike_score?", "tokens_per_second?"), float),
    **dict.fromkeys(("tokens?", "depth?", "parameters?", "body_parameters?", "active_parameters?"), float),
    "flops_per_token?": float, "matrix_share?": float,
    "overrides?": dict, "cell?": dict, "tables?": [str],
    "collapse?": {name: [_NUMBER] for name in ("effective_rank", "skip_cost", "spectrum")},
    "evaluation?": {str: {"metrics": {str: _METRIC}, "questions": int, "chance?": float, "questions_sha256?": str}},
    "tolerated?": {"learned": bool, "rates": {f"{share:g}": _NUMBER for share in SHARES}},
}  # fmt: skip
_PROTOCOL = {"seeds?": [int], "pairs?": [[str]]}
_RESULTS = {
    "name?": str,
    "recipe?": {"model?": dict, "train?": {"steps?": int, "learning_rate?": float},
                "compare?": {"protocol?": _PROTOCOL}},
    "versions?": dict, "machine?": dict, "data?": dict, "ladder?": dict,
}  # fmt: skip
"""What a report needs of `results.json`; see `spannorm.files.checked`."""
_MOST_STEPS = 10**12
_STATES = ("waiting", "running", "stopped", "ok", "failed")


def _parsed(text: str) -> Any:
    """JSON in which NaN, Infinity and numbers that were never measured are unknown, like null."""

    def number(digits: str) -> float | None:
        return value if abs(value := float(digits)) < LARGEST else None

    def whole(digits: str) -> int | None:
        return None if number(digits) is None else int(digits)

    return json.loads(text, parse_constant=lambda _: None, parse_int=whole, parse_float=number)


def read_results(path: Path) -> dict[str, Any]:
    """`results.json` with every text made plain and what is missing made null.

    Raises:
        InputError: it is missing, or a field has the wrong type; the field is named.
    """
    redo = "give the folder that `spannorm compare RECIPE --out DIR` wrote"
    if not path.is_file():
        raise InputError(f"a report is drawn from results.json; there is none at {path}: {redo}.")
    try:
        results: Any = plain_in(_parsed(read_text(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON; reading it failed ({error}): {redo}.") from None
    arms = results.get("arms") if isinstance(results, dict) else None
    if not isinstance(arms, list) or not arms or not all(isinstance(arm, dict) for arm in arms):
        raise InputError(f"{path} must hold an object with a non-empty list `arms` of objects: {redo}.")
    try:
        checked(results, _RESULTS, str(path))
        for number, arm in enumerate(arms):
            checked({f"arms[{number}]": arm}, {f"arms[{number}]": _ROW}, str(path))
    except InputError as error:
        raise InputError(f"{error} {redo[0].upper()}{redo[1:]}.") from None
    seen = set()
    for number, arm in enumerate(arms):
        if Path(arm["job"]).name != arm["job"]:
            raise InputError(f"{path}: `arms[{number}].job` must be a folder's name and is {arm['job']!r}: {redo}.")
        if arm["status"] not in _STATES:
            raise InputError(
                f"{path}: `arms[{number}].status` must be one of {', '.join(_STATES)} and is {arm['status']!r}: {redo}."
            )
        if arm["job"] in seen:
            raise InputError(f"{path}: `arms[{number}].job` {arm['job']!r} stands there twice: {redo}.")
        seen.add(arm["job"])
        for key in ("reason", "seed", "learning_rate"):
            arm.setdefault(key, None)
        for key in ("collapse", "evaluation", "tolerated", "overrides", "cell"):
            arm[key] = arm.get(key) or {}
        arm["steps_done"] = arm.get("steps_done") or 0
        arm["tables"], arm["stage"] = arm.get("tables") or [""], arm.get("stage") or ""
        if arm["stage"] or arm["tolerated"]:
            arm["arm"] = arm.get("arm") or f"{arm['placement']} {arm['depth_rule']}"
    sections = ("recipe", "versions", "machine", "data", "ladder")
    return {"name": str(results.get("name") or plain(path.parent.name)), "arms": arms} | {
        key: results.get(key) or {} for key in sections
    }


_LINES = {
    "records.jsonl": {"step": int, **dict.fromkeys(("loss?", "grad_norm?", "learning_rate?"), float),
                      **{f"{name}?": float for name in ROUTING}},
    "probes.jsonl": {"step": int, "signal_rms?": [_NUMBER], "gradient_rms?": [_NUMBER], "similarity?": [[_NUMBER]],
                     "routing?": {"load?": [[_NUMBER]]}},
}  # fmt: skip


def _read_lines(path: Path, unread: list[str]) -> list[dict[str, Any]]:
    """The lines by step. A line that cannot be read is left out and counted; a step done again counts last."""
    if not path.is_file():
        return []
    lines, bad = {}, 0
    try:
        text = read_text(path)
    except InputError as error:
        unread.append(plain(error))
        return []
    for line in text.splitlines():
        try:
            record = checked(_parsed(line), _LINES[path.name], path.name)
            if not 0 <= record["step"] < _MOST_STEPS:
                raise ValueError(record["step"])
            lines[record["step"]] = record
        except (ValueError, RecursionError):
            bad += 1
    bad -= bool(bad and not text.endswith("\n"))  # the last line may still be being written
    if bad:
        unread.append(f"{path.parent.name}/{path.name}: {bad}")
    return [lines[step] for step in sorted(lines)]


def read_run(directory: Path, job: Job, unread: list[str]) -> Run:
    folder = directory / "jobs" / job["job"]
    records = _read_lines(folder / "records.jsonl", unread)
    probes = _read_lines(folder / "probes.jsonl", unread)

    def series(key: str) -> Series:
        pairs = np.array([(r["step"], r[key]) for r in records if r.get(key) is not None], dtype=np.float64)
        pairs = pairs.reshape(-1, 2)
        pairs = pairs[(np.abs(pairs) < LARGEST).all(axis=1)]
        return Series(pairs[:, 0], pairs[:, 1])

    def layers(key: str) -> tuple[Array, Array]:
        found = [probe for probe in probes if probe.get(key)]
        found = [probe for probe in found if len(probe[key]) == len(found[0][key])]
        rows = [[np.nan if v is None else v for v in probe[key]] for probe in found]
        return np.array([probe["step"] for probe in found], dtype=np.float64), np.array(rows, dtype=np.float64)

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
    )


def group_jobs(jobs: Sequence[Job]) -> Groups:
    """Jobs by arm, then by learning rate. What else differs between arms joins the depth rule in the name."""
    extras = {key for job in jobs for key in job["overrides"]} - set(_ARM_KEYS)
    varied = [k for k in sorted(extras) if len({json.dumps(job["overrides"].get(k)) for job in jobs}) > 1]
    groups: Groups = {}
    for job in sorted(jobs, key=lambda job: (job["learning_rate"] or 0, job["seed"] or 0)):
        parts = [f"{k.rpartition('.')[2]}={job['overrides'][k]}" for k in varied if k in job["overrides"]]
        variant = job["arm"].partition(" ")[2] if job.get("arm") else " ".join([job["depth_rule"], *parts])
        key = (job["placement"], variant)
        groups.setdefault(key, {}).setdefault(job["learning_rate"], []).append(job)
    return groups


def rank(group: Sequence[Job]) -> tuple[float, ...]:
    """Sorts arms and chooses learning rates: those that held by validation loss, unfinished ones, failures."""
    failed, losses = len(failed_jobs(group)), values_of(held_jobs(group), "val_loss")
    waiting = all(job["status"] == "waiting" for job in group)
    steps = sum(values_of(group, "steps_done"))
    if failed:
        own = losses or values_of(group, "val_loss")
        return (3, failed / len(group), float(np.mean(own)) if own else float("inf"), -steps)
    if losses:
        return (0, float(np.mean(losses)))
    return (2 if waiting else 1, -steps)


def held_jobs(group: Iterable[Job]) -> list[Job]:
    return [job for job in group if job["status"] != "failed"]


def failed_jobs(group: Iterable[Job]) -> list[Job]:
    return [job for job in group if job["status"] == "failed"]


def values_of(group: Iterable[Job], key: str) -> list[float]:
    values = [job.get(key) for job in group]
    return [float(v) for v in values if isinstance(v, int | float) and abs(v) < LARGEST]
