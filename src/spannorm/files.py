"""Writing files so that nothing is ever half-written, and disk trouble reads as one clear sentence."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spannorm.errors import DiskError, InputError

_TROUBLE = {
    errno.ENOSPC: "there is no space left on the disk",
    errno.EFBIG: "a file would pass the largest size allowed",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.ENOTDIR: "a part of that path is a file",
    errno.EEXIST: "a file of that name is in the way",
}


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns the disk's own errors, inside the block, into an `InputError` that names the folder and the cure."""
    try:
        yield
    except Exception as error:
        reason = _disk_trouble(error, folder)
        if reason is None:
            raise
        raise DiskError(
            f"cannot write to {folder}: {reason}. Free some space or choose another --out folder, then run the same "
            "command again: it goes on from what is complete."
        ) from error


def _disk_trouble(error: Exception, folder: Path) -> str | None:
    if isinstance(error, OSError) and error.errno in _TROUBLE:
        return _TROUBLE[error.errno]
    # torch.save and safetensors pass on the words at best, and not the errno
    if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
        for number, reason in _TROUBLE.items():
            if os.strerror(number) in str(error):
                return reason
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        if shutil.disk_usage(existing).free < 2**20:
            return _TROUBLE[errno.ENOSPC]
    return None


def make_folder(folder: Path) -> None:
    """Create a folder and make sure that files can be written in it, before any time is spent."""
    with writing_to(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise InputError(f"cannot make the folder {folder} ({error.strerror}): choose another --out.") from None
        trial = folder / f".writable-{os.getpid()}"
        trial.write_bytes(b"x")
        trial.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content in one step: readers see the old or the new, never a part."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_text` for JSON: NaN and infinities become null."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file's value, or an `InputError` that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path} is not readable as JSON ({error}): it was cut or changed by hand.") from None


def append_json(path: Path, value: Any) -> None:
    """Append one line to a JSONL file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(_line(value))


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """`write_text` for JSONL."""
    write_text(path, "".join(map(_line, values)))


def _line(value: Any) -> str:
    return json.dumps(finite(value), allow_nan=False) + "\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a last line cut short by a kill is left out, a missing file is empty."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def finite(value: Any) -> Any:
    """The value with every NaN and infinity replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def alone_in(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Within the block no other process works in this folder; the lock goes with the process, even a killed one.

    Args:
        wait: seconds to wait for another process to leave.

    Raises:
        InputError: another process works there.
    """
    until = time.monotonic() + wait
    with open(folder / ".lock", "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise InputError(
                        f"another process is working in {folder}: wait until it ends, or choose another --out folder."
                    ) from None
                time.sleep(0.2)
        yield
