"""The command line: argument parsing only. Each verb calls one public function."""

from __future__ import annotations

import gc
import io
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spannorm.errors import DiskError, InputError, Interrupted, Stopped, shown
from spannorm.text import plain
from spannorm.values import Limits, checked

if TYPE_CHECKING:
    from spannorm.train.recipe import Recipe

app = typer.Typer(
    help="Decide where the norms of a deep Transformer go: train and compare placements on equal terms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe, such as recipes/demo.yaml.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Output folder; default runs/<recipe name>.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key, such as train.learning_rate=1e-3. Repeatable."),
]

Imports = Annotated[
    list[Path] | None,
    typer.Option("--import", metavar="FILE", help="A Python file of yours to run first: it may register placements."),
]

Jobs = Annotated[
    int,
    typer.Option("--jobs", metavar="N", min=0, max=1024, help="Runs at once; default one per GPU, or per CPU core."),
]

PrintCommands = Annotated[
    bool, typer.Option("--print-commands", help="Run nothing: print a command per unfinished job, for a scheduler.")
]

On = Annotated[str, typer.Option("--on", metavar="here|slurm", help="Where jobs run: docs/processes.md.")]
Slurm = Annotated[
    list[str] | None,
    typer.Option("--slurm", metavar="KEY=VALUE", help="Of each job, such as partition=gpu or time=240. Repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="With --on slurm: print what would be submitted.")]


def writable(path: Path | None) -> Path | None:
    """A file to be written after the work, tried before it."""
    from spannorm.files import check_writable

    return None if path is None else check_writable(path)


Finished = Annotated[
    list[Path] | None,
    typer.Option(
        "--results",
        metavar="FILE",
        help="Finished runs to take over: a file of `results merge`, or another comparison's folder. Repeatable.",
    ),
]


@app.command()
def train(
    recipe: RecipeFile,
    out: Out = None,
    overrides: Overrides = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="DIR", help="Folder of the tokens, for several runs to share; default DIR/data."
        ),
    ] = None,
    imports: Imports = None,
    print_torchtitan: Annotated[
        bool, typer.Option("--print-torchtitan", help="Run nothing: print the recipe as torchtitan's configuration.")
    ] = False,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Train one model. Run again with the same folder, it goes on from the last checkpoint."""
    from spannorm.train.processes import leave
    from spannorm.train.recipe import load_recipe
    from spannorm.train.run import train
    from spannorm.train.watch import train_and_show

    run_files(imports)
    loaded = load_recipe(recipe, overrides or ())
    folder = out or Path("runs") / loaded.name
    if print_torchtitan:
        from spannorm.train.data import prepare_data
        from spannorm.train.torchtitan_config import torchtitan_config

        typer.echo(torchtitan_config(loaded, prepare_data(loaded.data, data or folder / "data")), nl=False)
        return
    result = (
        train(loaded, folder, data=data, stop_with_parent=True) if worker else train_and_show(loaded, folder, data=data)
    )
    leave()
    if result["status"] == "failed":
        sys.exit(1)


@app.command()
def compare(
    recipe: RecipeFile,
    out: Out = None,
    overrides: Overrides = None,
    imports: Imports = None,
    jobs: Jobs = 0,
    print_commands: PrintCommands = False,
    cost_only: Annotated[bool, typer.Option("--cost", help="Run nothing: print what the runs come to.")] = False,
    on: On = "here",
    slurm: Slurm = None,
    dry_run: DryRun = False,
    finished: Finished = None,
) -> None:
    """Train a recipe's arms side by side; ends in a table, results.json and report.html. Resumes when run again."""
    from spannorm.lab.jobs.cost import cost, in_words, is_large
    from spannorm.lab.report.table import print_results
    from spannorm.train.recipe import load_recipe

    run_files(imports)
    loaded = load_recipe(recipe, overrides or ())
    if loaded.ladder.sizes:
        raise InputError("this recipe has a ladder: run it with `spannorm ladder`.")
    if cost_only or (is_large(loaded) and not print_commands):
        typer.echo(in_words(cost(loaded)))
    if not cost_only:
        show, taken = print_results, finished or ()
        _compared(loaded, out, imports or (), jobs, print_commands, on, slurm or (), dry_run, show, taken)


@app.command()
def ladder(
    recipe: RecipeFile,
    out: Out = None,
    overrides: Overrides = None,
    imports: Imports = None,
    jobs: Jobs = 0,
    print_commands: PrintCommands = False,
    plan: Annotated[bool, typer.Option("--plan", help="Run nothing: print rungs, runs, operations and hours.")] = False,
    on: On = "here",
    slurm: Slurm = None,
    dry_run: DryRun = False,
    finished: Finished = None,
) -> None:
    """Train each arm at several sizes: what it saves in compute, with intervals; the largest is predicted first."""
    from spannorm.lab.ladder.outcome import lines
    from spannorm.lab.ladder.run import forecast
    from spannorm.train.recipe import load_recipe

    run_files(imports)
    loaded = load_recipe(recipe, overrides or ())
    if not loaded.ladder.sizes:
        raise InputError("this recipe has no ladder.sizes: run it with `spannorm compare`, or see docs/ladder.md.")
    if plan:
        typer.echo("\n".join(forecast(loaded).lines))
        return

    def show(results: dict[str, Any], folder: Path) -> None:
        for line in lines(results["ladder"]) if "ladder" in results else ():
            typer.echo(line)
        typer.echo(f"results  {folder / 'results.json'}\nreport   {folder / 'report.html'}")

    _compared(loaded, out, imports or (), jobs, print_commands, on, slurm or (), dry_run, show, finished or ())


@app.command(name="max-lr")
def max_lr(
    recipe: RecipeFile,
    out: Out = None,
    overrides: Overrides = None,
    imports: Imports = None,
    jobs: Jobs = 0,
    peak: Annotated[float, typer.Option("--peak", help="Where the ramp ends, after train.steps steps.")] = 5e-2,
    print_commands: PrintCommands = False,
    on: On = "here",
    slurm: Slurm = None,
    dry_run: DryRun = False,
    finished: Finished = None,
) -> None:
    """Find the largest learning rate that each arm takes, by ramps; a table, results.json, report.html. Resumes."""
    from spannorm.lab.max_lr import print_tolerances, ramps
    from spannorm.train.recipe import load_recipe

    run_files(imports)
    loaded = ramps(load_recipe(recipe, overrides or ()), peak)

    def show(results: dict[str, Any], folder: Path) -> None:
        print_tolerances(results["jobs"])
        typer.echo(f"results  {folder / 'results.json'}\nreport   {folder / 'report.html'}")

    _compared(loaded, out, imports or (), jobs, print_commands, on, slurm or (), dry_run, show, finished or ())


def _compared(
    recipe: Recipe,
    out: Path | None,
    imports: Sequence[Path],
    jobs: int,
    print_commands: bool,
    on: str,
    slurm: Sequence[str],
    dry_run: bool,
    show: Callable[[dict[str, Any], Path], object],
    finished: Sequence[Path],
) -> None:
    """Run a comparison, or print what would be run."""
    from spannorm.lab.compare import compare
    from spannorm.lab.jobs.slurm import cluster

    folder = out or Path("runs") / recipe.name
    if print_commands or dry_run:
        typer.echo(_to_be_run(recipe, folder, imports, on, slurm, dry_run, finished), nl=False)
        return
    if pool := cluster(on, folder, slurm):
        folder = folder.absolute()
    results = compare(recipe, folder, imports=imports, at_once=jobs, pool=pool, finished=finished)
    show(results, folder)
    if not results["complete"]:
        sys.exit(1)


def _to_be_run(
    recipe: Recipe,
    out: Path,
    imports: Sequence[Path],
    on: str,
    slurm: Sequence[str],
    dry_run: bool,
    finished: Sequence[Path],
) -> str:
    """A command a line for each job that can be run now, or the array that they would be submitted as."""
    from spannorm.lab.compare import commands
    from spannorm.lab.jobs.slurm import parse_settings, sbatch_text

    if dry_run and on != "slurm":
        raise InputError("--dry-run is for --on slurm: here, --print-commands prints what would be run.")
    lines = commands(recipe, out, imports=imports, finished=finished)
    if not dry_run:
        return "".join(f"{line}\n" for line in lines)
    return sbatch_text(out / "slurm", lines, parse_settings(slurm)) + "\n" if lines else "# every job has its result\n"


results_app = typer.Typer(help="Finished runs of comparisons, to hand on.", no_args_is_help=True)
app.add_typer(results_app, name="results")


@results_app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Comparisons' folders, or merged files.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.")],
) -> None:
    """Collect finished runs in one file, for `compare --results` on another machine or another day."""
    from spannorm.lab.jobs.handover import merge

    kept, equal = merge(sources, out)
    typer.echo(f"{out}  {kept} finished runs" + (f", {equal} more were equal to one of them" if equal else ""))


