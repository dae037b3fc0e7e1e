"""The terminal. Text is shown as it is. A table that does not fit loses columns of numbers before words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spannorm.text import plain

_NOTE = 24
"""Columns that a note needs at least."""


class PlainConsole(Console):
    """A console that prints `[bold]` and `:smile:` as text, and control characters as escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)


def wide_console() -> Console:
    """The terminal's console. If output goes to a file, it is wide enough for the tables."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=140)


def say(console: Console, text: str) -> None:
    """Print a text as it is. The terminal breaks its lines."""
    console.print(Text(plain(text)), soft_wrap=True)


class Grid:
    """A table. Some of its columns are left out if the terminal is narrow.

    Args:
        title: above the table.
    """

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.columns: list[tuple[str, str, int | None]] = []
        self.rows: list[tuple[Sequence[Any], str]] = []

    def column(self, heading: str, kind: str = "text", width: int | None = None) -> None:
        """Add a column.

        Args:
            kind: `text`; `number`, aligned right; `spare`, a number that is left out if there is no room (the last
                spare column first); `note`, which breaks into lines.
            width: the width of cells that are no text.
        """
        self.columns.append((heading, kind, width))

    def row(self, *cells: Any, style: str = "") -> None:
        self.rows.append((cells, style))

    def fitted(self, console: Console) -> Table | Text:
        """The table at the console's width. If there is no room, it has no spare columns; if there is still no room, it
        becomes a list with a line per row. Needed values are never cut off."""
        kept = list(range(len(self.columns)))
        while self._width(kept) > console.width:
            spare = [i for i in kept if self.columns[i][1] == "spare"]
            if not spare:
                return self._lines(kept)
            kept.remove(spare[-1])
        title = Text(plain(self.title), style="bold", overflow="fold") if self.title else None
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for i in kept:
            heading, kind, width = self.columns[i]
            justify: Any = "right" if kind in ("number", "spare") else "left"
            table.add_column(heading, justify=justify, no_wrap=kind != "note", overflow="fold", width=width)
        for cells, style in self.rows:
            shown = [Text(plain(cell)) if isinstance(cell, str) else cell for cell in (cells[i] for i in kept)]
            table.add_row(*shown, style=style)
        return table

    def _width(self, kept: Sequence[int]) -> int:
        wide = 0
        for i in kept:
            heading, kind, width = self.columns[i]
            cells = [heading, *(_words(cells[i]) for cells, _ in self.rows)]
            natural = width or max(map(cell_len, cells))
            wide += min(natural, _NOTE) if kind == "note" else natural
        return wide + 2 * (len(kept) - 1)

    def _lines(self, kept: Sequence[int]) -> Text:
        lines = Text(f"{plain(self.title)}\n" if self.title else "", overflow="fold")
        for cells, style in self.rows:
            named = [(self.columns[i][0], _words(cells[i])) for i in kept]
            lines.append(
                ", ".join(f"{heading} {words}".strip() for heading, words in named if words), style=style or None
            )
            lines.append("\n")
        lines.rstrip()
        return lines


def _words(cell: Any) -> str:
    """A cell as text; a bar has none."""
    return plain(cell) if isinstance(cell, str | Text) else ""
