"""The corpus `packages`: the source text of pinned packages, the same for everyone and large enough for a long run.

`packages.yaml` is the lock: each package's wheel by name, version and hash, its licence, and its split. pip downloads
the wheels from the package index once. Nothing in them is ever installed or run.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from spannorm.console import PlainConsole, say
from spannorm.errors import InputError

LOCK = Path(__file__).with_name("packages.yaml")
SPLITS = ("train", "validation", "test")
"""Also the order in which packages are read. So a file that is also in a training package is training text."""
DIGITS = 0.2
"""A file with at least this share of digits is a table of numbers, and is left out."""

_LEFT_OUT = re.compile(
    # tests, as in `stdlib`, and copies of other people's packages
    r"(^|/)(tests?|testing|_vendor|vendored|third_party)/|(^|/)(test_[^/]*|[^/]*_tests?|conftest)\.py$"
)


@dataclass(frozen=True)
class Package:
    """A line of the lock."""

    name: str
    version: str
    wheel: str
    """Its file name: a pure-Python wheel, so that every system gets the same one."""
    sha256: str
    """Of the wheel."""
    licence: str
    """SPDX, as the wheel's metadata states it."""
    split: str
    about: str
    bytes: int
    """Of its text, as UTF-8."""


@dataclass(frozen=True)
class Lock:
    """The packages in the order in which they are read, and the hash of their content."""

    packages: tuple[Package, ...]
    corpus_sha256: str
    """`TokenData.corpus_sha256` of data made from them, for any tokenizer."""


def read_lock(path: Path = LOCK) -> Lock:
    """The packages of the lock file, those of the training split first."""
    raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    packages = [Package(**line) for line in raw["packages"]]
    return Lock(tuple(sorted(packages, key=lambda p: SPLITS.index(p.split))), raw["corpus_sha256"])


def documents(lock: Lock | None = None, folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (split, text) of every source file of the lock's packages, package by package, in the order of their paths.

    A wheel that is missing in the folder, or differs from the lock, is downloaded before anything is read. Left out are
    tests, vendored copies, tables of numbers (`DIGITS`), and files that are not UTF-8. Line ends become a newline.

    Args:
        lock: None means this package's lock.
        folder: the folder of the wheels; None means `cache_folder()`.

    Raises:
        InputError: a wheel is not available; the message says which, why, and what to do.
    """
    lock, folder = lock or read_lock(), folder or cache_folder()
    fetch(lock.packages, folder)
    for package in lock.packages:
        for text in texts(folder / package.wheel):
            yield package.split, text


def texts(wheel: Path) -> Iterator[str]:
    """The source files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".py") or _LEFT_OUT.search(name):
                continue
            content = archive.read(name)
            if sum(map(content.count, b"0123456789")) > DIGITS * len(content):
                continue
            try:
                yield io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
            except UnicodeDecodeError:
                continue


def cache_folder() -> Path:
    """The folder of the wheels: `spannorm/wheels` in the user's cache, which is `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spannorm" / "wheels"


def fetch(packages: Sequence[Package], folder: Path) -> None:
    """Make sure that the wheel of every package is in the folder, complete and as in the lock.

    Raises:
        InputError: as `documents` does.
    """
    wanted = [package for package in packages if not _is_there(package, folder)]
    if not wanted:
        return
    say(PlainConsole(stderr=True), f"fetching {len(wanted)} packages for data.corpus packages into {folder}, once")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".fetching-") as partial:
            reason = _download(wanted, Path(partial))
            for package in wanted:
                if _is_there(package, Path(partial)):
                    os.replace(Path(partial, package.wheel), folder / package.wheel)
    except OSError as error:
        raise InputError(
            f"cannot keep the wheels of data.corpus packages in {folder} ({error.strerror or error}): make room there, "
            "or set XDG_CACHE_HOME to a folder that can be written."
        ) from None
    missing = [package for package in wanted if not _is_there(package, folder)]
    if missing:
        names = ", ".join(package.wheel for package in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(
            f"data.corpus packages needs {names}{more}, and pip cannot fetch them: {reason}. Run the same command "
            "where pip reaches a package index that has these very files (only the first time needs one), or copy "
            f"the wheels named in {LOCK.name} to {folder}; else choose data.corpus stdlib or a folder of your own."
        )


def _is_there(package: Package, folder: Path) -> bool:
    path = folder / package.wheel
    return path.is_file() and sha256(path.read_bytes()).hexdigest() == package.sha256


def _download(packages: Sequence[Package], folder: Path) -> str:
    """Let pip download the wheels, with the user's own settings of pip. Returns pip's error text."""
    requirements = folder / "requirements.txt"
    lines = [f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n" for package in packages]
    requirements.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--require-hashes"]
    command += ["--retries", "2", "--dest", str(folder), "--requirement", str(requirements)]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    said = ran.stderr.strip().splitlines()
    if any("DO NOT MATCH THE HASHES" in line for line in said):
        named = next((line.split()[0] for line in said if re.match(r"\s+\S+==\S+ from ", line)), "one of them")
        return f"the index has another file for {named} than the lock names"
    if any("connection" in line.lower() or "Network" in line for line in said if line.startswith("WARNING: Retrying")):
        return "there is no connection to the package index"
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")] or said[-1:]
    return errors[0].partition(" (from versions")[0].rstrip(".") if errors else f"pip ended with {ran.returncode}"


def markdown(lock: Lock) -> str:
    """The page of the corpus, from the lock alone."""
    rows = [
        f"| {p.name} | {p.version} | {p.about} | {p.licence} | {p.split} | {p.bytes / 1e6:.1f} |" for p in lock.packages
    ]
    held = {split: sum(p.bytes for p in lock.packages if p.split == split) / 1e6 for split in SPLITS}
    total = ", ".join(f"{split} {held[split]:.1f}" for split in SPLITS)
    return f"""# The corpus `packages`

This page is for looking up what the corpus `packages` holds, and under which licences. [training.md](training.md) explains how it becomes tokens. `python -m spannorm.train.packages > docs/corpus.md` makes the page from the lock, `src/spannorm/train/packages.yaml`, which has each wheel's file name and SHA-256.

The corpus is well-known packages of hand-written Python under permissive licences, each as a pure-Python wheel. Text: {sum(held.values()):.1f} MB ({total}). Text that several packages share word for word is counted here and used once. Hash of the distinct documents (`corpus_sha256`): `{lock.corpus_sha256}`. The licences are those that the wheels' metadata states; a single file may have its own.

| package | version | | licence | split | MB |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""  # noqa: E501


if __name__ == "__main__":
    print(markdown(read_lock()), end="")
