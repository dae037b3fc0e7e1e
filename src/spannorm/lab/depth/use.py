"""`spannorm depth-use`: how a saved model uses its depth, as JSON, a table and one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from spannorm.console import Grid, wide_console
from spannorm.errors import InputError
from spannorm.evaluate.tasks import quiet
from spannorm.files import make_folder, write_bytes, write_json, writing_to
from spannorm.lab.report.figures.panels import STYLE, WIDTH, plain_log
from spannorm.loading import load
from spannorm.models import SpanNormConfig
from spannorm.probes import depth_use
from spannorm.rewiring.configuration import MODEL_TYPE
from spannorm.train.environment import machine, versions
from spannorm.train.evaluation import SPLIT, fast_tokenizer, model_folder, run_tokens
from spannorm.values import finite

RESULTS, PICTURE = "results.json", "depth_use.png"
FIT = 4
"""Sequences that linear maps are fitted on, for each that is measured on."""


def use_of_folder(
    folder: Path,
    *,
    data: Path | None = None,
    text: Path | None = None,
    out: Path | None = None,
    sequences: int = 16,
    batch_size: int = 8,
    reach: int | None = None,
) -> dict[str, Any]:
    """Measure a saved model, write `results.json` and `depth_use.png`, and return what the former holds.

    Args:
        folder: a run's folder, or that of a model that `save_pretrained` wrote: ours, rewired, or any causal LM of
            Transformers.
        data: tokens whose test split is read; None means those of the run.
        text: a UTF-8 file to read in their place, with the folder's own tokenizer.
        out: where the files go; None means `folder/depth-use`.
        sequences: how many to measure on; four times as many, those that follow, are what linear maps are fitted on.
        batch_size: sequences at once.
        reach: exchange weights of blocks at most so far apart; None exchanges every pair.

    Raises:
        InputError: no model, no text, or too little of it.
    """
    path = model_folder(folder)
    with quiet():
        model = _load(path).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    ids = torch.from_numpy(_ids(folder, path, data, text)).long().to(next(model.parameters()).device)
    rows = _rows(ids, model.config, sequences)

    def loss_of(batch: Tensor) -> Tensor:
        loss: Tensor = model(batch, labels=batch, use_cache=False).loss
        return loss

    size = min(batch_size, sequences)
    measured = rows[: sequences // size * size]
    use = depth_use(
        model, loss_of, torch.split(measured, size), fit=torch.split(rows[len(measured) :], size), reach=reach
    )
    results: dict[str, Any] = {
        "model": str(path),
        "sequences": len(measured),
        "sequence_length": rows.shape[1],
        **finite(use.to_dict()),
        "effect_on_later": finite(use.effect_on_later()),
        "versions": versions(),
        "machine": machine(),
    }
    out = out or folder / "depth-use"
    make_folder(out)
    with writing_to(out), matplotlib.rc_context(STYLE):
        write_json(out / RESULTS, results)
        content = io.BytesIO()
        draw(results).savefig(content, format="png", dpi=200, metadata={})
        write_bytes(out / PICTURE, content.getvalue())
    return results


def _rows(ids: Tensor, config: Any, sequences: int) -> Tensor:
    """The tokens as sequences (n, length): those to measure on, then those that linear maps are fitted on."""
    length = min(getattr(config, "max_position_embeddings", None) or 512, 512)
    if len(ids) and int(ids.max()) >= config.vocab_size:
        raise InputError(
            f"token {int(ids.max())} is none of the model's {config.vocab_size}: give the tokens that it was "
            "trained on, or --text FILE, which its own tokenizer reads."
        )
    rows = ids[: len(ids) // length * length].view(-1, length)[: (1 + FIT) * sequences]
    if len(rows) < 2 * sequences:
        raise InputError(
            f"{len(ids)} tokens are {len(rows)} sequences of {length}; --sequences {sequences} takes at least twice as "
            "many: give more text, or fewer sequences."
        )
    return rows


def _load(path: Path) -> Any:
    saved, _ = PreTrainedConfig.get_config_dict(path)
    if saved.get("model_type") in (SpanNormConfig.model_type, MODEL_TYPE):
        return load(path)
    try:
        return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(f"{path} is no causal language model of Transformers: {reason}") from None


def _ids(folder: Path, path: Path, data: Path | None, text: Path | None) -> Any:
    if text is None:
        return np.array(run_tokens(folder, data).tokens(SPLIT), np.int64)
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text takes a UTF-8 file; {text} cannot be read: {error}.") from None
    with quiet():
        return np.array(fast_tokenizer(path)(words)["input_ids"], np.int64)


def draw(results: dict[str, Any]) -> Figure:
    """Six panels: lines by block and by layer, and the two matrices between blocks."""
    fig = Figure(figsize=(WIDTH, 4.6))
    axes = fig.subplots(2, 3).ravel()
    angles, lens, jacobian = (_numbers(results[key]) for key in ("angular_distance", "logit_lens", "jacobian"))
    blocks, layers = np.arange(len(angles)), np.arange(len(lens))
    axes[0].plot(blocks, angles, "o-", markersize=2.5, label="angle between in and out, / π")
    axes[0].plot(blocks, _numbers(results["effect_on_later"]), "o-", markersize=2.5, label="effect on later blocks")
    axes[0].set(title="what a block changes", xlabel="block")
    axes[0].set_ylim(0, 1.4 * axes[0].get_ylim()[1])  # room for the names
    axes[1].plot(blocks, _numbers(results["skip_cost"]), "o-", markersize=2.5, label="skipped")
    axes[1].plot(blocks, _numbers(results["usefulness"]), "o-", markersize=2.5, label="made linear: usefulness")
    axes[1].set(title="rise of the loss, nats", xlabel="block")
    axes[2].plot(layers, lens, "o-", markersize=2.5)
    axes[2].set(title="logit lens: loss, read out there", xlabel="layer (0: embedding)")
    for ax in axes[:2]:
        ax.legend(fontsize=6.5, frameon=False)
    titles = ("causal score", "later block", "block skipped"), ("permutation score", "block", "exchanged with")
    for ax, key, (title, x, y) in zip(axes[3:5], ("causal", "permutation"), titles, strict=True):
        matrix = _numbers(results[key])
        if key == "causal":
            matrix[np.tril_indices(len(matrix))] = np.nan
        shown = ax.imshow(np.ma.masked_invalid(matrix), cmap="viridis", vmin=0, interpolation="none")
        fig.colorbar(shown, ax=ax, shrink=0.85).ax.tick_params(labelsize=6.5)
        ax.set(title=title, xlabel=x, ylabel=y)
        ax.grid(False)
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[5].plot(layers, jacobian, "o-", markersize=2.5)
    axes[5].set(title="Jacobian of the end", xlabel="layer (0: embedding)", yscale="log")
    plain_log(axes[5].yaxis)
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    fig.tight_layout()
    return fig


def _numbers(values: Sequence[Any]) -> Any:
    return np.array(values, dtype=np.float64)


COLUMNS = {
    "angular_distance": "angle / π", "effect_on_later": "on later", "skip_cost": "skipped", "usefulness": "made linear",
    "logit_lens": "read out", "jacobian": "Jacobian",
}  # fmt: skip


def print_use(results: dict[str, Any], console: Console | None = None) -> None:
    """Print a row per block; what is measured at a layer stands with the block that it leaves."""
    grid = Grid(f"{results['model']}: loss {results['loss']:.4f} nats")
    grid.column("block", "number")
    for heading in COLUMNS.values():
        grid.column(heading, "spare")
    for block in range(len(results["angular_distance"])):
        values = [results[key][block + (key in ("logit_lens", "jacobian"))] for key in COLUMNS]
        grid.row(str(block), *("–" if value is None else f"{value:.4f}" for value in values))
    console = console or wide_console()
    console.print(grid.fitted(console))
