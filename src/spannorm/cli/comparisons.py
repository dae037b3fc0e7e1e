"""`compare`, `ladder`, `max-lr`, `report` and `results merge`: many runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spannorm.cli.options import Imports, JsonFile, Out, Overrides, RecipeFile, grouped, run_files, write
from spannorm.errors import InputError

if TYPE_CHECKING:
    from spannorm.train.recipe import Recipe


@dataclass(frozen=True)
class Comparison:
    """Options of every verb that runs a comparison."""

    recipe: RecipeFile
    out: Out = None
    overrides: Overrides = None
    imports: Imports = None
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", metavar="N", min=0, max=1024, help="Runs at once; default one per GPU, or per CPU core."
        ),
    ] = 0
    print_commands: Annotated[
        bool,
        typer.Option("--print-commands", help="Run nothing: print a command per unfinished job, for a scheduler."),
    ] = False
    on: Annotated[str, typer.Option("--on", metavar="here|slurm", help="Where jobs run: docs/processes.md.")] = "here"
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            "--slurm", metavar="KEY=VALUE", help="Of each job, such as partition=gpu or time=240. Repeatable."
        ),
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --on slurm: print what would be submitted.")] = False
    finished: Annotated[
        list[Path] | None,
        typer.Option(
            "--results",
            metavar="FILE",
            help="Finished runs to take over: a file of `results merge`, or another comparison's folder. Repeatable.",
        ),
    ] = None
    json_file: JsonFile = None

    def load(self) -> Recipe:
        """The recipe, its overrides laid over it, after the user's own files were run."""
        from spannorm.train.recipe import load_recipe

        run_files(self.imports)
        if self.json_file and (self.print_commands or self.dry_run):
            raise InputError("--json writes results, and --print-commands and --dry-run run nothing: leave it out.")
        return load_recipe(self.recipe, self.overrides or ())


@grouped(Comparison)
def compare(
    options: Comparison,
    cost_only: Annotated[bool, typer.Option("--cost", help="Run nothing: print what the runs come to.")] = False,
) -> None:
    """Train a recipe's arms side by side; ends in a table, results.json and report.html. Resumes when run again."""
    from spannorm.lab.jobs.cost import cost, in_words, is_large
    from spannorm.lab.report.table import print_results

    recipe = options.load()
    if recipe.ladder.sizes:
        raise InputError("this recipe has a ladder: run it with `spannorm ladder`.")
    if cost_only or (is_large(recipe) and not options.print_commands):
        costs = cost(recipe)
        typer.echo(in_words(costs))
        if cost_only:
            write(options.json_file, {**asdict(costs), "gpu_hours": costs.gpu_hours})
    if not cost_only:
        _run(recipe, options, print_results)


@grouped(Comparison)
def ladder(
    options: Comparison,
    plan: Annotated[bool, typer.Option("--plan", help="Run nothing: print rungs, runs, operations and hours.")] = False,
) -> None:
    """Train each arm at several sizes: what it saves in compute, with intervals; the largest is predicted first."""
    from spannorm.lab.ladder.outcome import lines
    from spannorm.lab.ladder.run import forecast

    recipe = options.load()
    if not recipe.ladder.sizes:
        raise InputError("this recipe has no ladder.sizes: run it with `spannorm compare`, or see docs/ladder.md.")
    if plan:
        planned = forecast(recipe)
        typer.echo("\n".join(planned.lines))
        write(options.json_file, asdict(planned))
        return

    def show(results: dict[str, Any], folder: Path) -> None:
        for line in lines(results["ladder"]) if "ladder" in results else ():
            typer.echo(line)
        _echo_files(folder)

    _run(recipe, options, show)


@grouped(Comparison)
def max_lr(
    options: Comparison,
    peak: Annotated[float, typer.Option("--peak", help="Where the ramp ends, after train.steps steps.")] = 5e-2,
) -> None:
    """Find the largest learning rate that each arm takes, by ramps; a table, results.json, report.html. Resumes."""
    from spannorm.lab.max_lr import print_tolerances, ramps

    def show(results: dict[str, Any], folder: Path) -> None:
        print_tolerances(results["jobs"])
        _echo_files(folder)

    _run(ramps(options.load(), peak), options, show)


def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Comparisons' folders, or merged files.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.")],
) -> None:
    """Collect finished runs in one file, for `compare --results` on another machine or another day."""
    from spannorm.lab.jobs.handover import merge

    kept, equal = merge(sources, out)
    typer.echo(f"{out}  {kept} finished runs" + (f", {equal} more were equal to one of them" if equal else ""))


def report(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A comparison's folder.")]) -> None:
    """Draw a comparison's report again, from its files alone."""
    from spannorm.lab.report.page import draw_report

    typer.echo(draw_report(directory))


def _echo_files(folder: Path) -> None:
    typer.echo(f"results  {folder / 'results.json'}\nreport   {folder / 'report.html'}")


def _run(recipe: Recipe, options: Comparison, show: Callable[[dict[str, Any], Path], object]) -> None:
    """Run a comparison, or print what would be run."""
    from spannorm.lab.compare import compare
    from spannorm.lab.jobs.slurm import cluster

    folder = options.out or Path("runs") / recipe.name
    if options.print_commands or options.dry_run:
        typer.echo(_to_be_run(recipe, folder, options), nl=False)
        return
    if pool := cluster(options.on, folder, options.slurm or ()):
        folder = folder.absolute()
    results = compare(
        recipe, folder, imports=options.imports or (), at_once=options.jobs, pool=pool, finished=options.finished or ()
    )
    show(results, folder)
    write(options.json_file, results)
    if not results["complete"]:
        sys.exit(1)


def _to_be_run(recipe: Recipe, out: Path, options: Comparison) -> str:
    """A command a line for each job that can be run now, or the array that they would be submitted as."""
    from spannorm.lab.compare import commands
    from spannorm.lab.jobs.slurm import parse_settings, sbatch_text

    if options.dry_run and options.on != "slurm":
        raise InputError("--dry-run is for --on slurm: here, --print-commands prints what would be run.")
    lines = commands(recipe, out, imports=options.imports or (), finished=options.finished or ())
    if not options.dry_run:
        return "".join(f"{line}\n" for line in lines)
    settings = parse_settings(options.slurm or ())
    return sbatch_text(out / "slurm", lines, settings) + "\n" if lines else "# every job has its result\n"
