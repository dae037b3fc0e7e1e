"""`train` and `data`: one run."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spannorm.cli.options import Imports, JsonFile, Out, Overrides, RecipeFile, run_files, write


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


def data(recipe: RecipeFile, out: Out = None, overrides: Overrides = None, json_file: JsonFile = None) -> None:
    """Prepare a recipe's tokens, for `train --data`."""
    from spannorm.train.data import prepare_data
    from spannorm.train.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    tokens = prepare_data(loaded.data, out or Path("runs") / loaded.name / "data", same_corpus=True)
    for name, split in tokens.splits.items():
        typer.echo(f"{name:10}  {split.tokens:>14,} tokens  {split.documents:>9,} documents")
    typer.echo(f"{tokens.directory}  sha256 {tokens.sha256[:16]}")
    write(json_file, {**asdict(tokens), "directory": str(tokens.directory)})
