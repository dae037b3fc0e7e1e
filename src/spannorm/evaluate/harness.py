"""A model in lm-eval. Import this only if lm-eval is installed (`tasks.load_tasks` checks that)."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from statistics import fmean
from typing import Any

from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.huggingface import HFLM

from spannorm.evaluate.tasks import quiet

_DRAWS = 1000  # of a bootstrap, for the metrics that have no standard error in closed form


class Harness(HFLM):
    """lm-eval's `HFLM`, except that long answers are scored in windows, and contexts that were cut are counted.

    Args:
        model: a causal language model; its `config.max_position_embeddings` is the longest context.
        tokenizer: a fast tokenizer with an end-of-sequence token, which is put before a text without context.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        with quiet():
            super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size,
                             max_length=model.config.max_position_embeddings)  # fmt: skip
        self.cut = 0
        """The number of requests so far whose context was cut on the left because it did not fit."""

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation given its context, in nats, and whether its tokens are the most likely.

        `HFLM` accepts no continuation longer than the model's context. Here it is scored in pieces of that length. Each
        piece has as much earlier text as fits, at least one token, as in `loglikelihood_rolling`.
        """
        pieces, owners = [], []
        for number, (text, context, continuation) in enumerate(requests):
            self.cut += len(context) + len(continuation) > self.max_length + 1
            for start in range(0, len(continuation) or 1, self.max_length):
                piece = continuation[start : start + self.max_length]
                whole = len(piece) == len(continuation)
                pieces.append((text if whole else None, context + continuation[:start], piece))
                owners.append(number)
        scored = super()._loglikelihood_tokens(pieces, disable_tqdm=True, override_bs=override_bs and len(pieces))
        answers = [(0.0, True)] * len(requests)
        for owner, (logprob, greedy) in zip(owners, scored, strict=True):
            answers[owner] = (answers[owner][0] + logprob, answers[owner][1] and greedy)
        return answers


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    *,
    batch_size: int = 16,
    limit: int = 0,
    on_task: Callable[[str], object] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Run tasks on a model, in evaluation mode, and return their results.

    Args:
        tasks: lm-eval's task objects (`load_tasks`).
        limit: the first questions of each task; 0 means all.
        on_task: called with a task's name before it runs.

    Returns:
        By task: `metrics` (name → `value`, `stderr` over the questions or None, `higher_is_better`), `questions`,
        `chance` (the share of right answers by guessing; None if it is not multiple choice), `cut` (requests whose
        context did not fit and was cut on the left), `version` of the task, and `questions_sha256` for tasks made from
        text.
    """
    training = model.training
    results = {}
    try:
        harness = Harness(model, tokenizer, batch_size)
        for name, task in tasks.items():
            on_task(name)
            harness.cut = 0
            with _silent():
                task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
                task.set_fewshot_seed(seed=1234)  # lm-eval's default
                told = run_harness(
                    harness, {"tasks": {name: task}}, limit=limit or None, bootstrap_iters=_DRAWS, log_samples=False
                )
            results[name] = _result(name, task, told, harness.cut)
    finally:
        model.train(training)
    return results


def _result(name: str, task: Any, told: Mapping[str, Any], cut: int) -> dict[str, Any]:
    higher = told["higher_is_better"][name]
    metrics = {}
    for key, value in told["results"][name].items():
        metric, _, which = key.partition(",")  # `which` names one of several filters of the answers
        if which and not metric.endswith("_stderr"):
            error = told["results"][name].get(f"{metric}_stderr,{which}")
            metrics[metric if which == "none" else key] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
                "higher_is_better": higher.get(metric),
            }
    choices: dict[int, int] = {}
    for instance in task.instances:
        choices[instance.doc_id] = choices.get(instance.doc_id, 0) + 1
    guess = fmean(1 / number for number in choices.values()) if task.OUTPUT_TYPE == "multiple_choice" else None
    result = {"metrics": metrics, "questions": len(choices), "chance": guess, "cut": cut,
              "version": told["versions"].get(name)}  # fmt: skip
    questions = getattr(task, "questions_sha256", None)
    return result | ({"questions_sha256": questions} if questions else {})


@contextmanager
def _silent() -> Iterator[None]:
    """Turn off lm-eval's progress bars, and its bootstrap's copies of this process, one per core."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with quiet(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
