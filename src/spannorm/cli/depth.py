"""`theory` and `depth-check`: what becomes of signal and gradient with depth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from spannorm.cli.options import (
    Imports,
    JsonFile,
    Overrides,
    complete_placements,
    complete_rules,
    grouped,
    image,
    listed,
    numbers,
    run_files,
    writable,
)

COMMA = "Comma-separated."
DepthRules = Annotated[
    str,
    typer.Option(
        "--depth-rules",
        metavar="RULES",
        help=f"Depth rules; `default` is the placement's own. {COMMA}",
        autocompletion=complete_rules,
    ),
]


@dataclass(frozen=True)
class Stacks:
    """Options of both verbs: which stacks, and where the numbers go."""

    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="Sizes, text and training; default a model of width 64."),
    ] = None
    placements: Annotated[
        str,
        typer.Option("--placements", metavar="NAMES", help=f"Placements. {COMMA}", autocompletion=complete_placements),
    ] = "pre,post,span"
    depths: Annotated[str, typer.Option("--depths", metavar="BLOCKS", help=f"Depths in blocks. {COMMA}")] = "8,32,128"
    json_file: JsonFile = None
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw them: .png or .svg.", callback=image)
    ] = None
    overrides: Overrides = None
    imports: Imports = None


HtmlFile = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="Write them as one page to explore, without a network.", callback=writable
    ),
]


@grouped(Stacks)
def theory(options: Stacks, depth_rules: DepthRules = "none,default,1/sqrt(L)", html: HtmlFile = None) -> None:
    """Predict signal and gradient at initialization, and say what they mean. Builds no model."""
    from spannorm.lab.depth.theory import cases, sizes, theory_of
    from spannorm.lab.depth.words import progress, show

    run_files(options.imports)
    sized = sizes(options.recipe, options.overrides or ())
    chosen = cases(sized, listed(options.placements), listed(depth_rules), numbers("--depths", options.depths))
    with progress(len(chosen), "") as on_case:
        results = theory_of(chosen, on_case)
    show(chosen, results, options.json_file, options.plot)
    if html:
        from spannorm.lab.depth.explorer import write_explorer

        write_explorer(chosen, html)


@grouped(Stacks)
def depth_check(
    options: Stacks,
    depth_rules: DepthRules = "none,1/sqrt(L)",
    steps: Annotated[str, typer.Option("--steps", metavar="STEPS", help=f"When to measure. {COMMA}")] = "0,20",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, max=1000, help="Models per stack.")] = 1,
) -> None:
    """Compare the theory with real models, at init and after training, and say which placements will train."""
    from spannorm.lab.depth.check import depth_check
    from spannorm.lab.depth.theory import cases, sizes
    from spannorm.lab.depth.words import progress, show

    run_files(options.imports)
    sized = sizes(options.recipe, options.overrides or ())
    chosen = cases(sized, listed(options.placements), listed(depth_rules), numbers("--depths", options.depths))
    with progress(len(chosen)) as on_case:
        results = depth_check(
            chosen, steps=numbers("--steps", steps), seeds=seeds, data=Path("runs") / sized.name / "data",
            on_case=on_case,
        )  # fmt: skip
    show(chosen, results, options.json_file, options.plot)
