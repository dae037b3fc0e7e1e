"""A comparison: arms × grid as independent, resumable jobs, several at once, and their results in one file.

A comparison's folder:

    comparison.json   the recipe
    data/             tokens, shared by all jobs
    jobs/<job>/       one run each (see spannorm.train.run), with log.txt
    results.json      every job's result, with recipe, versions, machine and data hash (spannorm.lab.results.files)
    report.html       drawn from the files above alone
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spannorm import folders
from spannorm.console import PlainConsole, say
from spannorm.errors import InputError, Stopped
from spannorm.files import alone_in, make_folder, read_json, write_json, writing_to
from spannorm.folders import claim, sweep
from spannorm.lab.jobs.handover import handed_over
from spannorm.lab.jobs.plan import Job, Plan
from spannorm.lab.jobs.runner import Pool, Runner
from spannorm.lab.ladder.plan import LadderPlan
from spannorm.lab.ladder.run import ladder_outcome, sealed
from spannorm.lab.report.page import draw_report
from spannorm.lab.results.files import FORMAT, RESULTS, JobResult
from spannorm.lab.results.summary import summarize_conditions
from spannorm.lab.results.tolerance import tolerances
from spannorm.train.data import TokenData, prepare_data
from spannorm.train.environment import machine, versions
from spannorm.train.evaluation import tasks_of
from spannorm.train.needs import Needs
from spannorm.train.recipe import DataRecipe, Recipe
from spannorm.train.run import differences, model_config, run_recipe

logger = logging.getLogger("spannorm")

_MANY = 100
"""Runs beyond which planning them is worth a word."""
COMPARISON = "comparison.json"


def compare(
    recipe: Recipe,
    out: Path,
    *,
    imports: Sequence[Path] = (),
    at_once: int = 0,
    pool: Pool | None = None,
    finished: Sequence[Path] = (),
) -> dict[str, Any]:
    """Run a comparison, or go on with it, and return what `results.json` holds.

    Args:
        imports: Python files that every job runs first, to register placements of the user's own.
        at_once: how many jobs; 0: one per GPU, or as many as the cores carry at `train.threads` each (0: one thread).
        pool: where jobs run, with `out` on a file system of theirs; None: here.
        finished: folders of other comparisons, or files of `spannorm results merge`, whose runs are taken over where
            they are the same (spannorm.lab.jobs.handover).

    A finished job is never run twice; an interrupted one goes on from its last checkpoint.

    Raises:
        InputError: bad recipe or folder, before any time is spent.
        Stopped: Ctrl-C, after the running jobs have saved.
    """
    with _opened(recipe, out, imports, at_once, pool, finished=finished) as (runner, about):

        def record(last: bool = True) -> dict[str, Any]:
            jobs = runner.job_results()
            outcome = _outcome(recipe, runner, out, jobs, last)
            results = {"format": FORMAT, **about, "complete": last and runner.complete(), **outcome, "jobs": jobs}
            write_json(out / RESULTS, results)
            return results

        try:
            runner.run(f"{recipe.name}: {Needs(**about['needs'])} each at most", on_finish=lambda: record(last=False))
        except Stopped:
            record(last=False)  # at once
            record()
            try:
                draw_report(out)
            except InputError as error:  # what is in the way of the report is said, and the work stands
                logger.warning("no report: %s", error)
            raise
        results = record()
        draw_report(out)
    return results


def commands(recipe: Recipe, out: Path, *, imports: Sequence[Path] = (), finished: Sequence[Path] = ()) -> list[str]:
    """A shell command for each job that is not finished and can be known, for any scheduler; tokens are made ready.

    Under a protocol the jobs of the next round depend on this one's: ask again until nothing is left. `compare` then
    gathers the results without running anything. Errors are those of `compare`.
    """
    imports = [path.absolute() for path in imports]
    with _opened(recipe, out.absolute(), imports, 0, here=False, finished=finished) as (runner, _):
        return runner.commands()


@contextmanager
def _opened(
    recipe: Recipe,
    out: Path,
    imports: Sequence[Path],
    at_once: int,
    pool: Pool | None = None,
    here: bool = True,
    finished: Sequence[Path] = (),
) -> Iterator[tuple[Runner, dict[str, Any]]]:
    """A comparison's folder with its data ready, for one process alone."""
    claim(out, folders.COMPARISON)
    least = len(recipe.compare.arms) * math.prod(map(len, recipe.compare.grid.values()))
    if least > _MANY:
        say(PlainConsole(stderr=True), f"planning {least:,} runs")
    plan = LadderPlan(recipe, here) if recipe.ladder.sizes else Plan(recipe, here)
    make_folder(out)
    with alone_in(out), writing_to(out):
        sweep(out)
        _check_same_comparison(recipe, out)
        jobs = plan.jobs({})
        data = {job.recipe.data: _data_folder(out, job.recipe.data) for job in jobs}
        tokens = {recipe_of_data: prepare_data(recipe_of_data, folder) for recipe_of_data, folder in data.items()}
        for job in _apart(jobs):
            model_config(job.recipe, tokens[job.recipe.data])
        _check_tasks(jobs, tokens)
        write_json(out / COMPARISON, {"recipe": recipe.to_dict()})
        # the first run's: a recipe may leave its sizes to its arms or its grid
        about = _about(recipe, jobs[0], tokens[jobs[0].recipe.data])
        about["needs"] = asdict(plan.largest) if plan.largest else None
        planner = plan.jobs if isinstance(plan, Plan) else sealed(plan, out)
        planner = handed_over(planner, finished, tokens, out)
        yield Runner(out, planner, tokens, imports, at_once, pool), about


