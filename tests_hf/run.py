"""Transformers' own suites on our models: passes, failures with their reasons, skips; a table and JSON.

    python tests_hf/run.py [--checkout DIR] [--only EXPRESSION] [--workers 2] [--json FILE]

`make test-hf` runs all of it. The tests come from the source distribution of the Transformers that is installed, which
pip fetches once. That lacks the generation, export and pipeline suites; a clone of Transformers' repository at the same
release, given as --checkout, has the first two as well. Exits with 1 where a failure has no entry in `known.py`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers
from known import KNOWN
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from source import HERE, download, missing, search_path

from spannorm.files import write_json

OPTIONS = ["-q", "--no-header", "--no-summary", "--disable-warnings", "-p", "no:cacheprovider"]
OPTIONS += ["-o", "addopts=", "-o", "filterwarnings=default"]  # pyproject.toml's are for our own tests


class Outcomes:
    """What became of each test: pytest's reports, its subtests' among them, put together."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        test = self.found.setdefault(report.nodeid, {"whole": "passed", "parts": [], "messages": []})
        part = hasattr(report, "context")  # a subtest's
        if part:
            test["parts"].append(report.outcome)
        else:
            test["whole"] = report.outcome
        if report.skipped:
            test["messages"].append(str(report.longrepr[2]).removeprefix("Skipped: "))
        elif report.failed and (crash := getattr(report.longrepr, "reprcrash", None)):
            test["messages"].append(crash.message.strip())

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for nodeid, test in sorted(self.found.items()):
            _, group, name = nodeid.split("::")
            parts, whole = test["parts"], test["whole"]
            outcome = (
                "failed" if "failed" in (whole, *parts)
                else "skipped" if whole == "passed" and parts and set(parts) == {"skipped"}
                else whole
            )  # fmt: skip
            model, _, suite = group.removeprefix("Test_").partition("__")
            row = {"model": model.replace("_", " "), "suite": suite, "test": name, "outcome": outcome}
            if outcome == "failed":
                row["reason"] = next((k.reason for k in KNOWN if k.covers(row["model"], name)), None)
            if outcome != "passed":
                row["messages"] = list(dict.fromkeys(test["messages"]))
            rows.append(row)
        return rows


def table(rows: list[dict[str, Any]]) -> Table:
    found = Table("model", title=f"Transformers {transformers.__version__}: its tests on our models")
    for column in ("passed", "failed, reason known", "failed", "skipped"):
        found.add_column(column, justify="right")
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        count = Counter(row["outcome"] for row in own)
        known = sum(row.get("reason") is not None for row in own)
        counts = count["passed"], known, count["failed"] - known, count["skipped"]
        found.add_row(model, *map(str, counts))
    return found


def by_reason(rows: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Reason → the tests that it explains → on how many models."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        if row.get("reason"):
            found.setdefault(row["reason"], Counter())[row["test"]] += 1
    return found


def skips(rows: list[dict[str, Any]]) -> Counter[str]:
    """Why tests were skipped, whatever the model's class was called."""
    found: Counter[str] = Counter()
    for row in rows:
        if row["outcome"] == "skipped":
            text = "; ".join(row["messages"]).split("\n")[0]
            found[re.sub(r"(<class ')?[\w.]*(SpanNorm|Llama)\w+('>)?", "the model", text)] += 1
    return found


def stale(rows: list[dict[str, Any]]) -> list[str]:
    """Entries of `known.py` whose tests ran and did not fail."""
    lines = []
    for known in KNOWN:
        covered = [row["outcome"] for row in rows if known.covers(row["model"], row["test"])]
        if covered and "failed" not in covered:
            lines.append(f"{known.test} ({', '.join(known.models)}): {known.reason}")
    return lines


def report(rows: list[dict[str, Any]], lacking: list[str]) -> bool:
    """Print everything; whether every failure has its reason."""
    console = Console()
    console.print(table(rows))
    show = partial(console.print, soft_wrap=True)
    for reason, tests in by_reason(rows).items():
        show(f"[bold]known[/bold] {escape(reason)}")
        show("  " + escape(", ".join(f"{name} × {n}" for name, n in sorted(tests.items()))))
    skipped = "; ".join(f"{n} × {text}" for text, n in skips(rows).most_common())
    show(f"[bold]skipped[/bold] {escape(skipped or 'none')}")
    if lacking:
        show(f"[bold]not run[/bold] the source distribution has no {', '.join(lacking)} suite (--checkout)")
    for line in stale(rows):
        show(f"[yellow]passes now[/yellow] {escape(line)}: take it out of known.py")
    unexplained = [row for row in rows if row["outcome"] == "failed" and row["reason"] is None]
    for row in unexplained:
        message = " | ".join(text.replace("\n", " ")[:300] for text in row["messages"])
        show(f"[red]failed[/red] {row['model']}: {row['test']}: {escape(message)}")
    return not unexplained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="a clone of Transformers at the installed release")
    parser.add_argument("--folder", type=Path, default=Path("runs/hf"), help="where the distribution is unpacked")
    parser.add_argument("--only", default="", help="as pytest's -k")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    checkout = (given.checkout or download(given.folder)).resolve()
    path = search_path(checkout)
    sys.path[:0] = path
    # for pytest's workers and for the processes of the distributed suites
    os.environ["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    outcomes = Outcomes()
    code = pytest.main(
        [str(HERE / "test_suites.py"), *OPTIONS, "-n", str(given.workers), "-k", given.only], plugins=[outcomes]
    )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    rows, lacking = outcomes.rows(), missing(checkout)
    if given.json:
        write_json(given.json, {"transformers": transformers.__version__, "not run": lacking, "tests": rows})
    return 0 if report(rows, lacking) else 1


if __name__ == "__main__":
    sys.exit(main())
