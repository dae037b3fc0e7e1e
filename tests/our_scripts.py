"""What a page may hold as scripts: Bokeh's own files, ours, and numbers. All else is a stranger's."""

from __future__ import annotations

import base64
import gzip
import json
import re
from functools import cache
from importlib.metadata import files
from pathlib import Path
from typing import Any

import spannorm

_SCRIPT = re.compile(r"<script([^>]*)>(.*?)</script>", re.DOTALL)
_FOLDER = Path(spannorm.__file__).parent / "lab"
WORDS = re.compile(
    r"step( \d+)?|layer|block|last probe|training loss|final validation loss|gradient norm|RMS of ∂loss/∂x|RMS of x"
    r"|#[0-9a-f]{6}"
)
"""The only texts among a report's numbers."""


def unpacked(text: str) -> str:
    return gzip.decompress(base64.b64decode(text.strip(), validate=True)).decode()


@cache
def bokeh() -> str:
    """Bokeh's two files as its wheel lists them."""
    paths = {Path(str(p)).name: p.locate() for p in files("bokeh") or () if "static/js/" in str(p)}
    return "\n".join(Path(str(paths[name])).read_text() for name in ("bokeh.min.js", "bokeh-api.min.js"))


def texts(value: Any) -> list[str]:
    """Every text in nested JSON, keys aside."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for item in inner for text in texts(item)]


def without_our_scripts(
    page: str, own: tuple[str, ...] = ("charts/live.js", "report/report.js"), words: re.Pattern[str] = WORDS
) -> str:
    """The page with its scripts taken out, each of which must be one that we put there."""
    ours = "\n".join((_FOLDER / name).read_text() for name in own).strip()

    def checked(found: re.Match[str]) -> str:
        attributes, content = found.groups()
        if attributes == ' type="text/plain" class="numbers"':
            assert all(words.fullmatch(text) for text in texts(json.loads(unpacked(content))))
        elif attributes == ' type="text/plain" id="library"':
            assert unpacked(content) == bokeh()
        else:
            assert attributes == "" and content.strip() == ours, found[0][:200]
        return ""

    return _SCRIPT.sub(checked, page)


def numbers_of(page: str) -> list[dict[str, Any]]:
    """The numbers behind each chart of a page."""
    found = re.findall(r'<script type="text/plain" class="numbers">(.*?)</script>', page, re.DOTALL)
    return [json.loads(unpacked(text)) for text in found]
