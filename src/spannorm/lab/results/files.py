"""`results.json` of a comparison, and the JSONL files of its jobs, as they are read.

Format 2 has every job under `jobs`, each with its `condition`. Format 1, written before version 0.2.0, has no `format`
and calls them `arms` and `cell`. Both are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spannorm.errors import InputError
from spannorm.files import checked, read_text
from spannorm.text import plain, plain_in
from spannorm.train.health import ROUTING
from spannorm.train.ramp import SHARES

RESULTS, FORMAT = "results.json", 2
LARGEST = 1e38  # float32 ends here: what is larger was never measured
JobResult = dict[str, Any]
"""One element of `jobs` in `results.json`: what the job was, how far it came and what it measured."""

_NUMBER = (float, None)
_METRIC = {"value?": float, "stderr?": float}
_JOB = {
    "job": str, "placement": str, "depth_rule": str, "status": str,
    **dict.fromkeys(("reason?", "arm?", "stage?"), str),
    **dict.fromkeys(("seed?", "steps?", "steps_done?"), int),
    **dict.fromkeys(("learning_rate?", "val_loss?", "test_loss?", "bits_per_byte?", "unigram_loss?"), float),
    **dict.fromkeys(("initial_loss?", "max_grad_norm?", "spikes?", "spike_score?", "tokens_per_second?"), float),
    **dict.fromkeys(("tokens?", "depth?", "parameters?", "body_parameters?", "active_parameters?"), float),
    "flops_per_token?": float, "matrix_share?": float,
    "overrides?": dict, "condition?": dict, "cell?": dict, "tables?": [str],
    "collapse?": {name: [_NUMBER] for name in ("effective_rank", "skip_cost", "spectrum")},
    "evaluation?": {str: {"metrics": {str: _METRIC}, "questions": int, "chance?": float, "questions_sha256?": str}},
    "tolerated?": {"learned": bool, "rates": {f"{share:g}": _NUMBER for share in SHARES}},
}  # fmt: skip
_PROTOCOL = {"seeds?": [int], "pairs?": [[str]]}
_RESULTS = {
    "format?": int, "name?": str,
    "recipe?": {"model?": dict, "train?": {"steps?": int, "learning_rate?": float},
                "compare?": {"protocol?": _PROTOCOL}},
    "versions?": dict, "machine?": dict, "data?": dict, "ladder?": dict,
}  # fmt: skip
"""What a report needs of `results.json`; see `spannorm.files.checked`."""
_MOST_STEPS = 10**12
_STATES = ("waiting", "running", "stopped", "crashed", "ok", "failed")


def _parsed(text: str) -> Any:
    """JSON in which NaN, Infinity and numbers that were never measured are unknown, like null."""

    def number(digits: str) -> float | None:
        return value if abs(value := float(digits)) < LARGEST else None

    def whole(digits: str) -> int | None:
        return None if number(digits) is None else int(digits)

    return json.loads(text, parse_constant=lambda _: None, parse_int=whole, parse_float=number)


def read_results(path: Path) -> dict[str, Any]:
    """`results.json` with every text made plain and what is missing made null, in the newest format.

    Raises:
        InputError: it is missing, written by a newer version, or a field has the wrong type; the field is named.
    """
    redo = "give the folder that `spannorm compare RECIPE --out DIR` wrote"
    if not path.is_file():
        raise InputError(f"a report is drawn from results.json; there is none at {path}: {redo}.")
    try:
        results: Any = plain_in(_parsed(read_text(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} must be JSON; reading it failed ({error}): {redo}.") from None
    form = results.get("format", 1) if isinstance(results, dict) else 1
    if form not in range(1, FORMAT + 1):
        raise InputError(f"{path} has format {form!r}, and this version of spannorm reads up to {FORMAT}: update it.")
    key = "arms" if form == 1 else "jobs"
    jobs = results.get(key) if isinstance(results, dict) else None
    if not isinstance(jobs, list) or not jobs or not all(isinstance(job, dict) for job in jobs):
        raise InputError(f"{path} must hold an object with a non-empty list `{key}` of objects: {redo}.")
    try:
        checked(results, _RESULTS, str(path))
        for number, job in enumerate(jobs):
            checked({f"{key}[{number}]": job}, {f"{key}[{number}]": _JOB}, str(path))
    except InputError as error:
        raise InputError(f"{error} {redo[0].upper()}{redo[1:]}.") from None
    _check_jobs(jobs, key, path, redo)
    for job in jobs:
        _complete(job)
    sections = ("recipe", "versions", "machine", "data", "ladder")
    return {"name": str(results.get("name") or plain(path.parent.name)), "jobs": jobs} | {
        section: results.get(section) or {} for section in sections
    }


def _check_jobs(jobs: list[JobResult], key: str, path: Path, redo: str) -> None:
    """Names that are folders and stand there once, and states that we know."""
    seen = set()
    for number, job in enumerate(jobs):
        name, status, where = job["job"], job["status"], f"{path}: `{key}[{number}]"
        if Path(name).name != name:
            raise InputError(f"{where}.job` must be a folder's name and is {name!r}: {redo}.")
        if status not in _STATES:
            raise InputError(f"{where}.status` must be one of {', '.join(_STATES)} and is {status!r}: {redo}.")
        if name in seen:
            raise InputError(f"{where}.job` {name!r} stands there twice: {redo}.")
        seen.add(name)


def _complete(job: JobResult) -> None:
    """Give a job every key that its readers look for."""
    for key in ("reason", "seed", "learning_rate"):
        job.setdefault(key, None)
    job.setdefault("condition", job.pop("cell", None))  # its name in format 1
    for key in ("collapse", "evaluation", "tolerated", "overrides", "condition"):
        job[key] = job.get(key) or {}
    job["steps_done"] = job.get("steps_done") or 0
    job["tables"], job["stage"] = job.get("tables") or [""], job.get("stage") or ""
    if job["stage"] or job["tolerated"]:
        job["arm"] = job.get("arm") or f"{job['placement']} {job['depth_rule']}"


_LINES = {
    "records.jsonl": {"step": int, **dict.fromkeys(("loss?", "grad_norm?", "learning_rate?"), float),
                      **{f"{name}?": float for name in ROUTING}},
    "probes.jsonl": {"step": int, "signal_rms?": [_NUMBER], "gradient_rms?": [_NUMBER], "similarity?": [[_NUMBER]],
                     "routing?": {"load?": [[_NUMBER]]}},
}  # fmt: skip


def read_lines(path: Path, unread: list[str]) -> list[dict[str, Any]]:
    """The lines by step. A line that cannot be read is left out and counted; a step done again counts last."""
    if not path.is_file():
        return []
    lines, bad = {}, 0
    try:
        text = read_text(path)
    except InputError as error:
        unread.append(plain(error))
        return []
    for line in text.splitlines():
        try:
            record = checked(_parsed(line), _LINES[path.name], path.name)
            if not 0 <= record["step"] < _MOST_STEPS:
                raise ValueError(record["step"])
            lines[record["step"]] = record
        except (ValueError, RecursionError):
            bad += 1
    bad -= bool(bad and not text.endswith("\n"))  # the last line may still be being written
    if bad:
        unread.append(f"{path.parent.name}/{path.name}: {bad}")
    return [lines[step] for step in sorted(lines)]
