"""The docs are true: what they show runs, and what is generated is up to date."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import spannorm
from spannorm.catalog import as_text, catalog, markdown
from spannorm.placements import PLACEMENTS

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_placements_is_what_the_docstrings_say() -> None:
    assert (DOCS / "placements.md").read_text(encoding="utf-8") == markdown(), "run `make docs`"


@pytest.mark.parametrize("entry", catalog(), ids=lambda e: e.name)
def test_every_placement_states_its_equation_ends_init_source_and_data_flow(entry) -> None:
    assert {"Equation", "Ends", "Init", "Source"} <= entry.fields.keys()
    assert entry.summary.endswith(".") and entry.diagram.count("\n") >= (0 if entry.name == "mix" else 1)
    assert re.search(r"arXiv \d{4}\.\d{5}|Transformers'\s`\w+`", entry.fields["Source"])
    assert entry.fields["Equation"].replace("`", "") in as_text(entry)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_page_on_adding_a_placement_runs_as_printed(tmp_path: Path) -> None:
    page = (DOCS / "add_a_placement.md").read_text(encoding="utf-8")
    (code, gated), (recipe,), commands = blocks(page, "python"), blocks(page, "yaml"), "".join(blocks(page, "sh"))
    (tmp_path / "gated.py").write_text(gated)
    commands += "spannorm theory --placements gated_pre --depths 4 --import gated.py\n"
    (tmp_path / "ffn_first.py").write_text(code)
    (tmp_path / "ffn_first.yaml").write_text(recipe)
    for command in commands.splitlines():
        words = command.split()
        assert words[0] == "spannorm"
        ran = subprocess.run(
            [sys.executable, "-m", "spannorm", *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "ffn_first" in ran.stdout or "gated_pre" in ran.stdout
    results = json.loads((tmp_path / "runs" / "ffn_first" / "results.json").read_text())
    assert [(a["placement"], a["depth_rule"]) for a in results["jobs"]] == [
        ("ffn_first", "1/sqrt(2L)"),
        ("ffn_first", "1/sqrt(L):forward"),
    ]
    assert all(arm["val_loss"] is not None for arm in results["jobs"])
    assert "ffn_first" not in PLACEMENTS, "a user's file changes nothing outside its own process"


def test_the_page_on_probes_runs_as_printed() -> None:
    for code in blocks((DOCS / "probes.md").read_text(encoding="utf-8"), "python"):
        exec(code, {})


def test_the_list_of_placements_names_them_all_and_writes_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spannorm", "placements", "--json", str(tmp_path / "list.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = json.loads((tmp_path / "list.json").read_text())
    assert [e["name"] for e in listed] == list(PLACEMENTS)
    assert all(e["name"] in ran.stdout for e in listed)


class Mixer(nn.Module):
    """Stands for attention: tokens look back, through projections of the usual names."""

    def __init__(self) -> None:
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        return self.o_proj(gain * self.v_proj(x).cumsum(1))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 48, bias=False), nn.Linear(48, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))


def test_spannorm_in_thirty_lines_is_the_librarys() -> None:
    page = (DOCS / "thirty_lines.md").read_text(encoding="utf-8")
    (code,) = blocks(page, "python")
    pasted: dict = {}
    exec(code, pasted)
    L = 4

    def stack(block) -> nn.Module:
        model = nn.Module()
        model.embed_tokens = nn.Embedding(37, 16)
        model.layers = nn.ModuleList(block(b) for b in range(L))
        return model

    ours = stack(
        lambda b: spannorm.Block(
            Mixer(), FeedForward(), "span", hidden_size=16, layer_idx=b, num_layers=L, depth_rule="1/sqrt(L):init+lr"
        )
    )
    theirs = stack(lambda b: pasted["SpanNormBlock"](Mixer(), FeedForward(), 16, b))
    pasted["init_"](theirs, L)
    state = {name.replace(".placement.", "."): p for name, p in ours.state_dict().items()}
    assert set(state) == set(theirs.state_dict())

    plan = spannorm.init_plan(ours, width=16)
    for name, p in ours.named_parameters():
        other, n = theirs.get_parameter(name.replace(".placement.", ".")), p.numel()
        assert other.std(correction=0).item() == pytest.approx(plan[name].std, rel=5 / (2 * n) ** 0.5, abs=1e-12)

    theirs.load_state_dict(state)
    x = y = ours.embed_tokens(torch.randint(0, 37, (2, 9)))
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        x, y = a(x, gain=0.5), b(y, gain=0.5)
        torch.testing.assert_close(x, y)

    def settings(groups, model) -> dict:
        names = {id(p): name.replace(".placement.", ".") for name, p in model.named_parameters()}
        return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    want = settings(spannorm.parameter_groups(ours, learning_rate=1e-2, weight_decay=0.1), ours)
    assert settings(pasted["groups"](theirs, L, 1e-2, 0.1), theirs) == {k: pytest.approx(v) for k, v in want.items()}


def test_the_page_on_rewiring_runs_as_printed_and_lists_every_family(tmp_path: Path, monkeypatch) -> None:
    from spannorm.rewiring import FAMILIES

    page = (DOCS / "rewire.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == set(FAMILIES)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for snippet in blocks(page, "python"):
        exec(snippet, scope)
    del FAMILIES["my_model"]
