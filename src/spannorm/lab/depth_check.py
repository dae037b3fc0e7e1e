"""The depth check: what the theory predicts of a placement at a depth, beside what real models do.

For every placement, depth rule and depth a model is built, measured at init, trained by the engine on the recipe's
text and measured again. Where only predictions are asked for, no model is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from spannorm import theory
from spannorm.errors import InputError, unknown
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.probes import Record, block_skip_costs, gradient_paths, measure
from spannorm.scaling import depth_rule
from spannorm.train.data import TokenData, prepare_data
from spannorm.train.engine import Engine, arguments
from spannorm.train.recipe import Recipe, TrainRecipe, load_recipe, overridden
from spannorm.train.run import model_config, quiet
from spannorm.train.sequences import TrainingSequences, evaluation_sequences

DEFAULT = Recipe(
    name="depth-check",
    model={"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4},
    train=TrainRecipe(sequence_length=64, batch_size=4, learning_rate=3e-3, warmup_steps=5, schedule="wsd"),
)
"""Small enough for 128 blocks on a laptop; a wider model lies closer to the theory."""

SKIPPED = 8
"""Blocks whose skipping is tried, evenly spaced: one forward pass each."""


def sizes(recipe: Path | None, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that sizes the models: a file's, or `DEFAULT`, with `key=value` overrides laid over it."""
    return load_recipe(recipe, overrides) if recipe else overridden(DEFAULT, overrides)


@dataclass(frozen=True)
class Row:
    """One quantity of one stack at one step: what the theory says and what models do (mean over seeds)."""

    placement: str
    depth_rule: str
    depth: int
    step: int
    quantity: str
    predicted: float | None
    measured: float | None

    @property
    def relative_error(self) -> float | None:
        if self.predicted is None or self.measured is None or not self.measured:
            return None
        return self.predicted / self.measured - 1

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "relative_error": self.relative_error}


@dataclass(frozen=True)
class Stack:
    """One placement under one rule at one depth, with its recipe."""

    recipe: Recipe
    config: SpanNormConfig

    @property
    def key(self) -> tuple[str, str, int]:
        return self.config.placement, str(self.config.depth_rule), self.config.num_hidden_layers


def stacks(recipe: Recipe, placements: Sequence[str], depth_rules: Sequence[str], depths: Sequence[int]) -> list[Stack]:
    """Every combination, checked before any time is spent; `default` stands for the placement's own rule.

    Raises:
        InputError: an unknown placement, rule or model key; a placement the theory does not know; no depth.
    """
    if not (placements and depth_rules and depths):
        raise InputError("name at least one placement, one depth rule and one depth.")
    found: dict[tuple[str, str, int], Stack] = {}
    for placement in placements:
        if placement not in theory.PLACEMENTS:
            raise unknown("placement in the theory", placement, theory.PLACEMENTS)
        for rule in depth_rules:
            for depth in depths:
                if rule != "default":
                    depth_rule(rule, depth)
                chosen = {
                    "placement": placement,
                    "depth_rule": None if rule == "default" else rule,
                    "num_hidden_layers": depth,
                }
                one = replace(recipe, model={**recipe.model, **chosen})
                stack = Stack(one, model_config(one))
                found.setdefault(stack.key, stack)
    return list(found.values())


def body_of(config: SpanNormConfig, sequence_length: int, repeat: float = 0.0) -> theory.Body:
    """What the theory needs to know of a model.

    Args:
        repeat: the chance that two positions of a sequence hold the same token; see `repeats`.
    """
    return theory.Body(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        sequence_length=sequence_length,
        repeat=repeat,
        hidden_act=config.hidden_act,
        qk_norm=config.qk_norm,
        base_init=config.base_init,
        initializer_range=config.initializer_range,
        tied=config.tie_word_embeddings,
        embedding_multiplier=float(config.embedding_multiplier or 1.0),
        eps=config.rms_norm_eps,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        moe_intermediate_size=config.moe_intermediate_size or 0,
        norm_topk_prob=config.norm_topk_prob,
        shared_expert_intermediate_size=config.shared_expert_intermediate_size,
        decoder_sparse_step=config.decoder_sparse_step,
    )


def repeats(ids: torch.Tensor) -> float:
    """How often two positions of a sequence hold the same token, in token ids (batch, seq)."""
    length = ids.shape[1]
    same = (ids[:, :, None] == ids[:, None, :]).sum().item() - ids.numel()
    return same / (len(ids) * length * (length - 1)) if length > 1 else 0.0


def predicted(stack: Stack, repeat: float = 0.0) -> theory.Prediction:
    """The theory of a stack."""
    placement, rule, depth = stack.key
    body = body_of(stack.config, stack.recipe.train.sequence_length, repeat)
    return theory.predict(placement, depth, depth_rule=rule, body=body, **(stack.config.placement_options or {}))


def predictions(p: theory.Prediction) -> dict[str, float]:
    """A prediction by the quantities that are measured too."""
    gains = {"skip_gain": p.log_skip_gain, "total_gain": p.log_total_gain}
    streams = theory.PLACEMENTS[p.placement].streams
    return {
        **{
            f"variance:{site}": float(np.nanmean(v))
            for site, v in p.variance.items()
            if streams == 1 or site != "output"
        },
        "variance": p.variance["output"][-1],
        **{name: math.exp(min(value, 700.0)) for name, value in gains.items()},
        "attention_share": p.total_attention_share,
        "ffn_share": p.total_ffn_share,
        "token_cosine": p.correlation[-1],
    }


