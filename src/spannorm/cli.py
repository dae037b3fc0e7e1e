"""The command line: argument parsing only. Each verb calls one public function."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from spannorm.errors import InputError, Stopped

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
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Train one model. Run again with the same folder, it goes on from the last checkpoint."""
    from spannorm.train.recipe import load_recipe
    from spannorm.train.run import train
    from spannorm.train.watch import train_and_show

    loaded = load_recipe(recipe, overrides or ())
    folder = out or Path("runs") / loaded.name
    result = (
        train(loaded, folder, data=data, stop_with_parent=True) if worker else train_and_show(loaded, folder, data=data)
    )
    if result["status"] == "failed":
        sys.exit(1)


@app.command()
def compare(recipe: RecipeFile, out: Out = None, overrides: Overrides = None) -> None:
    """Train a recipe's arms side by side; ends in a table, results.json and report.html. Resumes when run again."""
    from spannorm.lab.compare import compare
    from spannorm.lab.table import print_results
    from spannorm.train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    folder = out or Path("runs") / loaded.name
    results = compare(loaded, folder)
    print_results(results, folder)
    if not results["complete"]:
        sys.exit(1)


@app.command()
def report(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A comparison's folder.")]) -> None:
    """Draw a comparison's report again, from its files alone."""
    from spannorm.lab.report import draw_report

    typer.echo(draw_report(directory))


@app.command()
def data(recipe: RecipeFile, out: Out = None, overrides: Overrides = None) -> None:
    """Prepare a recipe's tokens, for `train --data`."""
    from spannorm.train.data import prepare_data
    from spannorm.train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    tokens = prepare_data(loaded.data, out or Path("runs") / loaded.name / "data")
    for name, split in tokens.splits.items():
        typer.echo(f"{name:10}  {split.tokens:>14,} tokens  {split.documents:>9,} documents")
    typer.echo(f"{tokens.directory}  sha256 {tokens.sha256[:16]}")


def main() -> None:
    """Run the command line: 0 done, 1 a run failed or crashed, 2 bad input, 130 stopped and saved."""
    try:
        app()
    except InputError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except Stopped as stop:
        typer.echo(f"{stop}. Go on with: spannorm {shlex.join(sys.argv[1:])}", err=True)
        sys.exit(130)