def _apart(jobs: Sequence[Job]) -> list[Job]:
    """One job of each kind: others differ in their seeds and learning rates alone."""
    first: dict[str, Job] = {}
    for job in jobs:
        raw = run_recipe(job.recipe)
        train = {key: value for key, value in raw["train"].items() if key not in ("seed", "learning_rate")}
        first.setdefault(json.dumps([raw["model"], raw["data"], train]), job)
    return list(first.values())


def _check_tasks(jobs: Sequence[Job], tokens: Mapping[DataRecipe, TokenData]) -> None:
    """Load what jobs are evaluated on, once each, before any of them is run."""
    seen = set()
    for job in _apart(jobs):
        t, context = job.recipe.train, model_config(job.recipe).max_position_embeddings
        questions = (t.evaluate, t.evaluate_questions, job.recipe.data, context)
        if t.evaluate and questions not in seen:
            tasks_of(t, tokens[job.recipe.data], context)
            seen.add(questions)


def _check_same_comparison(recipe: Recipe, out: Path) -> None:
    if claim(out, folders.COMPARISON):
        begun = read_json(out / COMPARISON)["recipe"]
        different = differences(begun, json.loads(json.dumps(recipe.to_dict())))
        if different:
            raise InputError(
                f"{out} already holds another comparison: {'; '.join(different)}. Choose another --out folder."
            )


def _outcome(recipe: Recipe, runner: Runner, out: Path, jobs: list[JobResult], last: bool) -> dict[str, Any]:
    """What the jobs show: of a ladder its curves (which take a minute: once, at the end), under a protocol each
    condition, of ramps each arm's tolerance."""
    if recipe.ladder.sizes:
        return {"ladder": ladder_outcome(recipe, runner.results, out)} if last else {}
    protocol = recipe.compare.protocol
    if protocol.seeds:
        return {"summary": [asdict(condition) for condition in summarize_conditions(jobs, protocol.pairs)]}
    return {"tolerances": [asdict(t) for t in measured]} if (measured := tolerances(jobs)) else {}


def _data_folder(out: Path, recipe: DataRecipe) -> Path:
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:8]
    return out / "data" / digest


def _about(recipe: Recipe, first: Job, tokens: TokenData) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "recipe": recipe.to_dict(),
        "model_config": model_config(first.recipe, tokens).to_dict(),
        "versions": versions(),
        "machine": machine(),
        "data": {
            "corpus": recipe.data.corpus,
            "sha256": tokens.sha256,
            "corpus_sha256": tokens.corpus_sha256,
            "tokenizer": recipe.data.tokenizer,
            "vocab_size": tokens.vocab_size,
            "training_tokens": tokens.splits["train"].tokens,
        },
    }
