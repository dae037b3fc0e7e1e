"""Bokeh's JavaScript, and our own, packed so that a page needs nothing beside it.

The library comes in Bokeh's wheel; Bokeh's Python is not imported. In the page it is compressed, which makes it a
third as long, and the browser unpacks it when the first figure comes into view.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SCRIPTS = ("bokeh.min.js", "bokeh-api.min.js")
"""The two of Bokeh's files that line charts need."""
INSTALL = "pip install 'spannorm[report]'"


@cache
def library() -> str | None:
    """Bokeh's JavaScript as gzip in base64; None where Bokeh is not installed."""
    spec = find_spec("bokeh")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "server" / "static" / "js"
    try:
        return packed("\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS))
    except FileNotFoundError:
        return None


def own_scripts(*names: str) -> str:
    """Our own JavaScript files of the lab, one after the other."""
    return "\n".join((files("spannorm.lab") / name).read_text(encoding="utf-8") for name in names)


def packed(text: str) -> str:
    """A text as gzip in base64. The same text gives the same letters."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def packed_json(value: Any) -> str:
    """Numbers and words for the page's scripts; nobody's text can end the element that holds them."""
    return packed(json.dumps(value, separators=(",", ":"), allow_nan=False))


def rounded(values: Iterable[float], digits: int = 5) -> list[float | None]:
    """Values with so many significant digits; what is not finite becomes None."""
    return [float(f"{v:.{digits}g}") if abs(v) < float("inf") else None for v in map(float, values)]
