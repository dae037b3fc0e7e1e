"""The explorer holds the theory's own numbers, and says where there are none."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from our_scripts import numbers_of, without_our_scripts

from spannorm import theory
from spannorm.errors import InputError
from spannorm.lab.depth import explorer
from spannorm.lab.depth.theory import cases, sizes

pytest.importorskip("bokeh")
FINITE = re.compile(r"[^<>\x00-\x1f]*")


def written(folder: Path, placements: list[str], rules: list[str], depths: list[int], *overrides: str) -> str:
    chosen = cases(sizes(None, overrides), placements, rules, depths)
    explorer.write_explorer(chosen, folder / "explorer.html")
    return (folder / "explorer.html").read_text(encoding="utf-8")


def test_every_stack_has_the_theorys_numbers_by_block(tmp_path):
    page = written(tmp_path, ["pre", "span"], ["none", "1/sqrt(L)"], [8, 100])
    (numbers,) = numbers_of(page)
    entries = {(e["placement"], e["rule"], e["depth"]): e for e in numbers["entries"]}
    assert len(entries) == 8
    body = theory.Body(hidden_size=64, intermediate_size=176, num_attention_heads=4, sequence_length=64)
    for (placement, rule, depth), entry in entries.items():
        p = theory.predict(placement, depth, depth_rule=rule, body=body)
        assert entry["blocks"][0] == 0 and entry["blocks"][-1] == depth - 1 and len(entry["blocks"]) <= 80
        for i, block in enumerate(entry["blocks"]):
            assert entry["gradient"][i] == pytest.approx(math.exp(p.log_gradient[block]), rel=1e-3)
            assert entry["variance"]["output"][i] == pytest.approx(p.variance["output"][block], rel=1e-3)
    assert set(entries["pre", "none", 8]["skip"]) == {1.0}  # PreNorm's skip path is the identity
    assert entries["span", "none", 100]["skip"][0] < 1e-3


def test_the_page_needs_no_network_and_holds_no_script_of_others(tmp_path):
    page = written(tmp_path, ["span"], ["none"], [4])
    rest = without_our_scripts(page, ("charts/live.js", "depth/explorer.js"), FINITE)
    assert "http" not in rest and "@import" not in rest and "url(" not in rest and "src=" not in rest


def test_width_is_a_choice_only_where_it_changes_the_numbers(tmp_path):
    page = written(tmp_path, ["pre"], ["none"], [4])
    assert numbers_of(page)[0]["widths"] == [64] and "There is no choice of width" in page
    assert 'name="width"' not in without_our_scripts(page, ("charts/live.js", "depth/explorer.js"), FINITE)
    page = written(tmp_path, ["pre"], ["none"], [4], "model.base_init=normal")  # std 0.02, whatever the width
    (numbers,) = numbers_of(page)
    assert numbers["widths"] == [64, 128, 256, 512] and 'name="width"' in page
    assert len({e["gradient"][0] for e in numbers["entries"]}) == 4


def test_what_the_theory_cannot_follow_has_its_reason(tmp_path):
    (numbers,) = numbers_of(written(tmp_path, ["span", "gated"], ["none"], [4]))
    reasons = {e["placement"]: e.get("unpredicted") for e in numbers["entries"]}
    assert reasons["span"] is None and reasons["gated"]


def test_without_bokeh_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "library", lambda: None)
    with pytest.raises(InputError, match=r"pip install 'spannorm\[report\]'"):
        written(tmp_path, ["span"], ["none"], [4])
