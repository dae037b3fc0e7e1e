"""The explorer in a real browser: choices change the curves, which answer with the theory's numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import WIDTHS, answer, needs_browser, opened, picture, window

from spannorm import theory
from spannorm.lab.depth.explorer import write_explorer
from spannorm.lab.depth.theory import cases, sizes

pytestmark = needs_browser
DEPTHS = [8, 16, 32]
BODY = theory.Body(hidden_size=64, intermediate_size=176, num_attention_heads=4, sequence_length=64)


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("explorer") / "explorer.html"
    write_explorer(cases(sizes(None), ["pre", "post", "gated"], ["none", "1/sqrt(L)"], DEPTHS), file)
    return file


@pytest.fixture(params=WIDTHS)
def page(explorer: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with opened(explorer, request.param) as page:
        waits_for(page, "pre", "none", 8)
        yield page


def waits_for(page: Any, placement: str, rule: str, depth: int) -> None:
    page.locator(f"body[data-shown='{placement}|{rule}|{depth}|64']").wait_for(timeout=60_000)


def choose(page: Any, placement: str, rule: str, depth: int) -> None:
    page.locator("select[name=placement]").select_option(placement)
    page.locator("select[name=rule]").select_option(rule)
    page.locator("input[name=depth]").fill(str(DEPTHS.index(depth)))


def test_choices_change_the_curves_which_answer_with_the_theorys_numbers(page):
    gradient = page.locator("#gradient")
    for placement, rule, depth in (("post", "none", 32), ("post", "1/sqrt(L)", 16), ("pre", "1/sqrt(L)", 16)):
        choose(page, placement, rule, depth)
        waits_for(page, placement, rule, depth)
        p = theory.predict(placement, depth, depth_rule=rule, body=BODY)
        curve, block, value = answer(page, gradient, 0.6)
        i = int(block.removeprefix("block "))
        wanted = {"whole gradient": p.log_gradient, "skip path": p.log_skip}[curve][i]
        assert float(value.removeprefix("gradient ")) == pytest.approx(math.exp(wanted), rel=1e-3)
        assert page.locator("#words li").first.inner_text().endswith(f"{theory.times(p.log_total_gain)}.")


def test_a_name_hides_its_curve_and_an_axis_switches(page):
    gradient = page.locator("#gradient")
    choose(page, "post", "none", 32)
    waits_for(page, "post", "none", 32)
    before = picture(gradient)
    gradient.get_by_role("button", name="skip path").click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    assert picture(gradient) != before
    gradient.locator("input.log-y").uncheck()
    page.wait_for_timeout(1000)
    assert gradient.locator(".live").evaluate("({ chart }) => chart.figure.y_scale.type") == "LinearScale"
    assert answer(page, gradient, 0.2)[0] == "whole gradient"


def test_both_charts_zoom_together(page):
    choose(page, "post", "none", 32)
    waits_for(page, "post", "none", 32)
    gradient, variance = page.locator("#gradient"), page.locator("#variance")
    whole = window(gradient)
    plot = gradient.locator(".plot")
    plot.evaluate("plot => plot.scrollIntoView({ block: 'center' })")
    if page.viewport_size["width"] < 500:
        gradient.locator(".bk-tool-icon-box-zoom").click()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.7 * box["height"], steps=8)
    page.mouse.up()
    page.wait_for_timeout(300)
    assert whole[0] + 5 < window(gradient)[0] < window(gradient)[1] < whole[1] - 2
    assert window(variance) == window(gradient)


def test_what_has_no_theory_says_so_and_nothing_is_too_wide(page):
    choose(page, "gated", "none", 8)
    assert "The theory says nothing about gated" in page.locator("#reason").inner_text()
    assert not page.locator("#gradient").is_visible()
    choose(page, "pre", "none", 8)
    page.locator("#gradient").wait_for(state="visible")
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    page.emulate_media(media="print")
    assert page.locator("#gradient canvas").first.is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")
