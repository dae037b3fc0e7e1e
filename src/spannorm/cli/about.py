"""`placements` and `doctor`: what there is, and what this machine can do. They start without PyTorch."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from spannorm.cli.options import Imports, JsonFile, complete_placements, run_files, write
from spannorm.errors import one_of


def placements(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="One placement: draws its data flow.", autocompletion=complete_placements
        ),
    ] = None,
    json_file: JsonFile = None,
    imports: Imports = None,
) -> None:
    """List the placements: equation, default depth rule, recommended base init, source."""
    from spannorm.catalog import as_text, catalog, print_entries, written

    run_files(imports)
    entries = catalog() if imports else written()
    if name:
        one_of("placement", name, [e.name for e in entries])
        entries = [e for e in entries if e.name == name]
        typer.echo(as_text(entries[0]))
    else:
        print_entries(entries)
    write(json_file, [asdict(e) for e in entries])


def doctor(json_file: JsonFile = None) -> None:
    """Say which versions, machine and kernels there are, and what is missing. Exits with 1 if spannorm cannot work."""
    from spannorm.doctor import examine, show

    found = examine()
    show(found)
    write(json_file, found.to_dict())
    if not found.ok:
        sys.exit(1)
