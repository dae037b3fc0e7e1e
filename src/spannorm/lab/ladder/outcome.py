"""A ladder's results: curves, compute multipliers with intervals, the prediction of the largest size, and words.

Reads the rows of finished runs alone, so that it can be made again on another machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spannorm.lab.jobs.plan import Done
from spannorm.lab.ladder.fit import SIZE_AND_TOKENS, Fit, Point, bootstrap, fit
from spannorm.lab.ladder.plan import HELD_OUT, LadderPlan
from spannorm.lab.ladder.sizes import Rung

BEYOND = (10.0, 100.0)
"""How far beyond the largest size multipliers are stated, as extrapolation."""

Results = Mapping[str, Mapping[str, Any]]
"""By the name of a finished job, what it came to."""


def points(plan: LadderPlan, results: Results, done: Done, held_out: bool = True) -> list[Point]:
    """The finished runs that curves go through: of each rung the arm's own rate, without those that failed."""
    points = []
    for step in plan.steps(done):
        result = results.get(step.job.name)
        if result is None or result["status"] == "failed" or (step.stage == HELD_OUT and not held_out):
            continue
        arm, i = step.job.arm, plan.rungs.index(step.rung)
        rate = own_rate(plan, arm, i, done)
        if rate is not None and step.job.recipe.train.learning_rate == rate:
            size = plan.parameters(arm, i)
            points.append(Point(arm, i, step.job.recipe.train.seed, size, step.rung.tokens, result["test_loss"]))
    return points


def own_rate(plan: LadderPlan, arm: str, i: int, done: Done) -> float | None:
    """The rate at which an arm stands on a rung: its best on the smallest sizes, the carried one above them."""
    index = plan.arms.index(arm)
    if i < plan.recipe.ladder.rate_sizes:
        return plan.best(index, i, done)
    best = plan.best(index, plan.recipe.ladder.rate_sizes - 1, done)
    return None if best is None else plan.carried(best, i)


def prediction(plan: LadderPlan, results: Results, done: Done) -> dict[str, Any] | None:
    """What each arm's largest size is predicted to come to, from the smaller sizes alone; None before they are done."""
    steps = plan.steps(done, sealed=False)
    if any(step.job.name not in results for step in steps) or not plan.settled(done):
        return None
    known = [p for p in points(plan, results, done, held_out=False) if p.rung < plan.sizes - 1]
    known = [p for p in known if len({q.rung for q in known if q.arm == p.arm}) >= 3]
    rung = plan.rungs[plan.sizes - 1]
    if not known:
        return {"rung": rung.name, "losses": {}}
    curve = fit(known)
    compute = {arm: 6.0 * plan.parameters(arm, plan.sizes - 1) * rung.tokens for arm in curve.powers}
    low, high = bootstrap(known, lambda f: [f.loss(arm, c) for arm, c in compute.items()])
    return {
        "rung": rung.name,
        "losses": {
            arm: {"loss": curve.loss(arm, c), "low": float(low[i]), "high": float(high[i])}
            for i, (arm, c) in enumerate(compute.items())
        },
    }


