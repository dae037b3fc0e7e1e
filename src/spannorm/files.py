"""Writing files that are never half-written, and reading files that a user may have edited.

A disk error or an edited file becomes an error with one clear sentence.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from spannorm.errors import DiskError, InputError
from spannorm.values import finite

_TROUBLE = {
    errno.ENOSPC: "there is no space left on the disk",
    errno.EFBIG: "a file would pass the largest size allowed",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.ENOTDIR: "a part of that path is a file",
    errno.EEXIST: "a file of that name is in the way",
    errno.EISDIR: "a folder of that name is in the way",
    errno.ENAMETOOLONG: "a name is longer than the file system takes",
    errno.ELOOP: "a symbolic link is in the way, or leads back to itself",
}
LARGEST = 1 << 28
"""Largest file that is read as a whole, and longest line, in bytes (256 MiB). This package writes none longer."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Within the block, a disk error becomes an `InputError` that names the folder and what to do."""
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
    # the errors of torch.save and safetensors have the text at best, and not the errno
    if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
        for number, reason in _TROUBLE.items():
            if os.strerror(number) in str(error):
                return reason
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        if shutil.disk_usage(existing).free < 2**20:
            return _TROUBLE[errno.ENOSPC]
    return None


def make_folder(folder: Path) -> None:
    """Create a folder and check that files can be written in it, before any work starts."""
    with writing_to(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise InputError(f"cannot make the folder {folder} ({error.strerror}): choose another --out.") from None
        except ValueError as error:  # a name with a null byte
            raise InputError(f"cannot make the folder {str(folder)!r} ({error}): choose another --out.") from None
        trial = folder / f".writable-{os.getpid()}"
        trial.write_bytes(b"x")
        trial.unlink()


def check_writable(path: Path) -> Path:
    """Check that a file can be written later. If not, the `InputError` comes now, before any work starts."""
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise InputError(f"{path} is no file that can be written: give the name of a file.")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for {path.name}: make it first, or give another.")
    trial = _new(path)
    try:
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {_TROUBLE.get(error.errno or 0, error.strerror)}.") from None
    return path


def _new(path: Path) -> Path:
    """The temporary file beside `path`. When it is complete, it is renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.new")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content in one step: readers see the old or the new content, never a part."""
    new = _new(path)
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text, as UTF-8. Half a surrogate pair, which UTF-8 cannot hold, becomes an escape."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` for JSON. NaN and infinities become null."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def append_json(path: Path, value: Any) -> None:
    """Append one line to a JSONL file. A symbolic link in its place is not followed."""
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "a") as file:
        file.write(_line(value))


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """`write_text` for JSONL."""
    write_text(path, "".join(map(_line, values)))


def _line(value: Any) -> str:
    return json.dumps(finite(value), allow_nan=False) + "\n"


def read_text(path: Path, most: int = LARGEST) -> str:
    """A whole text file, UTF-8 with or without a byte-order mark.

    Raises:
        InputError: it is missing, not a regular file (a pipe or a device may never end), too long, or not UTF-8.
    """
    with _regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise InputError(f"{path} holds {size:,} bytes, and at most {most:,} are read.")
        return file.read(most + 1).decode("utf-8-sig")


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file to be read as UTF-8. What goes wrong within the block becomes an `InputError`."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"{path} is not a regular file: give a file that can be read to its end.")
            yield file
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): it was changed by hand."
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None


def read_json(path: Path, shape: object = object) -> Any:
    """A JSON file's value, or an `InputError` that names the file and what is wrong in it (`checked`)."""
    return checked(_parsed(read_text(path), str(path)), shape, str(path))


def read_jsonl(path: Path, shape: object = dict) -> list[dict[str, Any]]:
    """All of `jsonl`."""
    return list(jsonl(path, shape))


def jsonl(path: Path, shape: object = dict) -> Iterator[dict[str, Any]]:
    """The complete lines of a JSONL file, one after the other: it may be longer than `LARGEST`.

    An incomplete last line is left out; a missing file is empty.

    Raises:
        InputError: a line that is not JSON, or not of the shape (`checked`), or longer than `LARGEST`.
    """
    if not path.exists() and not path.is_symlink():
        return
    for n, line in enumerate(_lines(path), start=1):
        if line:
            yield checked(_parsed(line, f"{path}:{n}"), shape, f"{path}:{n}")


def _lines(path: Path) -> Iterator[str]:
    with _regular(path) as file:
        while (line := file.readline(LARGEST + 1)).endswith(b"\n"):
            yield line[:-1].decode("utf-8-sig")
        if len(line) > LARGEST:
            raise InputError(f"{path} has a line of more than {LARGEST:,} bytes: it was changed by hand.")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not readable as JSON ({error}): it was cut or changed by hand.") from None


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object",
          list: "a list", None: "null"}  # fmt: skip


def checked(value: Any, shape: object, where: str) -> Any:
    """The value, if it has the shape.

    Args:
        shape: a type (`object` is anything, `float` any number, and `bool` is no number); a tuple of shapes, of which
            one must fit; `[shape]`, a list of such items; `{"key": shape}`, an object with at least these keys, where a
            key that ends in `?` may be missing or null; `{str: shape}`, an object with any keys.
        where: the file and the place in it, for the error.

    Raises:
        InputError: names the place, what must be there and what is there.
    """
    wrong = _differs(value, shape, "")
    if wrong is None:
        return value
    at, needed, given = wrong
    shown = repr(given)
    raise InputError(
        f"{where}{': `' + at.lstrip('.') + '`' if at else ''} must be {needed}, and is "
        f"{shown if len(shown) < 80 else shown[:77] + '…'}: the file was changed by hand."
    )


def _differs(value: Any, shape: Any, at: str) -> tuple[str, str, Any] | None:
    """Where the value first differs from the shape: the place, what must be there, and what is there."""
    if shape is object:
        return None
    if isinstance(shape, tuple):
        found = [_differs(value, one, at) for one in shape]
        deeper = next((wrong for wrong in found if wrong is not None and wrong[0] != at), None)
        needed = " or ".join(dict.fromkeys(wrong[1] for wrong in found if wrong is not None))
        return None if None in found else deeper or (at, needed, value)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return at, "a list", value
        return next(filter(None, (_differs(v, shape[0], f"{at}[{i}]") for i, v in enumerate(value))), None)
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return at, "an object", value
        for key, inner in shape.items():
            keys = list(value) if key is str else [key.removesuffix("?")]
            for name in keys:
                if name not in value and not key.endswith("?"):
                    return f"{at}.{name}", "there", "missing"
                optional = key is not str and key.endswith("?") and value.get(name) is None
                if not optional and (wrong := _differs(value[name], inner, f"{at}.{name}")):
                    return wrong
        return None
    if shape is None:
        return None if value is None else (at, "null", value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = number and (shape is float or isinstance(value, int)) if shape in (int, float) else isinstance(value, shape)
    return None if fits else (at, _KINDS[shape], value)


@contextmanager
def alone_in(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Within the block no other process works in this folder. The lock ends with the process, even a killed one.

    Args:
        wait: seconds to wait for another process to leave.

    Raises:
        InputError: another process works there, or the lock's name is taken by a folder or a link.
    """
    until, path = time.monotonic() + wait, folder / ".lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP):
            raise
        raise InputError(
            f"{path} is a folder or a link, and the lock must be a file: move it away, or choose another --out folder."
        ) from None
    with open(lock) as file:
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
