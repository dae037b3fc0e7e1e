"""A comparison's files, made up: rows, records and probes of runs that went well or failed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spannorm.lab.jobs.plan import Job, Plan
from spannorm.train.recipe import Recipe

STEPS, LAYERS = 60, 4


def arm(placement: str, rule: str = "none", **given: Any) -> dict[str, Any]:
    """A row of results.json; the keywords say how it differs from a run that went well."""
    rate, seed = given.get("learning_rate", 6e-3), given.get("seed", 0)
    row = {
        "job": f"{placement}-{rule.replace('/', '-')}-lr{rate}-seed{seed}",
        "placement": placement,
        "depth_rule": rule,
        "seed": seed,
        "learning_rate": rate,
        "overrides": {"model.placement": placement, "model.depth_rule": rule},
        "status": "ok",
        "reason": None,
        "val_loss": 1.9,
        "test_loss": 1.95,
        "bits_per_byte": 2.7,
        "unigram_loss": 3.1,
        "spike_score": 0.01,
        "max_grad_norm": 4.2,
        "tokens_per_second": 6100.0,
        "parameters": 1_612_345,
        "body_parameters": 1_579_577,
        "depth": LAYERS,
        "steps": STEPS,
        "steps_done": STEPS,
        "tokens": STEPS * 512,
    }
    return row | given


def failed(placement: str, rule: str, reason: str, **given: Any) -> dict[str, Any]:
    done = 30 if reason == "non-finite" else STEPS
    loss = None if reason == "non-finite" else 3.09
    return arm(placement, rule, status="failed", reason=reason, val_loss=loss, test_loss=loss, steps_done=done, **given)


def comparison(folder: Path, arms: list[dict[str, Any]], name: str = "demo") -> Path:
    """Write the files of a comparison."""
    for row in arms:
        job = folder / "jobs" / row["job"]
        job.mkdir(parents=True)
        done = row["steps_done"]
        records, probes = [], []
        for step in range(1, done + 1):
            loss: float | None = 1.9 + 3.6 * math.exp(-step / 12) + 0.02 * math.sin(step)
            if row["reason"] == "non-finite" and step == done:
                loss = None
            records.append({"step": step, "loss": loss, "grad_norm": loss and loss / 2, "learning_rate": 1e-3})
        for step in (0, done) if done else ():
            end = [None] * (LAYERS + 1) if row["reason"] == "non-finite" and step else None
            cosines = [[math.exp(-abs(i - j) / 3) for i in range(LAYERS + 1)] for j in range(LAYERS + 1)]
            gradient, signal = [0.5**i for i in range(LAYERS + 1)], [1.0 + i for i in range(LAYERS + 1)]
            probes.append({"step": step, "signal_rms": end or signal, "gradient_rms": end or gradient})
            probes[-1]["similarity"] = [end] * (LAYERS + 1) if end else cosines
        (job / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (job / "probes.jsonl").write_text("".join(json.dumps(p) + "\n" for p in probes))
    results = {
        "name": name,
        "recipe": {"name": name, "model": {"hidden_size": 64}, "train": {"steps": STEPS}},
        "versions": {"torch": "2.11.0", "spannorm": "0.1.0"},
        "machine": {"platform": "Linux", "cores": 8, "device": None},
        "data": {"corpus": "stdlib", "sha256": "0badcafe" * 8},
        "format": 2,
        "jobs": arms,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def played(recipe: Recipe, loss: Callable[[Job], float | None]) -> list[dict[str, Any]]:
    """The rows of a comparison run to its end, with losses from a function; None is a failure."""
    plan, done = Plan(recipe), dict[str, float | None]()
    while fresh := [job for job in plan.jobs(done) if job.name not in done]:
        done |= {job.name: loss(job) for job in fresh}
    rows = []
    for job in plan.jobs(done):
        placement, rule = job.arm.split()[:2]
        given: dict[str, Any] = {"seed": job.recipe.train.seed, "learning_rate": job.recipe.train.learning_rate}
        value = done[job.name]
        row = failed(placement, rule, "unigram", **given) if value is None else arm(placement, rule, **given)
        row |= {
            "job": job.name,
            "arm": job.arm,
            "condition": dict(job.condition),
            "stage": job.stage,
            "tables": [*job.tables],
        }
        row |= {"overrides": dict(job.overrides), "initial_loss": 5.5, "spikes": 0}
        if value is not None:
            row |= {"val_loss": value, "test_loss": value + 0.05, "depth": job.recipe.model["num_hidden_layers"]}
        rows.append(row)
    return rows
