"""The depth check: what the theory predicts of a placement at a depth, beside what real models do.

For every placement, depth rule and depth a model is built, measured at init, trained by the engine on the recipe's
text and measured again. A placement that the theory cannot follow is measured without a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from spannorm import theory
from spannorm.errors import InputError
from spannorm.lab.depth.theory import Case, Quantity, number, predictions
from spannorm.models import SpanNormForCausalLM
from spannorm.probes import Record, block_skip_costs, gradient_paths, measure
from spannorm.train.data import TokenData, prepare_data
from spannorm.train.engine import Engine, arguments
from spannorm.train.needs import check_fits
from spannorm.train.recipe import TrainRecipe
from spannorm.train.run import model_config, quiet
from spannorm.train.sequences import TrainingSequences, evaluation_sequences

Measured = tuple[dict[str, float], dict[str, list[float]], float]
"""Of a model: its quantities by name, its profiles by name and layer, and its loss."""
SKIPPED = 8
"""Blocks whose skipping is tried, evenly spaced: one forward pass each."""


def repeats(ids: torch.Tensor) -> float:
    """How often two positions of a sequence hold the same token, in token ids (batch, seq)."""
    length = ids.shape[1]
    same = (ids[:, :, None] == ids[:, None, :]).sum().item() - ids.numel()
    return same / (len(ids) * length * (length - 1)) if length > 1 else 0.0


def measurements(model: SpanNormForCausalLM, ids: torch.Tensor) -> Measured:
    """What a model does with token ids (batch, seq): the quantities, profiles by layer, and the loss."""

    def loss_of() -> torch.Tensor:
        loss: torch.Tensor = model(ids, labels=ids, use_cache=False).loss
        return loss

    training = model.training
    model.eval()
    try:
        record = measure(model, loss_of, similarity=False)
        paths = gradient_paths(model, loss_of)
        depth = model.config.num_hidden_layers
        tried = sorted({round(b) for b in np.linspace(0, depth - 1, min(SKIPPED, depth))})
        costs = block_skip_costs(model, loss_of, blocks=tried)
    finally:
        model.train(training)
    # several streams are one where they meet, at the end
    outputs = {} if record.signal_rms_by_stream else {"variance:output": _mean_square(record)}
    quantities = {
        **{f"variance:{site}": float(np.nanmean(values)) for site, values in record.variance.items()},
        **outputs,
        "variance": record.signal_rms[-1] ** 2,
        "skip_gain": math.exp(paths.log_gain["skip"][0]),
        "total_gain": math.exp(paths.log_gain["total"][0]),
        "attention_share": paths.share("without_attention"),
        "ffn_share": paths.share("without_ffn"),
        "token_cosine": record.token_cosine[-1],
        "effective_rank": record.effective_rank[-1] if record.effective_rank else math.nan,
        "block_skip_cost": float(np.mean(costs)),
        **{f"rho:{branch}": float(np.nanmean(values)) for branch, values in record.rho.items()},
    }
    profiles = {
        "log_gradient": paths.log_gain["total"],
        "log_skip": paths.log_gain["skip"],
        "signal_rms": record.signal_rms,
        "effective_rank": record.effective_rank or [],
        "token_cosine": record.token_cosine,
        **{f"rho:{branch}": values for branch, values in record.rho.items()},
    }
    return quantities, profiles, record.loss


def _mean_square(record: Record) -> float:
    return float(np.mean(np.square(record.signal_rms[1:])))


def depth_check(
    chosen: Sequence[Case],
    *,
    steps: Sequence[int],
    seeds: int = 1,
    data: Path,
    on_case: Callable[[Case], None] = lambda _: None,
) -> dict[str, Any]:
    """Predict, build, measure and train every stack; what `spannorm depth-check --json` writes.

    Args:
        chosen: from `spannorm.lab.depth.theory.cases`.
        steps: optimizer steps after which to measure; 0 is init.
        seeds: models per stack, drawn with seeds 0, 1, …; gains are averaged by their logarithm.
        data: the folder of the tokens.
        on_case: called before each stack.

    Raises:
        InputError: a negative step, or seeds below 1.
    """
    if seeds < 1 or not steps or min(steps) < 0:
        raise InputError(f"steps must be 0 or more and seeds at least 1; got steps {list(steps)}, seeds {seeds}.")
    rows: list[Quantity] = []
    unpredicted: dict[str, str] = {}
    profiles: list[dict[str, Any]] = []
    for case in chosen:
        check_fits(case.recipe, model_config(case.recipe))
    quiet()
    tokens = prepare_data(chosen[0].recipe.data, data)
    batch = _batch(tokens, chosen[0].recipe.train)
    repeat = repeats(batch)
    for case in chosen:
        on_case(case)
        expected: dict[str, float] = {}
        by_layer: list[float] | None = None
        try:
            prediction = case.predicted(repeat)
            expected = predictions(prediction)
            by_layer = [*prediction.log_gradient] if len(prediction.blocks) == prediction.num_layers else None
        except theory.NoRule as reason:
            unpredicted[" ".join(map(str, case.key))] = str(reason)
        by_step: dict[int, list[Measured]] = {}
        for seed in range(seeds):
            for step, measured in _trained(case, seed, tokens, batch, sorted(set(steps))):
                by_step.setdefault(step, []).append(measured)
        for step, models in by_step.items():
            rows += _quantities(case, step, models, expected if step == 0 else {})
            profiles += _profiles(case, step, models, by_layer if step == 0 else None)
    return {
        "repeat": repeat, "rows": [row.to_dict() for row in rows], "profiles": profiles, "unpredicted": unpredicted,
    }  # fmt: skip


def _quantities(case: Case, step: int, models: Sequence[Measured], expected: Mapping[str, float]) -> Iterator[Quantity]:
    """Each quantity, its mean over the models beside what the theory expects of it; the loss last."""
    for name in dict.fromkeys([*expected, *models[0][0]]):
        values = [quantities.get(name, math.nan) for quantities, _, _ in models]
        yield Quantity(*case.key, step, name, number(expected.get(name)), _mean(name, values))
    yield Quantity(*case.key, step, "loss", None, _mean("loss", [loss for *_, loss in models]))


def _profiles(
    case: Case, step: int, models: Sequence[Measured], log_gradient: Sequence[float] | None
) -> Iterator[dict[str, Any]]:
    """Each quantity by layer, its mean over the models, beside the theory's logarithm of the gradient."""
    placement, rule, depth = case.key
    for name in models[0][1]:
        mean = np.mean([layers[name] for _, layers, _ in models], axis=0)
        yield {
            "placement": placement, "depth_rule": rule, "depth": depth, "step": step, "quantity": name,
            "measured": [number(v) for v in mean], "predicted": log_gradient if name == "log_gradient" else None,
        }  # fmt: skip