def measurements(
    model: SpanNormForCausalLM, ids: torch.Tensor
) -> tuple[dict[str, float], dict[str, list[float]], float]:
    """What a model does with token ids (batch, seq): the quantities, profiles by layer, and the loss."""

    def loss_of() -> torch.Tensor:
        return model(ids, labels=ids, use_cache=False).loss

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
    # of two streams there is one where they meet, at the end
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


def theory_of(chosen: Sequence[Stack]) -> dict[str, Any]:
    """The theory's rows for every stack, nothing measured: what `spannorm theory --json` writes."""
    rows = [
        Row(*stack.key, 0, quantity, _number(value), None)
        for stack in chosen
        for quantity, value in predictions(predicted(stack)).items()
    ]
    return {"repeat": 0.0, "rows": [row.to_dict() for row in rows], "profiles": []}


def depth_check(
    chosen: Sequence[Stack],
    *,
    steps: Sequence[int],
    seeds: int = 1,
    data: Path,
    on_stack: Callable[[Stack], None] = lambda _: None,
) -> dict[str, Any]:
    """Predict, build, measure and train every stack; what `spannorm depth-check --json` writes.

    Args:
        chosen: from `stacks`.
        steps: optimizer steps after which to measure; 0 is init.
        seeds: models per stack, drawn with seeds 0, 1, …; gains are averaged by their logarithm.
        data: the folder of the tokens.
        on_stack: called before each stack.

    Raises:
        InputError: a negative step, or seeds below 1.
    """
    if seeds < 1 or not steps or min(steps) < 0:
        raise InputError(f"steps must be 0 or more and seeds at least 1; got steps {list(steps)}, seeds {seeds}.")
    quiet()
    tokens = prepare_data(chosen[0].recipe.data, data)
    rows: list[Row] = []
    profiles: list[dict[str, Any]] = []
    batch = _batch(tokens, chosen[0].recipe.train)
    repeat = repeats(batch)
    for stack in chosen:
        on_stack(stack)
        prediction = predicted(stack, repeat)
        expected = predictions(prediction)
        by_step: dict[int, list[tuple[dict[str, float], dict[str, list[float]], float]]] = {}
        for seed in range(seeds):
            for step, found in _trained(stack, seed, tokens, batch, sorted(set(steps))):
                by_step.setdefault(step, []).append(found)
        placement, rule, depth = stack.key
        for step, found in by_step.items():
            for quantity in dict.fromkeys([*(expected if step == 0 else ()), *found[0][0]]):
                values = [quantities.get(quantity, math.nan) for quantities, _, _ in found]
                rows.append(
                    Row(placement, rule, depth, step, quantity,
                        _number(expected.get(quantity)) if step == 0 else None, _mean(quantity, values))
                )  # fmt: skip
            rows.append(Row(placement, rule, depth, step, "loss", None, _mean("loss", [loss for *_, loss in found])))
            for name in found[0][1]:
                profile = np.mean([layers[name] for _, layers, _ in found], axis=0)
                theirs = {"log_gradient": [*prediction.log_gradient]} if step == 0 and depth <= theory.EXACT else {}
                profiles.append({
                    "placement": placement, "depth_rule": rule, "depth": depth, "step": step, "quantity": name,
                    "measured": [_number(v) for v in profile], "predicted": theirs.get(name),
                })  # fmt: skip
    return {"repeat": repeat, "rows": [row.to_dict() for row in rows], "profiles": profiles}


def _batch(tokens: TokenData, train: TrainRecipe) -> torch.Tensor:
    held_out = evaluation_sequences(tokens, "validation", train.sequence_length, train.batch_size)
    return torch.stack([held_out[i]["input_ids"] for i in range(len(held_out))])  # type: ignore[arg-type]


def _trained(
    stack: Stack, seed: int, tokens: TokenData, batch: torch.Tensor, steps: Sequence[int]
) -> Iterator[tuple[int, Any]]:
    """A model's measurements after each of the steps; a model whose loss is no longer finite ends early."""
    last = max(steps)
    train = replace(stack.recipe.train, steps=max(last, 1), seed=seed)
    one = replace(stack.recipe, train=train, model={**stack.recipe.model, "init_seed": seed})
    model = SpanNormForCausalLM(model_config(one, tokens))
    found: list[tuple[int, Any]] = []
    if 0 in steps:
        found.append((0, measurements(model, batch)))
    if last:
        sequences = TrainingSequences(tokens, train.sequence_length, last * train.batch_size * train.accumulation, seed)
        with TemporaryDirectory() as folder:
            settings = arguments(train, Path(folder))
            settings.save_strategy = type(settings.save_strategy)("no")
            watcher = _Watcher(lambda step: found.append((step, measurements(model, batch))), set(steps))
            engine = Engine(
                model, settings, optimizer_name=train.optimizer, train_dataset=sequences, callbacks=[watcher]
            )
            engine.remove_callback(PrinterCallback)
            engine.train()
    yield from found


class _Watcher(TrainerCallback):
    def __init__(self, measure_at: Callable[[int], None], steps: set[int]) -> None:
        self.measure_at, self.steps = measure_at, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            self.measure_at(state.global_step)


def _mean(quantity: str, values: Sequence[float]) -> float | None:
    """Mean over seeds; of gains, which are products over blocks, the geometric one."""
    if quantity.endswith("_gain") and min(values) > 0:
        return _number(math.exp(float(np.mean(np.log(values)))))
    return _number(float(np.mean(values)))


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