@app.command()
def report(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A comparison's folder.")]) -> None:
    """Draw a comparison's report again, from its files alone."""
    from spannorm.lab.report.page import draw_report

    typer.echo(draw_report(directory))


@app.command(name="eval")
def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder, or a saved model's.")],
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="NAMES", help="local, paper, or lm-eval's names. Comma-separated.")
    ] = "local",
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Tokens for local tasks; default those of the run."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the results go; default DIR/eval.")
    ] = None,
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", min=0, max=1 << 20, help="Of each task at most; 0 takes all.")
    ] = 500,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, max=1 << 20, help="Sequences at once.")
    ] = 16,
) -> None:
    """Evaluate a saved model through lm-eval: on questions made from held-out text, or on any of lm-eval's tasks."""
    from rich.text import Text

    from spannorm.console import wide_console
    from spannorm.evaluate.table import print_scores
    from spannorm.train.evaluation import RESULTS, evaluate_folder

    console = wide_console()
    with console.status(Text("loading")) as status:
        results = evaluate_folder(
            directory, listed(tasks), data=data, out=out, count=questions, batch_size=batch_size,
            on_task=lambda name: status.update(Text(name)),
        )  # fmt: skip
    print_scores(results["tasks"], results["model"], console)
    typer.echo(f"results  {(out or directory / 'eval') / RESULTS}")


