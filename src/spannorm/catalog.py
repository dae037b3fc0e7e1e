"""Descriptions of the placements, read from their docstrings. The command line and the docs both use them.

`catalog.json` beside this file holds the same entries, so that listing them needs no PyTorch. `make docs` writes it.
A test compares it with the docstrings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from inspect import getdoc
from pathlib import Path

from rich.table import Table
from rich.text import Text

from spannorm.console import wide_console

FIELDS = ("Equation", "Ends", "Init", "Source", "Our reading")
WRITTEN = Path(__file__).with_name("catalog.json")


@dataclass(frozen=True)
class Entry:
    """A placement in words."""

    name: str
    class_name: str
    summary: str
    diagram: str
    fields: dict[str, str]
    """`Equation`, `Ends`, `Init`, `Source`, `Our reading`, as far as the docstring has them."""
    depth_rule: str
    """The default, resolved."""
    base_init: str
    """Recommended."""
    options: tuple[str, ...]


def catalog() -> list[Entry]:
    """Every registered placement, those of the user's own files too, in the registry's order."""
    from spannorm.placements import PLACEMENTS  # PyTorch

    return [entry(name) for name in PLACEMENTS]


def written() -> list[Entry]:
    """This package's own placements, read from `catalog.json`."""
    entries = json.loads(WRITTEN.read_text(encoding="utf-8"))
    return [Entry(**{**raw, "options": tuple(raw["options"])}) for raw in entries]


def write() -> None:
    """Write `catalog.json` from the docstrings."""
    from spannorm.files import write_json

    write_json(WRITTEN, [asdict(e) for e in catalog()])


def entry(name: str) -> Entry:
    """One placement. Raises `InputError` for an unknown name."""
    from spannorm.placements import Stack, placement_options

    kind = Stack(name, 1).kind
    doc = (getdoc(kind) or "").partition("\nArgs:")[0]
    parts = re.split(rf"^({'|'.join(FIELDS)}): ", doc, flags=re.MULTILINE)
    head, fields = parts[0], dict(zip(parts[1::2], parts[2::2], strict=True))
    summary, _, diagram = head.partition("\n\n")
    return Entry(
        name=name,
        class_name=kind.__name__,
        summary=" ".join(summary.split()),
        diagram="\n".join(line.removeprefix("    ") for line in diagram.rstrip().splitlines()),
        fields={key: " ".join(text.split()) for key, text in fields.items()},
        depth_rule=kind.default_depth_rule,
        base_init=kind.recommended_base_init,
        options=tuple(placement_options(name)),
    )


def as_text(e: Entry) -> str:
    """One placement for the terminal: summary, data flow, equation, ends, init, source."""
    lines = [f"{e.name} ({e.class_name})", e.summary, "", e.diagram, ""]
    lines += [f"{key}: {text.replace('`', '')}" for key, text in e.fields.items()]
    lines += [f"Default depth rule: {e.depth_rule}. Recommended base init: {e.base_init}."]
    lines += [f"Options: {', '.join(e.options)}."] if e.options else []
    return "\n".join(lines)


def print_entries(entries: Sequence[Entry]) -> None:
    """Print placements as a table: equation, then ends, init, source and our reading."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    table.add_column("name", no_wrap=True, style="bold")
    table.add_column("equation, ends, init, source, our reading", ratio=1)
    table.add_column("default rule", no_wrap=True)
    table.add_column("base init", no_wrap=True)
    for e in entries:
        words = {key: text.replace("`", "") for key, text in e.fields.items()}
        cell = Text(words.pop("Equation", ""))
        for key, text in words.items():
            cell.append(f"\n{key}: {text}", style="dim")
        table.add_row(e.name, cell, e.depth_rule, e.base_init)
    wide_console().print(table)


def markdown() -> str:
    """The docs page of all placements."""
    entries = catalog()
    lines = [
        "# Placements",
        "",
        "This page is for looking up a placement: its equation, its init, its source, and what in it is our own "
        "reading. `make docs` generates it from the docstrings in `src/spannorm/placements/`. `spannorm placements` "
        "prints the list, `spannorm placements NAME` one entry.",
        "",
        "`N` is a norm with a learned gain, `A` attention, `F` the feed-forward. `x` is the block's input, `h` is what "
        "stands between the sublayers, and `x'` is the block's output. `L` is the number of blocks, and `b` is the "
        "block's index from 0. `c` is the factor of a `:forward` [depth rule](depth_rules.md), or its learned gain; "
        "without such a rule it is 1.",
        "",
        "Any depth rule runs with any placement, except `:gain`: it needs a norm on both branches' outputs. If the "
        "method's authors advise against a pair, the pair gives a warning, with the reason and the source.",
        "",
        "| name | equation | default depth rule | recommended base init |",
        "|---|---|---|---|",
    ]
    for e in entries:
        equation = e.fields["Equation"].rstrip(".").replace("|", "\\|")
        lines.append(f"| [`{e.name}`](#{e.name}) | {equation} | `{e.depth_rule}` | `{e.base_init}` |")
    for e in entries:
        lines += ["", f"## {e.name}", "", e.summary, "", "```", e.diagram, "```", ""]
        lines += [f"- **{key}.** {text}" for key, text in e.fields.items()]
        lines += [f"- **Options.** {', '.join(f'`{o}`' for o in e.options)}"] if e.options else []
    return "\n".join(lines) + "\n"
