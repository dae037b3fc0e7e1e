"""The one error for bad input, with a message that says how to correct it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """The user's input cannot work. The message names the rule, what was given and what to do.

    The command line prints only the message and exits with 2. A library caller may catch it as a `ValueError`.
    """


class DiskError(InputError):
    """The disk refused a write."""


class Stopped(Exception):
    """The work stopped on request (Ctrl-C, SIGTERM) and has saved its state. Run it again to continue.

    The command line exits with `exit_code`: 130 after Ctrl-C, 75 (EX_TEMPFAIL: try again) after a scheduler's signal.
    """

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(BaseException):
    """A signal ended the work when there was nothing to save. `except Exception` does not catch it."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped; what was complete is kept")
        self.exit_code = exit_code


def unknown(what: str, given: object, known: Iterable[object]) -> InputError:
    """The error for an unknown name. The message has the nearest known name, and all known names."""
    names = [str(name) for name in known]
    near = get_close_matches(shorter(str(given)) if isinstance(given, str) else "", names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {what} {shown(given)}: {hint}Known: {', '.join(names)}.")


def one_of(what: str, given: object, known: Iterable[str]) -> str:
    """The name, if it is known; otherwise raises the error of `unknown`."""
    names = list(known)
    if not isinstance(given, str) or given not in names:
        raise unknown(what, given, names)
    return given


def shown(value: object) -> str:
    """A value as text for a message: on one line, and cut if it is long."""
    try:
        return shorter(repr(value))
    except (ValueError, RecursionError):  # Python writes no integer of more than 4,300 digits
        return f"a very large {type(value).__name__}"


def shorter(text: str, most: int = 80) -> str:
    """A text, or the beginning of a text that is too long for a message."""
    return text if len(text) <= most else f"{text[:most]}…"