@app.command(name="depth-use")
def depth_use(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder, or that of any causal LM.")],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Tokens to read; default those of the run.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Text to read instead, by the model's own tokenizer.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the results go; default DIR/depth-use.")
    ] = None,
    sequences: Annotated[int, typer.Option("--sequences", metavar="N", min=1, help="To measure on.")] = 16,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Sequences at once.")] = 8,
    reach: Annotated[
        int | None, typer.Option("--reach", metavar="N", min=0, help="Exchange blocks at most so far apart.")
    ] = None,
    imports: Imports = None,
) -> None:
    """Measure how a saved model uses its depth: what each block is good for, and what it is for the others."""
    from spannorm.console import wide_console
    from spannorm.lab.depth.use import PICTURE, RESULTS, print_use, use_of_folder

    run_files(imports)
    console = wide_console()
    with console.status("measuring"):
        results = use_of_folder(
            directory, data=data, text=text, out=out, sequences=sequences, batch_size=batch_size, reach=reach
        )
    print_use(results, console)
    folder = out or directory / "depth-use"
    typer.echo(f"results  {folder / RESULTS}\npicture  {folder / PICTURE}")


@app.command()
def publish(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder, or a saved model's.")],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FOLDER|hub:OWNER/NAME", help="Default DIR/published. Only hub: uploads."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="On the Hub: public; default private.")] = False,
    imports: Imports = None,
) -> None:
    """Make a folder that Transformers loads without spannorm: one modeling file, weights, tokenizer, model card."""
    from spannorm.publishing.publish import publish

    run_files(imports)
    typer.echo(publish(directory, to, private=not public))


