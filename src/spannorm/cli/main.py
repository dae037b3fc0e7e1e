"""The process around a verb: signals, errors in one line, exit codes."""

from __future__ import annotations

import gc
import io
import os
import re
import shlex
import signal
import sys
import threading
from types import FrameType
from typing import Any

import typer

from spannorm.cli.app import app
from spannorm.errors import DiskError, InputError, Interrupted, Stopped
from spannorm.text import plain


def _stopping_on_signals() -> dict[int, Any]:
    """From here on Ctrl-C and SIGTERM end the work wherever it is, and it cleans up; what was set before."""

    def stop(number: int, frame: FrameType | None) -> None:
        interrupted = Interrupted(130 if number == signal.SIGINT else 75)
        if _importing(frame):
            os.write(2, _said(interrupted).encode())
            os._exit(interrupted.exit_code)
        raise interrupted

    wanted = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    here = threading.current_thread() is threading.main_thread()
    return {number: signal.signal(number, stop) for number in wanted} if here else {}


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being loaded. An exception that passes through a compiled one can abort the process."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _said(stop: Stopped | Interrupted) -> str:
    """The last line of a process that was stopped."""
    return plain(f"{stop}. Go on with: spannorm {shlex.join(sys.argv[1:])}") + "\n" if _is_first() else ""


def _empty(words: list[str]) -> str | None:
    """What stands before an argument without a character in it, or the option itself (`--out=`)."""
    for before, word in zip(["spannorm", *words], words, strict=False):
        if not word.strip() or re.fullmatch(r"--[\w-]+=\s*", word):
            return word if word.strip() else before if before.startswith("--") else f"the argument after {before}"
    return None


def _is_first() -> bool:
    """Whether this process speaks for those that torchrun started; a signal may come before PyTorch is imported."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Run the command line: 0 done, 1 a run failed or crashed, 2 bad input, 130 or 75 stopped and saved (`Stopped`)."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 shows what it cannot with a backslash
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    quick = sys.argv[1:2] == ["theory"]  # most of its time is loading PyTorch
    if quick:
        gc.disable()
    before = _stopping_on_signals()
    try:
        if (empty := _empty(sys.argv[1:])) is not None:  # an empty path would be the current folder
            raise InputError(f"{empty} is empty: give it a value, or leave it out.")
        app()
    except InputError as error:
        if _is_first() or isinstance(error, DiskError):  # all other input is the same for every process
            typer.secho(f"error: {plain(error)}", fg="red", err=True)
        sys.exit(2)
    except (OSError, UnicodeError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        said = getattr(error, "strerror", None) or error
        what = getattr(error, "filename", None)
        typer.secho(f"error: {plain(f'{said}: {what}' if what else said)}", fg="red", err=True)
        sys.exit(2)
    except (Stopped, Interrupted) as stop:
        typer.echo(_said(stop), nl=False, err=True)
        sys.exit(stop.exit_code)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if quick and "triton" not in sys.modules:  # whose bindings count what is left at the end, and complain
            gc.freeze()  # else the end of the process looks through everything once more: a third of a second
        if quick:
            gc.enable()
