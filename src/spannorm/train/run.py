"""One training run, from a recipe to `result.json`. It can be stopped at any time and then resumed.

A run's folder:

    run.json        the resolved recipe, the model's full configuration, versions, machine, data hash
    records.jsonl   every optimizer step            (see recorder.py)
    probes.jsonl    signal, gradient, correlation, rank by layer
    rollbacks.jsonl returns after spikes            (see rollback.py)
    checkpoint-N/   the last two, complete or ignored (see checkpoints.py)
    checkpoints.json  those that the run wrote
    model/          the trained model with its tokenizer, for `from_pretrained`
    tensorboard/    for `tensorboard --logdir`
    result.json     written last
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from spannorm import folders, kernels
from spannorm.errors import InputError, Stopped
from spannorm.files import alone_in, make_folder, read_json, read_jsonl, write_json, writing_to
from spannorm.folders import claim, sweep
from spannorm.model_keys import check_sizes_given
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.probes import measure
from spannorm.routing import RoutingMeter
from spannorm.train.checkpoints import Sealer, check_config, check_way, last_complete, refusing_pickles, step_of
from spannorm.train.collapse import collapse
from spannorm.train.data import TokenData, prepare_data
from spannorm.train.engine import Engine, arguments, passes, uses_bf16
from spannorm.train.evaluation import evaluate_run, tasks_of
from spannorm.train.needs import check_fits
from spannorm.train.processes import count, join, noticing_loss, on_first
from spannorm.train.recipe import Recipe
from spannorm.train.recorder import RampEnd, Recorder, exit_code
from spannorm.train.rollback import ROLLBACK, ROLLBACKS, SpikeGuard
from spannorm.train.sequences import TrainingSequences, evaluation_sequences
from spannorm.train.sharding import ShardedEngine, sharded_model
from spannorm.train.summary import describe, summarize
from spannorm.values import finite

RUN, RESULT = "run.json", "result.json"
RESULT_SHAPE = {
    "placement": str, "depth_rule": str, "status": str, "reason": (str, None), "seed": int, "learning_rate": float,
    "steps_done": int, "val_loss": (float, None), "test_loss": (float, None), "bits_per_byte": (float, None),
}  # fmt: skip
"""The part of a result that other code reads; see `spannorm.files.checked`."""


def model_config(recipe: Recipe, data: TokenData | None = None) -> SpanNormConfig:
    """The configuration of a recipe's model. Vocabulary and end token come from the data.

    Without data the sizes are checked too, before tokens are prepared.

    Raises:
        InputError: an unknown key, impossible sizes, or a vocabulary smaller than the tokenizer's.
    """
    check_sizes_given(recipe.model)
    values: dict[str, Any] = {"max_position_embeddings": recipe.train.sequence_length, **recipe.model}
    values.setdefault("init_seed", recipe.train.seed)
    if data is not None:
        values.setdefault("vocab_size", data.vocab_size)
        values.setdefault("eos_token_id", data.end_of_document)
        if values["vocab_size"] < data.vocab_size:
            raise InputError(
                f"model.vocab_size ({values['vocab_size']}) must be at least the tokenizer's vocabulary "
                f"({data.vocab_size}): leave it out, and the tokenizer decides."
            )
    config = SpanNormConfig(**values)
    if config.max_position_embeddings < recipe.train.sequence_length:
        raise InputError(
            f"train.sequence_length ({recipe.train.sequence_length}) must not exceed model.max_position_embeddings "
            f"({config.max_position_embeddings})."
        )
    return config


def train(
    recipe: Recipe,
    out: Path,
    *,
    data: Path | None = None,
    on_step: Callable[[dict[str, Any]], None] = lambda _: None,
    stop_with_parent: bool = False,
) -> dict[str, Any]:
    """Train a recipe's model and return the content of `result.json`. A finished run is only read.

    Args:
        recipe: its `compare` section is ignored.
        out: the run's folder. A run that began there with the same recipe goes on from its last complete checkpoint.
        data: the folder of the tokens, which are prepared there if they are missing; None means `out/data`.
        on_step: called with every step's record.
        stop_with_parent: save and stop when the process that started this one has ended.

    Raises:
        InputError: bad recipe, data or folder.
        Stopped: Ctrl-C or SIGTERM, after a checkpoint was saved.
    """
    config = model_config(recipe)
    join()
    passes(recipe.train, count())
    check_fits(recipe, config, count())
    with ExitStack() as held:
        # A worker may have to wait for a process that a killed comparison left; it ends after its step.
        begun, result = on_first(lambda: _enter(held, recipe, out, wait=60.0 if stop_with_parent else 0.0))
        while result is None:
            result, begun = _train(recipe, out, data, on_step, stop_with_parent, begun), True
        return result


def _enter(held: ExitStack, recipe: Recipe, out: Path, wait: float) -> tuple[bool, dict[str, Any] | None]:
    """Claim the folder for this run. Returns whether it began there before, and its result if it is finished."""
    claim(out, folders.RUN)
    make_folder(out)
    held.enter_context(alone_in(out, wait))
    sweep(out)
    return _check_same_run(recipe, out), read_json(out / RESULT, RESULT_SHAPE) if (out / RESULT).is_file() else None


def _train(
    recipe: Recipe,
    out: Path,
    data: Path | None,
    on_step: Callable[[dict[str, Any]], None],
    stop_with_parent: bool,
    begun: bool,
) -> dict[str, Any] | None:
    """Train to the end and return the result. None means a rollback: the caller must call this again."""
    quiet()
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    kernels.use(recipe.train.kernels)
    tokens = on_first(lambda: prepare_data(recipe.data, data or out / "data"))
    config = model_config(recipe, tokens)
    t = recipe.train
    if t.evaluate:
        on_first(lambda: bool(tasks_of(t, tokens, config.max_position_embeddings)))  # an error now, not after training
    sequences = _training_sequences(recipe, tokens, out)
    held_out = {
        split: evaluation_sequences(tokens, split, t.sequence_length, t.evaluation_sequences)
        for split in ("validation", "test")
    }
    kind: type[Engine] = ShardedEngine if t.parallel == "fsdp" else Engine
    model = sharded_model(config, uses_bf16(t)) if kind is ShardedEngine else SpanNormForCausalLM(config)
    checkpoint = on_first(lambda: _begin(out, recipe, model, tokens, begun))
    probed = held_out["validation"]
    batch = torch.stack([probed[i]["input_ids"] for i in range(min(t.batch_size, len(probed)))])  # type: ignore[arg-type]

    skip = t.on_nan == "skip"
    recorder = Recorder(
        out, lambda: _probe(engine, batch), t.probe_every, on_step, stop_with_parent, lambda: engine.fetching, skip
    )
    board = TensorBoardCallback()
    board.logging_dir = str(out / "tensorboard")
    engine = kind(
        model, arguments(t, out, count()), recipe=t, train_dataset=sequences, callbacks=[recorder, Sealer(), board]
    )
    if t.schedule == "ramp":
        engine.add_callback(RampEnd(out, tokens.unigram_loss("validation")))
    guard = SpikeGuard(out)
    if t.on_spike == "rollback":
        engine.add_callback(guard)
    engine.remove_callback(PrinterCallback)
    with writing_to(out), noticing_loss():
        with recorder.catching_signals(), refusing_pickles(checkpoint):
            engine.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if recorder.stop_requested and engine.state.global_step < t.steps:
            at = f"stopped after step {engine.state.global_step} of {t.steps}, saved"
            raise Stopped(at, exit_code(recorder.stopped_by))
        if guard.rolled_back:
            return None
        losses = {
            split: math.nan if recorder.diverged else engine.mean_loss(held_out[split], split) for split in held_out
        }
        collapsed = None
        if t.collapse and not recorder.diverged:
            ids, other = ([d[i]["input_ids"] for i in range(len(d))] for d in held_out.values())  # type: ignore[arg-type]
            collapsed = finite(collapse(model, ids, t.batch_size, engine.args.bf16, fit=other))
        weights = engine.whole_weights()
        return on_first(lambda: _finish(recipe, out, model, weights, tokens, losses, collapsed))


def _training_sequences(recipe: Recipe, tokens: TokenData, out: Path) -> TrainingSequences:
    """The run's sequences in their order, without those that rollbacks have left out."""
    t, per_step = recipe.train, recipe.train.batch_size * recipe.train.accumulation
    rollbacks = on_first(lambda: read_jsonl(out / ROLLBACKS, ROLLBACK))
    left_out = [(r["to"] * per_step, r["step"] * per_step) for r in rollbacks]
    return TrainingSequences(tokens, t.sequence_length, t.steps * per_step, t.seed, left_out)