@app.command()
def data(recipe: RecipeFile, out: Out = None, overrides: Overrides = None) -> None:
    """Prepare a recipe's tokens, for `train --data`."""
    from spannorm.train.data import prepare_data
    from spannorm.train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    tokens = prepare_data(loaded.data, out or Path("runs") / loaded.name / "data", same_corpus=True)
    for name, split in tokens.splits.items():
        typer.echo(f"{name:10}  {split.tokens:>14,} tokens  {split.documents:>9,} documents")
    typer.echo(f"{tokens.directory}  sha256 {tokens.sha256[:16]}")


@app.command()
def placements(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One placement: draws its data flow.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the list as JSON too.", callback=writable)
    ] = None,
    imports: Imports = None,
) -> None:
    """List the placements: equation, default depth rule, recommended base init, source."""
    from dataclasses import asdict

    from spannorm.catalog import as_text, catalog, entry, print_entries
    from spannorm.files import write_json

    run_files(imports)
    entries = [entry(name)] if name else catalog()
    if name:
        typer.echo(as_text(entries[0]))
    else:
        print_entries(entries)
    if json_file:
        write_json(json_file, [asdict(e) for e in entries])


Comma = "Comma-separated."
Placements = Annotated[str, typer.Option("--placements", metavar="NAMES", help=f"Placements. {Comma}")]
DepthRules = Annotated[
    str, typer.Option("--depth-rules", metavar="RULES", help=f"Depth rules; `default` is the placement's own. {Comma}")
]
Depths = Annotated[str, typer.Option("--depths", metavar="BLOCKS", help=f"Depths in blocks. {Comma}")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write all numbers as JSON too.", callback=writable),
]


def image(path: Path | None) -> Path | None:
    if path is not None and path.suffix not in (".png", ".svg"):
        raise InputError(f"--plot draws .png or .svg; got {path}.")
    return writable(path)


PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw them: .png or .svg.", callback=image)
]
HtmlFile = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write them as one page to explore, without a network.")
]
Sizes = Annotated[
    Path | None,
    typer.Argument(metavar="[RECIPE]", help="Sizes, text and training; default a model of width 64."),
]


@app.command()
def theory(
    recipe: Sizes = None,
    placements: Placements = "pre,post,span",
    depth_rules: DepthRules = "none,default,1/sqrt(L)",
    depths: Depths = "8,32,128",
    json_file: JsonFile = None,
    plot: PlotFile = None,
    html: HtmlFile = None,
    overrides: Overrides = None,
    imports: Imports = None,
) -> None:
    """Predict signal and gradient at initialization, and say what they mean. Builds no model."""
    from spannorm.lab.depth.theory import cases, sizes, theory_of
    from spannorm.lab.depth.words import progress, show

    run_files(imports)
    sized = sizes(recipe, overrides or ())
    chosen = cases(sized, listed(placements), listed(depth_rules), numbers("--depths", depths))
    with progress(len(chosen), "") as on_case:
        results = theory_of(chosen, on_case)
    if html:
        from spannorm.lab.depth.explorer import write_explorer

        write_explorer(chosen, html)
    show(chosen, results, json_file, plot)


@app.command()
def audit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A folder with config.json, a family such as llama, a Hub name such as Qwen/Qwen3-8B (its "
            "configuration alone is downloaded), or module:function, which returns a model.",
        ),
    ],
    json_file: JsonFile = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when something is off: for a CI.")] = False,
) -> None:
    """Find out how a model is really wired and drawn, from a small one that is run on CPU, and say what is off."""
    from spannorm.auditing import audit_target, resolve, show
    from spannorm.files import write_json

    found = audit_target(resolve(target))
    show(found)
    if json_file:
        write_json(json_file, found.to_dict())
    if strict and not found.ok:
        sys.exit(1)