def _batch(tokens: TokenData, train: TrainRecipe) -> torch.Tensor:
    held_out = evaluation_sequences(tokens, "validation", train.sequence_length, train.batch_size)
    return torch.stack([held_out[i]["input_ids"] for i in range(len(held_out))])  # type: ignore[arg-type]


def _trained(
    case: Case, seed: int, tokens: TokenData, batch: torch.Tensor, steps: Sequence[int]
) -> Iterator[tuple[int, Measured]]:
    """A model's measurements after each of the steps; a model whose loss is no longer finite ends early."""
    last = max(steps)
    train = replace(case.recipe.train, steps=max(last, 1), seed=seed)
    seeded = replace(case.recipe, train=train, model={**case.recipe.model, "init_seed": seed})
    model = SpanNormForCausalLM(model_config(seeded, tokens))
    measured: list[tuple[int, Measured]] = []
    if 0 in steps:
        measured.append((0, measurements(model, batch)))
    if last:
        sequences = TrainingSequences(tokens, train.sequence_length, last * train.batch_size * train.accumulation, seed)
        with TemporaryDirectory() as folder:
            settings = arguments(train, Path(folder))
            settings.save_strategy = type(settings.save_strategy)("no")
            watcher = _Watcher(lambda step: measured.append((step, measurements(model, batch))), set(steps))
            engine = Engine(model, settings, recipe=train, train_dataset=sequences, callbacks=[watcher])
            engine.remove_callback(PrinterCallback)
            engine.train()
    yield from measured


class _Watcher(TrainerCallback):  # type: ignore[misc]
    def __init__(self, measure_at: Callable[[int], None], steps: set[int]) -> None:
        self.measure_at, self.steps = measure_at, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            self.measure_at(state.global_step)


def _mean(quantity: str, values: Sequence[float]) -> float | None:
    """Mean over seeds; of gains, which are products over blocks, the geometric one."""
    if quantity.endswith("_gain") and min(values) > 0:
        return number(math.exp(float(np.mean(np.log(values)))))
    return number(float(np.mean(values)))