def outcome(plan: LadderPlan, results: Results, predicted: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything that `results.json` holds under `ladder`."""
    done = {name: None if r["status"] == "failed" else r["val_loss"] for name, r in results.items()}
    settled = plan.settled(done)
    known = points(plan, results, done) if settled else []
    # a rung counts once all arms have finished it: curves through different sizes say nothing of each other
    under_way = {plan.rungs.index(step.rung) for step in plan.steps(done) if step.job.name not in results}
    whole = [p for p in known if p.rung not in under_way]
    main = [p for p in whole if p.rung < plan.sizes]
    main = [p for p in main if len({q.rung for q in main if q.arm == p.arm}) >= 3]
    result: dict[str, Any] = {
        "rungs": [_rung(rung) for rung in plan.rungs],
        "points": [_point(p, plan.rungs[p.rung]) for p in known],
        "rates": _rates(plan, done) if settled else {},
        "checks": _checks(plan, results, done) if settled else [],
        "prediction": _held_out(plan, main, predicted),
        "fit": None, "fit_size_and_tokens": None, "pairs": [],
    }  # fmt: skip
    if main:
        curve = fit(main)
        result["fit"] = _fit(curve, [{"arm": p.arm, "rung": p.rung, "seed": p.seed} for p in main])
        result["pairs"] = _pairs(curve, main, plan)
    every = [p for p in whole if len({(q.parameters, q.tokens) for q in whole if q.arm == p.arm}) >= 6]
    if every and any(rung.kind == "tokens" for rung in plan.rungs):
        result["fit_size_and_tokens"] = _fit(fit(every, SIZE_AND_TOKENS), [])
    result["words"] = words(result)
    return result


def _rung(rung: Rung) -> dict[str, Any]:
    return {"name": rung.name, "kind": rung.kind, "blocks": rung.blocks, "width": rung.width,
            "parameters": rung.parameters, "tokens": rung.tokens, "compute": rung.compute,
            "tokens_per_parameter": rung.ratio}  # fmt: skip


def _point(p: Point, rung: Rung) -> dict[str, Any]:
    return {"arm": p.arm, "rung": rung.name, "kind": rung.kind, "seed": p.seed, "compute": p.compute, "loss": p.loss}


def _fit(curve: Fit, at: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    arms = {arm: [{"loss_at_scale": a, "exponent": power} for a, power in terms] for arm, terms in curve.powers.items()}
    rows = [{**where, "residual": r} for where, r in zip(at, curve.residuals, strict=False)]
    worst = max(map(abs, curve.residuals), default=0.0)
    return {"irreducible": curve.irreducible, "scales": list(curve.scales), "arms": arms, "residuals": rows,
            "largest_residual": worst}  # fmt: skip


def _rates(plan: LadderPlan, done: Done) -> dict[str, dict[str, float | None]]:
    return {arm: {rung.name: own_rate(plan, arm, i, done) for i, rung in enumerate(plan.rungs)} for arm in plan.arms}


def _checks(plan: LadderPlan, results: Results, done: Done) -> list[dict[str, Any]]:
    """Of each arm, how the carried rate did at the first size beyond, beside half and twice of it."""
    checks, i = [], plan.recipe.ladder.rate_sizes
    for arm in plan.arms:
        carried = own_rate(plan, arm, i, done)
        losses = {
            step.job.recipe.train.learning_rate: results[step.job.name]["val_loss"]
            for step in plan.steps(done)
            if step.job.arm == arm and step.rung is plan.rungs[i] and step.job.name in results
            and step.job.recipe.train.seed == plan.recipe.train.seed
            and results[step.job.name]["status"] != "failed"
        }  # fmt: skip
        if carried is not None and losses:
            best = min(losses, key=lambda rate: losses[rate])
            checks.append({"arm": arm, "rung": plan.rungs[i].name, "carried": carried, "losses": losses, "best": best})
    return checks


def _held_out(plan: LadderPlan, main: Sequence[Point], predicted: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The prediction beside what was measured."""
    if predicted is None:
        return None
    losses = {}
    for arm, forecast in predicted["losses"].items():
        measured = [p.loss for p in main if p.arm == arm and p.rung == plan.sizes - 1]
        mean = math.fsum(measured) / len(measured) if measured else None
        losses[arm] = {**forecast, "measured": mean, "error": None if mean is None else mean - forecast["loss"]}
    return {"rung": predicted["rung"], "losses": losses}


def _pairs(curve: Fit, main: Sequence[Point], plan: LadderPlan) -> list[dict[str, Any]]:
    """Of each pair, how many times the first's compute the second takes to the loss that the second comes to, by size
    and beyond. What lies above the largest size that both were measured at is extrapolated.

    The intervals come from the same kind of fit as the multipliers: of every arm at once.
    """
    sizes = [rung.compute for rung in plan.rungs[: plan.sizes]]
    at = [*sizes, *(sizes[-1] * factor for factor in BEYOND)]
    largest = {arm: max(p.rung for p in main if p.arm == arm) for arm in curve.powers}
    known = [(a, b, min(largest[a], largest[b])) for _, a, b in plan.plan.pairs if a in largest and b in largest]

    if not known:
        return []

    def measured(f: Fit) -> list[float]:
        """For each pair the log of its multiplier at each compute, and the slope of that."""
        numbers = []
        for first, second, last in known:
            values = [math.log(f.multiplier(first, second, f.loss(second, compute))) for compute in at]
            numbers += [*values, (values[last] - values[0]) / math.log(at[last] / at[0])]
        return numbers

    by_pair = np.array([measured(curve), *bootstrap(main, measured)]).reshape(3, len(known), -1)
    pairs = []
    for (first, second, last), numbers in zip(known, by_pair.transpose(1, 2, 0), strict=True):
        *multipliers, slope = numbers.tolist()
        rows = [
            {"compute": compute, **dict(zip(("multiplier", "low", "high"), map(math.exp, row), strict=True)),
             "extrapolated": i > last}
            for i, (compute, row) in enumerate(zip(at, multipliers, strict=True))
        ]  # fmt: skip
        trend = dict(zip(("slope", "low", "high"), slope, strict=True))
        pairs.append({"first": first, "second": second, "multipliers": rows, "trend": trend})
    return pairs


def words(result: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    sentences: list[str] = []
    for pair in result["pairs"]:
        last = [row for row in pair["multipliers"] if not row["extrapolated"]][-1]
        numbers = f"{last['multiplier']:.2f}, 95 % interval {last['low']:.2f} to {last['high']:.2f}"
        if last["low"] > 1:
            statement = f"{pair['first']} saves compute over {pair['second']}"
        elif last["high"] < 1:
            statement = f"{pair['first']} needs more compute than {pair['second']}"
        else:
            statement = f"no difference in compute shown between {pair['first']} and {pair['second']}"
        trend = pair["trend"]
        way = "grows" if trend["low"] > 0 else "shrinks" if trend["high"] < 0 else "shows no trend"
        where = f"{last['compute']:.2g} operations"
        sentences.append(f"{statement} at {where}: compute multiplier {numbers}; with size it {way}")
    for arm, loss in ((result["prediction"] or {}).get("losses") or {}).items():
        if loss["error"] is not None:
            inside = "inside" if loss["low"] <= loss["measured"] <= loss["high"] else "outside"
            sentences.append(
                f"{arm}: the largest size was predicted to come to {loss['loss']:.4f} ({loss['low']:.4f} to "
                f"{loss['high']:.4f}) and came to {loss['measured']:.4f}, {inside} the interval"
            )
    for arm, rates in result["rates"].items():
        if not any(rates.values()):
            sentences.append(f"{arm} failed at every learning rate of the smallest sizes: it has no curve")
    for check in result["checks"]:
        if check["best"] != check["carried"]:
            sentences.append(
                f"{check['arm']}: at {check['rung']} the carried learning rate {check['carried']:g} is not the best of "
                f"three; {check['best']:g} is"
            )
    return sentences


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The multipliers and the words, for a terminal."""
    for pair in result["pairs"]:
        yield f"compute multiplier of {pair['first']} over {pair['second']}"
        for row in pair["multipliers"]:
            mark = "  extrapolated" if row["extrapolated"] else ""
            yield (
                f"  {row['compute']:.2e} operations  {row['multiplier']:6.3f}  "
                f"({row['low']:.3f} to {row['high']:.3f}){mark}"
            )
    yield from result["words"]