@app.command(name="depth-check")
def depth_check(
    recipe: Sizes = None,
    placements: Placements = "pre,post,span",
    depth_rules: DepthRules = "none,1/sqrt(L)",
    depths: Depths = "8,32,128",
    steps: Annotated[str, typer.Option("--steps", metavar="STEPS", help=f"When to measure. {Comma}")] = "0,20",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, max=1000, help="Models per stack.")] = 1,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    overrides: Overrides = None,
    imports: Imports = None,
) -> None:
    """Compare the theory with real models, at init and after training, and say which placements will train."""
    from spannorm.lab.depth.check import depth_check
    from spannorm.lab.depth.theory import cases, sizes
    from spannorm.lab.depth.words import progress, show

    run_files(imports)
    sized = sizes(recipe, overrides or ())
    chosen = cases(sized, listed(placements), listed(depth_rules), numbers("--depths", depths))
    with progress(len(chosen)) as on_case:
        results = depth_check(
            chosen, steps=numbers("--steps", steps), seeds=seeds, data=Path("runs") / sized.name / "data",
            on_case=on_case,
        )  # fmt: skip
    show(chosen, results, json_file, plot)


def listed(text: str) -> list[str]:
    """Parts between commas; a comma in brackets belongs to its part, as in `1/sqrt(L):gain(0.283,0.432)`."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in listed(text)]
    except ValueError:
        raise InputError(f"{option} takes whole numbers, comma-separated; got {shown(text)}.") from None
    return [checked(int, number, option, Limits(least=0, most=10**8)) for number in found]


def run_files(paths: list[Path] | None) -> None:
    """Run the user's own files, which register placements."""
    import runpy

    for path in paths or ():
        if not path.is_file():
            raise InputError(f"--import takes a Python file; there is none at {path}.")
        runpy.run_path(str(path))


def _stopping_on_signals() -> dict[int, Any]:
    """From here on Ctrl-C and SIGTERM end the work wherever it is, and it cleans up; what was set before."""

    def stop(number: int, _: Any) -> None:
        raise Interrupted(130 if number == signal.SIGINT else 75)

    wanted = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    here = threading.current_thread() is threading.main_thread()
    return {number: signal.signal(number, stop) for number in wanted} if here else {}


def _empty(words: list[str]) -> str | None:
    """What stands before an argument without a character in it, or the option itself (`--out=`)."""
    for before, word in zip(["spannorm", *words], words, strict=False):
        if not word.strip() or re.fullmatch(r"--[\w-]+=\s*", word):
            return word if word.strip() else before if before.startswith("--") else f"the argument after {before}"
    return None


def _is_first() -> bool:
    """Whether this process speaks for those that torchrun started; a signal may come before PyTorch is imported."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Run the command line: 0 done, 1 a run failed or crashed, 2 bad input, 130 or 75 stopped and saved (`Stopped`)."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 shows what it cannot with a backslash
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    quick = sys.argv[1:2] in (["theory"], ["placements"])  # most of their time is loading PyTorch
    if quick:
        gc.disable()
    before = _stopping_on_signals()
    try:
        if (empty := _empty(sys.argv[1:])) is not None:  # an empty path would be the current folder
            raise InputError(f"{empty} is empty: give it a value, or leave it out.")
        app()
    except InputError as error:
        if _is_first() or isinstance(error, DiskError):  # all other input is the same for every process
            typer.secho(f"error: {plain(error)}", fg="red", err=True)
        sys.exit(2)
    except (OSError, UnicodeError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        said = getattr(error, "strerror", None) or error
        what = getattr(error, "filename", None)
        typer.secho(f"error: {plain(f'{said}: {what}' if what else said)}", fg="red", err=True)
        sys.exit(2)
    except (Stopped, Interrupted) as stop:
        if _is_first():
            typer.echo(plain(f"{stop}. Go on with: spannorm {shlex.join(sys.argv[1:])}"), err=True)
        sys.exit(stop.exit_code)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if quick and "triton" not in sys.modules:  # whose bindings count what is left at the end, and complain
            gc.freeze()  # else the end of the process looks through everything once more: a third of a second
