"""The one error for bad input, and the words that help mend it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something the user gave cannot work. The message names the rule, what was given and what to do.

    The command line prints it alone and exits with 2; a library caller may catch it as a `ValueError`.
    """


class DiskError(InputError):
    """The disk of this process would not take what was to be written."""


class Stopped(Exception):
    """The work was asked to stop (Ctrl-C, SIGTERM), has saved what it did, and goes on when run again.

    The command line exits with `exit_code`: 130 after Ctrl-C, 75 (EX_TEMPFAIL: try again) where a scheduler asked.
    """

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(BaseException):
    """A signal ended the work where there was nothing to save. No `except Exception` on the way stops it."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped; what was complete is kept")
        self.exit_code = exit_code


def unknown(what: str, given: object, known: Iterable[object]) -> InputError:
    """The error for a name that is not known: names the nearest known one, and all of them."""
    names = [str(name) for name in known]
    near = get_close_matches(shorter(str(given)) if isinstance(given, str) else "", names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {what} {shown(given)}: {hint}Known: {', '.join(names)}.")


def one_of(what: str, given: object, known: Iterable[str]) -> str:
    """The name, if it is one of those known; else the error of `unknown`."""
    names = list(known)
    if not isinstance(given, str) or given not in names:
        raise unknown(what, given, names)
    return given


def shown(value: object) -> str:
    """A value as a message can hold it: in one line, and cut where it is long."""
    try:
        return shorter(repr(value))
    except (ValueError, RecursionError):  # Python writes no integer of more than 4,300 digits
        return f"a very large {type(value).__name__}"


def shorter(text: str, most: int = 80) -> str:
    """A text, or the beginning of one that is too long to be read in a message."""
    return text if len(text) <= most else f"{text[:most]}…"
