"""`figures/` beside a report: every figure as PNG, SVG and CSV, and its SVG as a part of the page."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from spannorm.errors import InputError
from spannorm.files import write_bytes, write_text
from spannorm.folders import own_folder
from spannorm.lab.report.figures.panels import Drawing
from spannorm.lab.report.sheets import HEADER, sheet
from spannorm.text import file_name

Figures = list[tuple[Drawing, str]]
"""Figures, each with its SVG as it goes into the page."""


class FigureFolder:
    """`figures/`, into which figures go as PNG, SVG and CSV under names of their own."""

    def __init__(self, path: Path) -> None:
        self.path = own_folder(path)
        self.names: set[str] = set()

    def save(self, drawings: Sequence[Drawing], title: str) -> Figures:
        """Write the figures of one table and condition, whose title their names begin with."""
        stem = file_name(title)
        named = [replace(d, name=self._free(f"{stem}_{d.name}" if stem else d.name)) for d in drawings]
        return [(drawing, self._save(drawing)) for drawing in named]

    def _free(self, wanted: str) -> str:
        name, number = file_name(wanted, 150), 1
        while name.lower() in self.names:
            number += 1
            name = f"{file_name(wanted, 150)}-{number}"
        self.names.add(name.lower())
        return name

    def _save(self, drawing: Drawing) -> str:
        png, raw = io.BytesIO(), io.BytesIO()
        drawing.figure.savefig(png, format="png", dpi=180)
        drawing.figure.savefig(raw, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        # A hundredth of a point cannot be seen, and six decimals are half of the file.
        svg = _in_tags(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), raw.getvalue().decode())
        files = [self.path / f"{drawing.name}.{kind}" for kind in ("csv", "png", "svg")]
        if any(map(os.path.lexists, files)) and not begins(files[0], ",".join(HEADER)):
            raise InputError(f"{files[0].with_suffix('')}.* was not drawn by this command: move it to another place.")
        write_text(files[0], sheet(drawing.figure))  # first: by it the other two are known as ours
        write_bytes(files[1], png.getvalue())
        write_bytes(files[2], svg.encode())
        return _inlined(svg, drawing.name)


def begins(path: Path, words: str, within: int = 0) -> bool:
    """Whether a file is one of ours: it begins with the words, or holds them within so many bytes."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(max(len(words.encode()), within)).decode(errors="replace")
    return words in head if within else head == words


def _in_tags(pattern: str, new: str | Callable[[re.Match[str]], str], svg: str, count: int = 0) -> str:
    """`re.sub` inside the tags alone: what stands between them is a stranger's text."""
    left = [count]

    def tag(match: re.Match[str]) -> str:
        if count and not left[0]:
            return match[0]
        text, done = re.subn(pattern, new, match[0], count=left[0])
        left[0] -= done if count else 0
        return text

    return re.sub(r"<[^>]*>", tag, svg)


def _inlined(svg: str, name: str) -> str:
    """An SVG file as a part of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = _in_tags(r' (xmlns(:xlink)?|width|height)="[^"]*"', "", svg, count=4)
    # Several figures share a page: what one calls `clip1` must not be another's. Most ids name nothing used.
    used = {n for tag in re.findall(r"<[^>]*>", svg) for n in re.findall(r'(?:url\(#|href="#)([^")]+)', tag)}
    svg = _in_tags(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = _in_tags(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-labelledby="title-{name}"', 1)
