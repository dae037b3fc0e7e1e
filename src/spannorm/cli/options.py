"""Options that several verbs take, and how what is given is read."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from spannorm.errors import InputError, shown
from spannorm.values import Limits, checked


def writable(path: Path | None) -> Path | None:
    """A file to be written after the work, tried before it."""
    from spannorm.files import check_writable

    return None if path is None else check_writable(path)


def image(path: Path | None) -> Path | None:
    """`writable`, for a picture."""
    if path is not None and path.suffix not in (".png", ".svg"):
        raise InputError(f"--plot draws .png or .svg; got {path}.")
    return writable(path)


def complete_placements(incomplete: str) -> list[str]:
    """Completions of a placement's name, or of the last one of several between commas."""
    from spannorm.catalog import written

    return _completed(incomplete, [entry.name for entry in written()])


def complete_rules(incomplete: str) -> list[str]:
    """Completions of depth rules between commas."""
    from spannorm.scaling import depth_rule_names

    return _completed(incomplete, ["default", *depth_rule_names()])


def _completed(incomplete: str, names: Sequence[str]) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in names if name.startswith(last)]


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe, such as recipes/demo.yaml.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Output folder; default runs/<recipe name>.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key, such as train.learning_rate=1e-3. Repeatable."),
]
Imports = Annotated[
    list[Path] | None,
    typer.Option("--import", metavar="FILE", help="A Python file of yours to run first: it may register placements."),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write what is printed, and more, as JSON too.", callback=writable),
]


def grouped(group: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A verb whose first parameter is a dataclass of options takes each of that class's fields as an option.

    Typer knows no groups of options: it is shown the fields of `group`, then the verb's other parameters.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        fields = signature(group, eval_str=True).parameters
        own = list(signature(verb, eval_str=True).parameters.values())[1:]

        @wraps(verb)
        def expanded(**given: Any) -> None:
            verb(group(**{name: given.pop(name) for name in fields}), **given)

        parameters = [*fields.values(), *own]
        expanded.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        expanded.__annotations__ = {p.name: p.annotation for p in parameters}
        return expanded

    return decorate


def write(json_file: Path | None, value: Any) -> None:
    """Write what a verb found to the file of `--json`, if there is one."""
    from spannorm.files import write_json

    if json_file is not None:
        write_json(json_file, value)


def listed(text: str) -> list[str]:
    """Parts between commas; a comma in brackets belongs to its part, as in `1/sqrt(L):gain(0.283,0.432)`."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers between commas."""
    try:
        found = [int(part) for part in listed(text)]
    except ValueError:
        raise InputError(f"{option} takes whole numbers, comma-separated; got {shown(text)}.") from None
    return [checked(int, number, option, Limits(least=0, most=10**8)) for number in found]


def run_files(paths: Sequence[Path] | None) -> None:
    """Run the user's own files, which register placements."""
    for path in paths or ():
        if not path.is_file():
            raise InputError(f"--import takes a Python file; there is none at {path}.")
        runpy.run_path(str(path))
