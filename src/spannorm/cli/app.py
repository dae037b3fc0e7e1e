"""All verbs, in the order of `spannorm --help`."""

from __future__ import annotations

import typer

from spannorm.cli import about, comparisons, depth, models, runs

app = typer.Typer(
    help="Decide where the norms of a deep Transformer go: train and compare placements on equal terms.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
results = typer.Typer(help="Finished runs of comparisons, to hand on.", no_args_is_help=True)

app.command()(runs.train)
app.command()(comparisons.compare)
app.command()(comparisons.ladder)
app.command(name="max-lr")(comparisons.max_lr)
app.add_typer(results, name="results")
results.command()(comparisons.merge)
app.command()(comparisons.report)
app.command(name="eval")(models.evaluate)
app.command(name="depth-use")(models.depth_use)
app.command()(models.publish)
app.command()(runs.data)
app.command()(about.placements)
app.command()(depth.theory)
app.command(name="depth-check")(depth.depth_check)
app.command()(models.audit)
app.command()(about.doctor)
