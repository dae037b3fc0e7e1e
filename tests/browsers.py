"""A headless Chromium of the system, driven by Playwright, for pages that have to work in a real browser."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 420)

needs_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("bokeh") is None, reason="needs Bokeh: pip install 'spannorm[report]'"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="needs Playwright: pip install 'spannorm[browser]'"
    ),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH, such as apt-get install chromium"),
]


@contextmanager
def opened(file: Path, width: int) -> Iterator[Any]:
    """The page in a window of this width. At the end: no error, no warning, and no request beyond the file."""
    from playwright.sync_api import sync_playwright

    told: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, has_touch=width < 500)
        page.on("console", lambda m: told.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("dialog", lambda dialog: told.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.resolve().as_uri())
        yield page
        browser.close()
    assert told == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [file.resolve().as_uri()]


def chart(page: Any, title: str) -> Any:
    """A report's figure by its title, scrolled to and drawn."""
    figure = page.locator(f"h2:text-is('{title}') + figure")
    figure.scroll_into_view_if_needed()
    figure.locator(".live[data-drawn] canvas").first.wait_for(timeout=60_000)
    return figure


def window(figure: Any) -> tuple[float, float]:
    """What a chart shows of its horizontal axis, read from its own range."""
    range_ = figure.locator(".live").evaluate("({ chart }) => [chart.figure.x_range.start, chart.figure.x_range.end]")
    return float(range_[0]), float(range_[1])


def picture(figure: Any) -> list[str]:
    """What a chart's canvases show."""
    return [canvas.evaluate("canvas => canvas.toDataURL()") for canvas in figure.locator(".plot canvas").all()]


def answer(page: Any, figure: Any, across: float = 0.5) -> list[str]:
    """The lines that answer to the pointer, which goes down the chart at a share of its width until they do."""
    figure.locator(".live .plot").evaluate("plot => plot.scrollIntoView({ block: 'center' })")
    box = figure.locator(".live .plot").bounding_box()
    tip = figure.locator(".tip")
    for down in range(int(box["height"] * 0.15), int(box["height"] * 0.8), 8):
        page.mouse.move(box["x"] + across * box["width"], box["y"] + down)
        page.wait_for_timeout(60)
        if tip.is_visible():
            return str(tip.inner_text()).splitlines()
    raise AssertionError("no curve answered")
