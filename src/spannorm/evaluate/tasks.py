"""The tasks that `spannorm eval` knows: two made from the user's own text, the paper's list, and all of lm-eval's."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging as transformers_logging

from spannorm.errors import InputError
from spannorm.evaluate.questions import LOCAL, Question
from spannorm.files import write_jsonl, write_text

PAPER = ("winogrande", "hellaswag", "lambada_openai", "arc_easy", "arc_challenge", "piqa", "sciq", "wikitext")
"""The paper's list, by lm-eval's names."""
GROUPS = {"local": tuple(LOCAL), "paper": PAPER}
LONGEST_CONTEXT = 512  # characters
FEWEST = 30
"""The least number of questions of a task made from text. With fewer, the interval is wider than ± 0.15."""


@dataclass(frozen=True)
class LocalText:
    """The text from which local tasks are made.

    Args:
        documents: held-out texts.
        context: the longest input of the model in tokens. It decides the length of a question's context.
        questions: questions per task at most; 0 means all.
    """

    documents: Sequence[str]
    context: int
    questions: int = 0

    @property
    def characters(self) -> int:
        """Length of a question's context. With an answer of a third of it, it fits into `context` tokens.

        A token has at least one character of ASCII text.
        """
        return min(LONGEST_CONTEXT, self.context * 3 // 4)


def task_names(names: Iterable[str]) -> list[str]:
    """The tasks of some names, each once. `local` and `paper` are replaced by their tasks.

    Raises:
        InputError: no name at all.
    """
    found = list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))
    if not found:
        raise InputError(f"no task is named: give {', '.join(GROUPS)}, {', '.join(LOCAL)}, or lm-eval's names.")
    return found


def check_installed() -> None:
    """Raise `InputError` if lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise InputError("evaluation needs lm-eval, which is not installed: pip install 'spannorm[eval]'.")


def load_tasks(names: Iterable[str], text: LocalText | None) -> dict[str, Any]:
    """lm-eval's task objects by name, with their data loaded. lm-eval's own groups become their tasks.

    Args:
        text: the text for local tasks; None if there is none.

    Raises:
        InputError: lm-eval is not installed; a name is not known; a task's data is neither on this machine nor
            available from the Hub; there is no text for a local task, or too few questions in it.
    """
    check_installed()
    names = task_names(names)
    with quiet():
        made = {name: _local_task(name, questions(name, text)) for name in names if name in LOCAL}
        others = [name for name in names if name not in LOCAL]
        found = _from_harness(others) if others else {}
        return {task: obj for name in names for task, obj in (found.get(name) or {name: made[name]}).items()}


def questions(name: str, text: LocalText | None) -> list[Question]:
    """The questions of a local task. Raises `InputError` if there is no text, or if it gives too few questions."""
    if text is None:
        raise InputError(
            f"the task {name} is made from held-out text, and there is none here: give the run's tokens with --data."
        )
    made = LOCAL[name](text.documents, text.questions, text.characters)
    if len(made) < min(FEWEST, text.questions or FEWEST):
        raise InputError(
            f"the held-out text has {len(made)} questions for the task {name} with contexts of at most "
            f"{text.characters} characters, and {FEWEST} are needed: use a larger corpus or data.test_fraction, a "
            "longer train.sequence_length, or leave the task out."
        )
    return made


def questions_sha256(made: Sequence[Question]) -> str:
    """SHA-256 of the questions as JSON. Results with the same hash answered the same questions."""
    return sha256(json.dumps(made, ensure_ascii=False).encode()).hexdigest()


def write_task_files(folder: Path, name: str, made: Sequence[Question]) -> None:
    """Write a local task as `NAME.yaml` and `NAME.jsonl`, for any model: `lm_eval --tasks FOLDER/NAME.yaml`."""
    data = (folder / f"{name}.jsonl").absolute()
    write_jsonl(data, made)
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    write_text(folder / f"{name}.yaml", yaml.safe_dump(_config(name) | where, sort_keys=False))


def _config(name: str) -> dict[str, Any]:
    return {
        "task": name,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "num_fewshot": 0,
        # no `acc_norm`: the choices of a question are of one length
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _local_task(name: str, made: Sequence[Question]) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    task = ConfigurableTask(config=_config(name) | {"custom_dataset": lambda **_: {"test": Dataset.from_list(made)}})
    task.questions_sha256 = questions_sha256(made)
    return task


def _from_harness(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    # Reading all of lm-eval's thousands of definitions takes ten seconds; most names begin with their folder's.
    shelves = dict.fromkeys(Path(lm_eval.tasks.__file__).parent / name.partition("_")[0] for name in names)
    manager = TaskManager(include_defaults=False, include_path=[str(path) for path in shelves if path.is_dir()])
    if not all(name in manager.all_tasks for name in names):
        manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, [*GROUPS, *LOCAL, *PAPER], n=1, cutoff=0.5)
            near = near or get_close_matches(name, manager.all_tasks, n=1, cutoff=0.5)
            raise InputError(
                f"unknown task {name!r}: {f'did you mean {near[0]!r}? ' if near else ''}Known: {', '.join(GROUPS)}, "
                f"{', '.join(LOCAL)}, and the {len(manager.all_tasks):,} of lm-eval: `lm-eval ls tasks`."
            )
    found = {}
    for name in names:
        try:
            found[name] = manager.load([name])["tasks"]
        except ImportError as error:
            raise InputError(f"the task {name} needs a package that is not installed ({error}).") from None
        except Exception as error:  # its loaders raise many kinds of errors
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(
                f"the data of the task {name} is neither in this machine's cache nor to be had from the Hub "
                f"({reason}): load it once where there is a network, or leave the task out."
            ) from None
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off notices and progress bars of libraries, which would break the live table. Errors are still raised."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = [
        (transformers_logging.disable_progress_bar, transformers_logging.enable_progress_bar,
         not transformers_logging.is_progress_bar_enabled()),
    ]  # fmt: skip
    if find_spec("datasets") is not None:  # it comes with the extra `eval`
        import datasets

        off = datasets.are_progress_bars_disabled()
        bars.append((datasets.disable_progress_bars, datasets.enable_progress_bars, off))
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    for disable, _, _ in bars:
        disable()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for _, enable, was_disabled in bars:
            if not was_disabled:
                enable()
