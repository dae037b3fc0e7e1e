"""`eval`, `depth-use`, `publish` and `audit`: a model that is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from spannorm.cli.options import Imports, JsonFile, listed, run_files, write

SavedModel = Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder, or a saved model's.")]


def evaluate(
    directory: SavedModel,
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
    json_file: JsonFile = None,
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
    write(json_file, results)


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
    json_file: JsonFile = None,
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
    write(json_file, results)


def publish(
    directory: SavedModel,
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

    found = audit_target(resolve(target))
    show(found)
    write(json_file, found.to_dict())
    if strict and not found.ok:
        sys.exit(1)
