"""Training with the live table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spannorm.console import say
from spannorm.files import read_jsonl
from spannorm.train.display import Board, Row
from spannorm.train.needs import check_fits
from spannorm.train.processes import count, is_first
from spannorm.train.recipe import Recipe
from spannorm.train.recorder import RECORD, RECORDS
from spannorm.train.run import model_config, train


def train_and_show(recipe: Recipe, out: Path, *, data: Path | None = None) -> dict[str, Any]:
    """`train` with the live table in the terminal. Arguments, result and errors are those of `train`."""
    if not is_first():
        return train(recipe, out, data=data)
    config = model_config(recipe)
    row, needed = Row.of(recipe, config), check_fits(recipe, config, count())
    with Board(f"{recipe.name} → {out}: {needed}", [row]) as board:

        def on_step(record: dict[str, Any]) -> None:
            if row.status != "running":
                row.add([r for r in read_jsonl(out / RECORDS, RECORD) if r["step"] < record["step"]])
                row.status = "running"
            row.add([record])
            board.refresh()

        result = train(recipe, out, data=data, on_step=on_step)
        where = f" at step {result['steps_done']}" if result["reason"] == "non-finite" else ""
        row.status, row.note = result["status"], f"failed: {result['reason']}{where}" if result["reason"] else ""
    say(
        board.console,
        f"validation loss {_figure(result['val_loss'])} nats per token, test {_figure(result['test_loss'])}, "
        f"{_figure(result['bits_per_byte'])} bits per byte; {out / 'result.json'}",
    )
    return result


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
