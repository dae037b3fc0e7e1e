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


def unknown(what: str, given: object, known: Iterable[str]) -> InputError:
    """The error for a name that is not known: names the nearest known one, and all of them."""
    names = list(known)
    near = get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {what} {given!r}: {hint}Known: {', '.join(names)}.")
