"""Evaluation of a trained model: at the end of a run, or of any saved model later (`spannorm eval`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spannorm.errors import InputError
from spannorm.evaluate.questions import LOCAL
from spannorm.evaluate.tasks import (
    LocalText,
    check_installed,
    load_tasks,
    questions,
    quiet,
    task_names,
    write_task_files,
)
from spannorm.files import make_folder, read_json, write_json, writing_to
from spannorm.folders import EVALUATION, claim
from spannorm.folders import RUN as RUN_FOLDER
from spannorm.train.data import TokenData
from spannorm.train.environment import machine, versions
from spannorm.train.recipe import TrainRecipe

SPLIT = "test"
"""Questions are made from text that was used neither for training nor for the choice of a learning rate."""
RUN, RESULTS = "run.json", "results.json"


def tasks_of(recipe: TrainRecipe, tokens: TokenData, context: int) -> dict[str, Any]:
    """The tasks of a run with their data. An `InputError` comes before training starts."""
    local = any(name in LOCAL for name in task_names(recipe.evaluate))
    return load_tasks(recipe.evaluate, _text(tokens, context, recipe.evaluate_questions) if local else None)


def evaluate_run(model: Any, recipe: TrainRecipe, tokens: TokenData) -> dict[str, dict[str, Any]]:
    """The results of a run's model on its recipe's tasks; see `spannorm.evaluate.harness.evaluate`."""
    tasks = tasks_of(recipe, tokens, model.config.max_position_embeddings)
    from spannorm.evaluate.harness import evaluate

    return evaluate(model, tokens.tokenizer(), tasks, batch_size=recipe.batch_size, limit=recipe.evaluate_questions)


def evaluate_folder(
    folder: Path,
    names: Iterable[str],
    *,
    data: Path | None = None,
    out: Path | None = None,
    count: int = 0,
    batch_size: int = 16,
    on_task: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Evaluate a saved model, and return the content of `results.json`.

    Args:
        folder: a run's folder, or the folder of a model that `save_pretrained` wrote with its tokenizer
            (`spannorm.load`).
        names: tasks: `local`, `paper`, or lm-eval's names.
        data: tokens; local tasks are made from their test split. None means the run's tokens.
        out: where `results.json` and the files of local tasks go; None means `folder/eval`.
        count: questions per task at most; 0 means all.
        on_task: called with a task's name before it runs.

    Raises:
        InputError: no model, no tokenizer, no text, an unknown task, or data that is not available.
    """
    import spannorm

    check_installed()
    out = out or folder / "eval"
    claim(out, EVALUATION)
    names = task_names(names)
    path = model_folder(folder)
    tokens = run_tokens(folder, data) if any(name in LOCAL for name in names) else None
    with quiet():
        tokenizer = fast_tokenizer(path)
        model = spannorm.load(path).to("cuda" if torch.cuda.is_available() else "cpu")
    text = None if tokens is None else _text(tokens, model.config.max_position_embeddings, count)
    tasks = load_tasks(names, text)
    make_folder(out)
    from spannorm.evaluate.harness import evaluate

    scores = evaluate(model, tokenizer, tasks, batch_size=batch_size, limit=count, on_task=on_task)
    results = {
        "model": str(path),
        "tasks": scores,
        "questions_at_most": count or None,
        "context": model.config.max_position_embeddings,
        "text": None if tokens is None else {"sha256": tokens.sha256, "split": SPLIT},
        "versions": versions() | {"lm_eval": version("lm_eval")},
        "machine": machine(),
    }
    with writing_to(out):
        for name in names:
            if name in LOCAL:
                write_task_files(out, name, questions(name, text))
        write_json(out / RESULTS, results)
    return results


def model_folder(folder: Path) -> Path:
    """The folder of the model: in a run's folder `model`, otherwise the folder itself."""
    if (folder / RUN).is_file():
        if not (folder / "model" / "config.json").is_file():
            raise InputError(f"the run in {folder} has no model yet: it is not finished, or it diverged.")
        return folder / "model"
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} holds neither a run nor a model: give the folder of `spannorm train --out`, a job's folder of a "
            "comparison, or one that save_pretrained wrote."
        )
    return folder


def fast_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(f"{path} has no tokenizer ({reason}): save it beside the model.") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in {path} must be a fast one with an end-of-sequence token.")
    return tokenizer


def run_tokens(folder: Path, data: Path | None) -> TokenData:
    """The given tokens, or those of the run: in its folder, or in that of the comparison that it belongs to."""
    if data is not None:
        return TokenData.open(data)
    if not (folder / RUN).is_file():
        raise InputError(
            f"held-out text is needed, and {folder} is a model without a run: give tokens with --data (`spannorm data "
            "RECIPE` prepares them); for `spannorm eval`, or lm-eval's tasks with --tasks."
        )
    wanted = read_json(folder / RUN, RUN_FOLDER.shape)["data"]["sha256"]
    places = [folder / "data", *sorted((folder.absolute().parent.parent / "data").glob("*"))]
    for place in places:
        if (place / "data.json").is_file() and (tokens := TokenData.open(place)).sha256 == wanted:
            return tokens
    raise InputError(
        f"the tokens that the run in {folder} was trained on (sha256 {wanted[:16]}) are neither in it nor beside it: "
        "give their folder with --data."
    )


def _text(tokens: TokenData, context: int, count: int) -> LocalText:
    return LocalText(tuple(tokens.documents(SPLIT)), context, count)
