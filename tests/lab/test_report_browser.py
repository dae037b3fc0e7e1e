"""The report in a real browser: it answers, hides, zooms and switches its axes, on a desk, on a phone and on paper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import WIDTHS, answer, chart, needs_browser, opened, picture, window
from lab_files import arm, comparison, failed

from spannorm.lab.report.page import draw_report

pytestmark = needs_browser
EVIL = "<img src=x onerror=alert(1)>"
ARMS = [
    arm("span", "1/sqrt(L)", seed=3, val_loss=1.8),
    arm("span", "1/sqrt(L)", seed=4, val_loss=1.81),
    arm("pre", "a-rule-with-a-long-name:of-the-kind-that-people-write", val_loss=1.85),
    arm(EVIL, job="evil", val_loss=1.9),
    failed("post", "none", "non-finite"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_report(comparison(tmp_path_factory.mktemp("report"), ARMS))


@pytest.fixture(params=WIDTHS)
def page(report: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with opened(report, request.param) as page:
        yield page


def recorded(report: Path, label: str, seed: int, step: int) -> float:
    (row,) = (row for row in ARMS if f"{row['placement']} {row['depth_rule']}" == label and row["seed"] == seed)
    lines = (report.parent / "jobs" / row["job"] / "records.jsonl").read_text().splitlines()
    return float(json.loads(lines[step - 1])["grad_norm"])


def test_a_curve_answers_with_arm_seed_step_and_value(page, report):
    figure = chart(page, "Gradient norm")
    for name in ("span 1/sqrt(L)", EVIL + " none"):  # all curves lie on one another here: one alone is shown
        page.locator(".names .none").click()
        page.locator(".names button", has_text=name).click()
        lines = answer(page, figure)
        assert lines[0] == name, "a name stays text, whatever it holds"
        seed = lines[1].removeprefix("seed ")
        step = int(lines[2].removeprefix("step "))
        wanted = recorded(report, name, 3 if "mean" in seed else int(seed), step)  # seeds are alike in these files
        assert lines[3] == f"gradient norm {wanted:.5g}"
    assert page.locator(".tip img, .names img").count() == 0


def test_a_click_on_a_name_hides_the_arm_in_every_chart_and_another_shows_it_again(page):
    figures = [chart(page, title) for title in ("Gradient norm", "Loss")]
    others = page.locator(".names button[data-arm]:not([data-arm='0'])")
    for i in range(others.count()):
        others.nth(i).click()
    before = [picture(figure) for figure in figures]
    name = page.locator(".names button[data-arm='0']")
    name.click()
    assert name.get_attribute("aria-pressed") == "false"
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    hidden = [picture(figure) for figure in figures]
    with pytest.raises(AssertionError, match="no curve answered"):
        answer(page, figures[0])
    name.click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    after = [picture(figure) for figure in figures]
    assert all(a != b for a, b in zip(before, hidden, strict=True)) and before == after


def test_charts_over_steps_zoom_together_and_go_back(page):
    loss, norm = (chart(page, title) for title in ("Loss", "Gradient norm"))
    layers = chart(page, "Gradient by layer")
    whole, by_layer = window(loss), window(layers)
    assert window(norm) == whole
    loss.scroll_into_view_if_needed()
    if page.viewport_size["width"] < 500:  # a finger scrolls the page until the tool is chosen
        loss.locator(".bk-tool-icon-box-zoom").click()
    box = loss.locator(".plot").bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.7 * box["height"], steps=8)
    page.mouse.up()
    page.wait_for_timeout(300)
    start, end = window(loss)
    assert whole[0] + 10 < start < end < whole[1] - 5
    assert window(norm) == (start, end) and window(layers) == by_layer
    loss.locator(".bk-tool-icon-reset").click()
    page.wait_for_timeout(300)
    assert window(loss) == window(norm) == whole


def test_axes_switch_between_linear_and_log(page, report):
    loss, norm = (chart(page, title) for title in ("Loss", "Gradient norm"))
    kinds = "host => [host.chart.figure.x_scale.type, host.chart.figure.y_scale.type]"
    assert norm.locator(".live").evaluate(kinds) == ["LinearScale", "LogScale"]
    norm.locator("input.log-y").uncheck()
    loss.locator("input.log-x").check()
    page.wait_for_timeout(1500)
    assert norm.locator(".live").evaluate(kinds) == ["LogScale", "LinearScale"]
    assert loss.locator(".live").evaluate(kinds) == ["LogScale", "LinearScale"]
    assert norm.locator("input.log-x").is_checked(), "the axis is common, and so is its switch"
    page.locator(".names .none").click()
    page.locator(".names button", has_text="pre").click()
    lines = answer(page, norm, 0.6)
    step = int(lines[2].removeprefix("step "))
    assert lines[3] == f"gradient norm {recorded(report, lines[0], 0, step):.5g}"


def test_nothing_is_wider_than_the_window_and_every_name_is_whole(page):
    chart(page, "Loss")
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    names = page.locator(".names button[data-arm]")
    assert names.count() == 4
    for i in range(names.count()):
        box = names.nth(i).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert names.nth(i).evaluate("name => name.scrollWidth <= name.clientWidth")


def test_on_paper_the_still_figures_stand(page):
    figure = chart(page, "Loss")
    assert figure.locator(".live").is_visible() and not figure.locator(".card").is_visible()
    page.emulate_media(media="print")
    assert figure.locator(".card svg").is_visible()
    assert not any(part.is_visible() for part in page.locator(".live, .names, .hint").all())
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_five_hundred_runs_stay_fluid(tmp_path):
    arms = [arm(f"p{i}", seed=seed, val_loss=1.8 + i / 100 + seed / 1e4) for i in range(48) for seed in range(10)]
    with opened(draw_report(comparison(tmp_path, arms)), WIDTHS[0]) as page:
        figure = chart(page, "Loss")
        lines = figure.locator(".live").evaluate("host => host.chart.spec.lines.length")
        assert lines == 48 * 11
        devtools = page.context.new_cdp_session(page)
        devtools.send("Performance.enable", {"timeDomain": "threadTicks"})  # processor time: others may be at work

        def milliseconds(script: str) -> float:
            before = spent(devtools)
            figure.locator(".live").evaluate(script)
            return 1000 * (spent(devtools) - before)

        page.wait_for_timeout(3000)
        redraw = milliseconds("""async ({ chart: { figure } }) => {
            for (let i = 1; i <= 20; i++) {
                figure.x_range.setv({ start: i, end: 60 });
                await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
            }}""")  # fmt: skip
        reply = milliseconds("""({ chart }) => {
            for (let i = 0; i < 20; i++) chart.answer({ x: 5 + i, y: 3, sx: 200, sy: 100 });
            }""")  # fmt: skip
        print(f"redraw {redraw / 20:.0f} ms, answer {reply / 20:.1f} ms")
        assert redraw / 20 < 100 and reply / 20 < 20


def spent(devtools: Any) -> float:
    """Seconds of processor time of the page's main thread."""
    return next(m["value"] for m in devtools.send("Performance.getMetrics")["metrics"] if m["name"] == "TaskDuration")
