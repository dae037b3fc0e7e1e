"""The terminal."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """The terminal's console; where output goes to a file, wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=140)
