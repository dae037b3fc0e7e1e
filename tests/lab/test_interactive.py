"""The numbers that the report's charts answer with are those of the records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from lab_files import arm, comparison, failed
from our_scripts import numbers_of

from spannorm.lab.charts import library
from spannorm.lab.report import page

pytest.importorskip("bokeh")
SEEDS = [arm("span", seed=seed, val_loss=1.8 + seed / 10) for seed in (3, 4)]


def charts(folder: Path, arms: list) -> dict[str, dict]:
    text = page.draw_report(comparison(folder, arms)).read_text()
    return {chart["y_name"]: chart for chart in numbers_of(text)}


def records(folder: Path, job: str, key: str) -> list[float]:
    lines = (folder / "jobs" / job / "records.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def test_a_line_is_a_run_with_its_arm_seed_steps_and_values(tmp_path):
    found = charts(tmp_path, [*SEEDS, arm("pre", val_loss=1.95)])
    assert set(found) == {"training loss", "gradient norm", "RMS of ∂loss/∂x", "RMS of x"}
    lines = {(line["arm"], line["seed"]): line for line in found["gradient norm"]["lines"]}
    assert set(lines) == {(0, 0), (1, 3), (1, 4), (1, None)}  # of two seeds there is a mean as well
    wanted = records(tmp_path, SEEDS[0]["job"], "grad_norm")
    assert lines[1, 3]["x"] == [*range(1, 61)]
    assert lines[1, 3]["y"] == pytest.approx(wanted, rel=1e-4)
    loss = next(line for line in found["training loss"]["lines"] if line["arm"] == 0)
    raw = records(tmp_path, "pre-none-lr0.006-seed0", "loss")
    trailing = [np.mean(raw[max(0, step - 3) : step]) for step in range(1, 61)]  # 60 steps // 20
    assert loss["y"] == pytest.approx(trailing, rel=1e-4)
    marks = [(mark["arm"], mark["seed"], mark["x"], mark["y"]) for mark in found["training loss"]["marks"]]
    assert marks == [(0, 0, 60, 1.95), (1, 3, 60, 2.1), (1, 4, 60, 2.2)]
    layers = found["RMS of ∂loss/∂x"]["lines"][0]
    assert layers["x"] == [0, 1, 2, 3, 4] and layers["y"] == [1, 0.5, 0.25, 0.125, 0.0625] and layers["at"] == "step 60"


def test_a_failed_run_ends_where_it_failed_and_is_no_part_of_the_mean(tmp_path):
    found = charts(tmp_path, [*SEEDS, failed("span", "none", "non-finite", seed=5)])
    lines = {line["seed"]: line for line in found["training loss"]["lines"]}
    assert lines[5]["failed"] and lines[5]["x"][-1] == 29  # the thirtieth loss was not finite
    assert lines[None]["mean"] == 2 and lines[None]["x"][-1] == 60


def test_the_legend_has_the_names_in_the_order_of_the_numbers(tmp_path):
    arms = [arm("pre", val_loss=1.7), arm("span", val_loss=1.8), failed("post", "none", "unigram")]
    text = page.draw_report(comparison(tmp_path, arms)).read_text()
    assert re.findall(r'<span class="name">(.*?)</span>', text) == ["pre none", "span none", "post none"]
    looks = numbers_of(text)[0]["looks"]
    assert [look["color"] for look in looks] == ["#0072b2", "#d55e00", "#009e73"]


def test_many_runs_share_what_a_browser_draws_in_one_go(tmp_path):
    arms = [arm(f"p{i}", seed=seed, val_loss=1.8 + i / 100) for i in range(48) for seed in range(4)]
    for chart in charts(tmp_path, arms).values():
        assert len(chart["lines"]) == 48 * 5
        assert sum(len(line["x"]) for line in chart["lines"]) <= 48 * 5 * 80


def test_without_bokeh_the_figures_stand_still_and_the_page_says_how_to_change_that(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "library", lambda: None)
    text = page.draw_report(comparison(tmp_path, SEEDS)).read_text()
    assert "<script" not in text and 'class="live"' not in text
    assert library.INSTALL in text.replace("&#39;", "'")
