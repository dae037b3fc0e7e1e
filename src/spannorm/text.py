"""Untrusted text: a user's names may hold any character, and must be shown as text everywhere."""

from __future__ import annotations

import hashlib
import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Characters with an effect instead of a shape: control characters (without tab and newline), marks that change the
direction of writing, halves of surrogate pairs, and characters that XML forbids."""


def plain(text: object) -> str:
    """The text with an escape for every control character, for a terminal, a page or a figure."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(text))


def line(text: object) -> str:
    """`plain`, on one line."""
    return " ".join(plain(text).split())


def plain_in(value: object) -> object:
    """A value read from JSON, with `plain` applied to every text in it, also to keys."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list):
        return [plain_in(item) for item in value]
    if isinstance(value, dict):
        return {plain(key): plain_in(item) for key, item in value.items()}
    return value


def file_name(text: str, most: int = 100) -> str:
    """A name for a file or an id from any text: letters, digits and `_.+-`, never too long, never hidden.

    If the text was cut, or no character was left, a digest keeps the name unique.
    """
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", text).lstrip(".")
    if (len(name) <= most and name.strip("_") == "" != text.strip("_ ")) or len(name) > most:
        name = f"{name[: most - 9]}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}"
    return name


def csv_cell(text: str) -> str:
    """Text for a CSV cell, because a spreadsheet treats a cell that begins with `=`, `+`, `-` or `@` as a formula."""
    text = line(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
