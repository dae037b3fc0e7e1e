"""The docs are true: what they show runs, and what is generated is up to date."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spannorm.placements import PLACEMENTS
from spannorm.placements.catalog import as_text, catalog, markdown

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_placements_is_what_the_docstrings_say() -> None:
    assert (DOCS / "placements.md").read_text(encoding="utf-8") == markdown(), "run `make docs`"


@pytest.mark.parametrize("entry", catalog(), ids=lambda e: e.name)
def test_every_placement_states_its_equation_ends_init_source_and_data_flow(entry) -> None:
    assert {"Equation", "Ends", "Init", "Source"} <= entry.fields.keys()
    assert entry.summary.endswith(".") and entry.diagram.count("\n") >= (0 if entry.name == "mix" else 1)
    assert re.search(r"arXiv \d{4}\.\d{5}", entry.fields["Source"])
    assert entry.fields["Equation"].replace("`", "") in as_text(entry)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_page_on_adding_a_placement_runs_as_printed(tmp_path: Path) -> None:
    page = (DOCS / "add_a_placement.md").read_text(encoding="utf-8")
    (code,), (recipe,), (commands,) = blocks(page, "python"), blocks(page, "yaml"), blocks(page, "sh")
    (tmp_path / "parallel.py").write_text(code)
    (tmp_path / "parallel.yaml").write_text(recipe)
    for command in commands.splitlines():
        words = command.split()
        assert words[0] == "spannorm"
        ran = subprocess.run(
            [sys.executable, "-m", "spannorm", *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "parallel" in ran.stdout
    results = json.loads((tmp_path / "runs" / "parallel" / "results.json").read_text())
    assert [(a["placement"], a["depth_rule"]) for a in results["arms"]] == [
        ("parallel", "1/sqrt(2L)"),
        ("parallel", "1/sqrt(L):forward"),
    ]
    assert all(arm["val_loss"] is not None for arm in results["arms"])
    assert "parallel" not in PLACEMENTS, "a user's file changes nothing outside its own process"


def test_the_page_on_probes_runs_as_printed() -> None:
    (code,) = blocks((DOCS / "probes.md").read_text(encoding="utf-8"), "python")
    exec(code, {})


def test_the_list_of_placements_names_them_all_and_writes_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spannorm", "placements", "--json", str(tmp_path / "list.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = json.loads((tmp_path / "list.json").read_text())
    assert [e["name"] for e in listed] == list(PLACEMENTS)
    assert all(e["name"] in ran.stdout for e in listed)