def _begin(out: Path, recipe: Recipe, model: SpanNormForCausalLM, tokens: TokenData, begun: bool) -> Path | None:
    """Write the run's description, or compare with it. Returns the checkpoint to go on from, if there is one."""
    if not begun:
        with writing_to(out):
            write_json(out / RUN, describe(run_recipe(recipe), model, tokens))
    else:
        check_tokens(out, tokens)
    with writing_to(out):
        checkpoint = last_complete(out)
    if checkpoint is not None:
        check_config(checkpoint, model.config)
    check_way(out, step_of(checkpoint) if checkpoint else 0, recipe.train.checkpoint_every, recipe.train.steps)
    return checkpoint


def check_tokens(out: Path, tokens: TokenData) -> None:
    """Refuse the run in a folder if it was begun on other tokens."""
    before = read_json(out / RUN, {"data": {"sha256": str}})["data"]["sha256"]
    if before != tokens.sha256:
        raise InputError(
            f"the run in {out} was begun on other tokens (sha256 {before[:16]}, now {tokens.sha256[:16]}): the corpus "
            "has changed. Choose another --out folder."
        )


def _finish(
    recipe: Recipe,
    out: Path,
    model: SpanNormForCausalLM,
    weights: dict[str, torch.Tensor],
    tokens: TokenData,
    losses: dict[str, float],
    collapsed: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write the trained model, unless it diverged, and then the result."""
    result: dict[str, Any] = finite(summarize(recipe, out, model, tokens, losses))
    if collapsed is not None:
        result["collapse"] = collapsed
    if not math.isnan(losses["validation"]):
        if recipe.train.evaluate:
            result["evaluation"] = evaluate_run(model, recipe.train, tokens)
        model.save_pretrained(out / "model", state_dict=weights)
        tokens.tokenizer().save_pretrained(out / "model")
    write_json(out / RESULT, result)
    return result


def _check_same_run(recipe: Recipe, out: Path) -> bool:
    """Whether this run began in the folder before. Another run there is an error."""
    if not claim(out, folders.RUN):
        return False
    there, here = read_json(out / RUN)["recipe"], run_recipe(recipe)
    different = differences(there, here)
    if different:
        raise InputError(f"{out} already holds another run: {'; '.join(different)}. Choose another --out folder.")
    return True


def run_recipe(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe on which one run depends."""
    raw = recipe.to_dict()
    del raw["compare"], raw["ladder"]
    return raw


def differences(there: Any, here: Any, key: str = "") -> list[str]:
    """Each leaf at which two nested mappings differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [d for k in keys for d in differences(there.get(k), here.get(k), f"{key}.{k}" if key else k)]
    there, here = (list(v) if isinstance(v, tuple) else v for v in (there, here))
    return [] if there == here else [f"{key} is {there!r} there and {here!r} here"]


def _probe(engine: Engine, batch: torch.Tensor) -> dict[str, Any]:
    model = engine.accelerator.unwrap_model(engine.model)
    training = model.training
    model.eval()
    inputs, routing = batch.to(engine.args.device), RoutingMeter(getattr(model.config, "num_experts_per_tok", 0))

    def loss_of() -> torch.Tensor:
        outputs = model(inputs, labels=inputs, output_router_logits=model.config.num_experts > 0)
        if outputs.router_logits:
            routing.add(outputs.router_logits)
        loss: torch.Tensor = outputs.loss
        return loss

    try:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=engine.args.bf16):
            record = measure(model, loss_of, tokens=inputs.numel() - len(inputs)).to_dict()
    finally:
        model.train(training)
    return record if routing.sums is None else {**record, "routing": routing.take().to_dict()}


def quiet() -> None:
    """Turn off Transformers' progress bars and notices, which would break the live table. Errors are still raised."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
