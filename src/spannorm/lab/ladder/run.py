"""`spannorm ladder`: a comparison whose jobs climb, its forecast, and the seal on the largest size's prediction."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spannorm.errors import InputError
from spannorm.files import read_json, write_json
from spannorm.lab.jobs.cost import config_without_tokens
from spannorm.lab.jobs.plan import Done, Job
from spannorm.lab.ladder.outcome import outcome, prediction
from spannorm.lab.ladder.plan import HELD_OUT, LadderPlan
from spannorm.models import SpanNormForCausalLM
from spannorm.train.needs import short
from spannorm.train.recipe import Recipe
from spannorm.train.run import RESULT

PREDICTION = "prediction.json"
_TIMED_TOKENS = 1024


def sealed(plan: LadderPlan, out: Path) -> Callable[[Done], list[Job]]:
    """A planner that lets the largest size run only after its prediction lies in the folder, and never changes that."""

    def jobs(done: Done) -> list[Job]:
        path = out / PREDICTION
        if not path.is_file():
            results = {name: read_json(out / "jobs" / name / RESULT, dict) for name in done}
            if (forecast := prediction(plan, results, done)) is None:
                return plan.jobs(done, sealed=False)
            write_json(path, forecast)
        return plan.jobs(done)

    return jobs


def ladder_outcome(recipe: Recipe, results: Mapping[str, Mapping[str, Any]], out: Path) -> dict[str, Any]:
    """What the finished runs come to so far; see `spannorm.lab.ladder.outcome`."""
    path = out / PREDICTION
    return outcome(LadderPlan(recipe), results, read_json(path, dict) if path.is_file() else None)


@dataclass(frozen=True)
class Forecast:
    """What a ladder will take, before it starts."""

    lines: list[str]
    rungs: list[dict[str, Any]]
    """Sizes of each, with its `runs` and `hours`."""
    runs: int
    compute: float
    """Operations, 6·N·D over all runs."""
    hours: float
    """On this machine, one run after the other, by a few timed passes of each rung."""


def forecast(recipe: Recipe) -> Forecast:
    """Runs, operations, tokens and hours of a ladder whose learning rates all stay inside the grid.

    Each rung's first arm is timed for one forward and backward pass of about a thousand tokens on this machine.
    """
    plan = LadderPlan(recipe)
    if not recipe.compare.protocol.pairs:
        raise InputError("a ladder compares pairs named beforehand: list them under compare.protocol.pairs.")
    counts = _counts(plan)
    lines = [f"{'rung':36} {'blocks × width':>15} {'heads':>5} {'ffn':>5} {'batch':>5} {'steps':>7} {'tokens':>8} "
             f"{'operations':>10} {'runs':>4} {'hours':>6}"]  # fmt: skip
    rungs: list[dict[str, Any]] = []
    runs, compute, hours = 0, 0.0, 0.0
    for i, rung in enumerate(plan.rungs):
        own = counts[i] * rung.tokens * _seconds_per_token(plan.plan.job(plan.arms_at[i][0], 1e-3, 0)) / 3600
        rungs.append({"name": rung.name, **asdict(rung), "runs": counts[i], "hours": own})
        runs, compute, hours = runs + counts[i], compute + counts[i] * rung.compute, hours + own
        lines.append(
            f"{rung.kind + ': ' + rung.name:36} {f'{rung.blocks} × {rung.width}':>15} {rung.heads:>5} {rung.ffn:>5} "
            f"{rung.batch:>5} {rung.steps:>7} {short(rung.tokens):>8} {rung.compute:>10.1e} {counts[i]:>4} {own:>6.2f}"
        )
    tokens = max(rung.tokens for rung in plan.rungs)
    lines.append(
        f"{runs} runs, {compute:.2e} operations, {hours:.1f} hours one after the other; the longest reads "
        f"{short(tokens)} tokens; checkpoints take {short(16 * plan.rungs[plan.sizes - 1].parameters)}B or more at once"
    )
    lines.append("the grid grows where a best rate lies on its edge, which makes more runs of the smallest sizes")
    return Forecast(lines, rungs, runs, compute, hours)


def _counts(plan: LadderPlan) -> list[int]:
    """Runs of each rung, if every best rate is the middle of the grid."""
    rates = sorted(plan.plan.rates)
    middle, done = rates[len(rates) // 2], dict[str, float | None]()
    for _ in range(4):
        for step in plan.steps(done):
            done.setdefault(step.job.name, abs(step.job.recipe.train.learning_rate - middle))
    steps = plan.steps(done)
    assert any(step.stage == HELD_OUT for step in steps)
    return [sum(step.rung is rung for step in steps) for rung in plan.rungs]


def _seconds_per_token(job: Job) -> float:
    t = job.recipe.train
    model = SpanNormForCausalLM(config_without_tokens(job.recipe)).train()
    if torch.cuda.is_available():
        model.cuda()
    ids = torch.zeros(max(1, _TIMED_TOKENS // t.sequence_length), t.sequence_length, dtype=torch.long)
    ids = ids.to(model.device)
    seconds: Sequence[float] = []
    for _ in range(3):
        began = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = [*seconds, time.perf_counter() - began]
    return min(seconds) / ids.numel()
