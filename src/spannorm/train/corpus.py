"""Where the text comes from: documents from local files, one at a time."""

from __future__ import annotations

import json
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from spannorm.errors import InputError
from spannorm.text import line
from spannorm.train import packages
from spannorm.train.recipe import DataRecipe

TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".xml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"),
    *(".jl", ".r", ".sh", ".sql"),
)
"""Plain text, UTF-8. A file is one document, or holds several that end with `data.document_separator`."""
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")

STDLIB_FOLDERS_LEFT_OUT = ("test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__")
"""Tests, an editor, and packages that do not belong to the standard library."""
STDLIB_FILES_LEFT_OUT = re.compile(
    # 70 code pages generated from mapping tables: the same few lines around another table of 256 rows. The
    # codecs cp932, cp949 and cp950 are not among them.
    r"encodings/(cp(?!932|949|950)\d+|iso8859_\d+|koi8_[rtu]|mac_\w+|hp_roman8|kz1048|palmos|ptcp154|tis_620)\.py"
    # how this Python was built and what its owner runs at start
    r"|config-[^/]*/.*|_sysconfigdata_.*|(site|user)customize\.py"
)

_CHARACTERS = 1 << 24  # read at a time from a text file that holds many documents
_ROWS = 1024  # read at a time from a parquet file


def documents(recipe: DataRecipe) -> Iterator[str]:
    """Yield the documents of `recipe.corpus`, one at a time, in the order of the sorted paths.

    `stdlib` is every `.py` file of the running Python's standard library, except `STDLIB_FOLDERS_LEFT_OUT` and
    `STDLIB_FILES_LEFT_OUT`: 10.0 MB in Python 3.11. `packages` is the source of pinned packages, fetched once
    (`spannorm.train.packages`). Anything else is a local file, or a folder that is searched with all its
    subfolders; there, hidden files and suffixes other than `SUFFIXES` are ignored. JSONL holds one object per
    line. Line ends of text files become a newline, and a byte-order mark is dropped, so that a corpus is the same
    text on every system. A document that is empty, null or blank is dropped.

    Raises `InputError` if the corpus is missing, holds nothing readable, is not UTF-8, or lacks `data.text_field`. The
    error comes when the file is read, so only a complete pass shows that a corpus has no error.
    """
    yield from (text for _, text in placed_documents(recipe))


def placed_documents(recipe: DataRecipe) -> Iterator[tuple[str, str]]:
    """`documents`, each with its split if the corpus decides it, and otherwise an empty text: `prepare_data` decides.

    Raises `InputError` as `documents` does, and if a held-out share of `packages` is given: its lock decides that.
    """
    for split, text in _from_packages(recipe) if recipe.corpus == "packages" else _from_files(recipe):
        if text and not text.isspace():
            yield split, text


def _from_packages(recipe: DataRecipe) -> Iterator[tuple[str, str]]:
    for name in ("validation_fraction", "test_fraction"):
        if getattr(recipe, name) != getattr(DataRecipe, name):
            raise InputError(
                f"data.{name} does not apply to data.corpus packages, which is split by package (docs/corpus.md): "
                "leave it out."
            )
    return packages.documents()


def _from_files(recipe: DataRecipe) -> Iterator[tuple[str, str]]:
    if recipe.document_separator == "":
        raise InputError("data.document_separator must not be empty: give the text that ends a document, or null.")
    for path in _stdlib() if recipe.corpus == "stdlib" else _local(Path(recipe.corpus)):
        read = _READERS.get(path.suffix.lower(), _text)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputError(f"{path} is not a regular file, which alone has an end: take it out of data.corpus.")
            yield from (("", text) for text in read(path, recipe))
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 ({error.reason}): convert it, or take it out.") from None
        except MemoryError:
            raise InputError(f"{path} does not fit into memory: set data.document_separator, or split it.") from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}.") from None


def left_out(recipe: DataRecipe) -> str:
    """The files of a folder that were not read, in words, so that the user knows. Empty if all were read."""
    root = Path(recipe.corpus)
    if recipe.corpus in ("stdlib", "packages") or not root.is_dir():
        return ""
    kinds: Counter[str] = Counter()
    for folder, subfolders, names in os.walk(root):
        kinds["symbolic links to folders"] += sum(os.path.islink(os.path.join(folder, name)) for name in subfolders)
        kinds["hidden folders"] += sum(name[0] == "." for name in subfolders)
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        for name in names:
            suffix = Path(name).suffix.lower()
            if name[0] == ".":
                kinds["hidden files"] += 1
            elif suffix not in SUFFIXES:
                kinds[f"{line(suffix) or 'files without a suffix'}"] += 1
    told = [f"{count:,} {kind}" for kind, count in kinds.most_common() if count]
    return ", ".join(told[:8]) + (f" and {len(told) - 8} kinds more" if len(told) > 8 else "")


def _stdlib() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        path
        for path in _files(root, STDLIB_FOLDERS_LEFT_OUT)
        if path.suffix == ".py" and not STDLIB_FILES_LEFT_OUT.fullmatch(path.relative_to(root).as_posix())
    ]
    if not paths:
        raise InputError(f"this Python keeps no source in {root}: set data.corpus to a folder of text files.")
    return paths


def _local(root: Path) -> list[Path]:
    if not root.exists():
        raise InputError(f"no corpus at {str(root)!r}: set data.corpus to `stdlib`, `packages`, or a file or folder.")
    found = _files(root) if root.is_dir() else [root]
    paths = [path for path in found if path.suffix.lower() in SUFFIXES]
    if not paths:
        what = f"{root} holds no file that" if root.is_dir() else f"{root} is not a file that"
        raise InputError(
            f"{what} data.corpus can read (of {len(found)}): the suffix must be one of {' '.join(SUFFIXES)}."
        )
    return paths


def _files(root: Path, folders_left_out: tuple[str, ...] = ()) -> list[Path]:
    """All files below `root` that are not hidden, sorted by their path from there."""

    def unreadable(error: OSError) -> None:
        raise InputError(f"cannot read the folder {error.filename}: {error.strerror}.") from None

    found = []
    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = [name for name in subfolders if name[0] != "." and name not in folders_left_out]
        found += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _text(path: Path, recipe: DataRecipe) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        if recipe.document_separator is None:
            yield file.read()
            return
        rest = ""
        while chunk := file.read(_CHARACTERS):
            *whole, rest = (rest + chunk).split(recipe.document_separator)
            yield from whole
        yield rest


def _jsonl(path: Path, recipe: DataRecipe) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except json.JSONDecodeError as error:
                raise InputError(f"{where} is not JSON ({error.msg}): JSONL holds one object per line.") from None
            if not isinstance(row, dict):
                raise InputError(f"{where} is not a JSON object: JSONL holds one object per line.")
            if recipe.text_field not in row:
                raise _no_field(where, recipe, row)
            text = row[recipe.text_field]
            if not isinstance(text, str | None):
                raise InputError(f"{where}: {recipe.text_field!r} must be text; got {type(text).__name__}.")
            try:
                (text or "").encode()
            except UnicodeEncodeError:  # JSON can hold characters that UTF-8 cannot
                raise InputError(f"{where}: the text has half a surrogate pair: mend or drop it.") from None
            yield text or ""


def _parquet(path: Path, recipe: DataRecipe) -> Iterator[str]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: pip install spannorm[parquet]") from None
    try:
        with arrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if recipe.text_field not in schema.names:
                raise _no_field(str(path), recipe, schema.names)
            kind = schema.field(recipe.text_field).type
            if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                raise InputError(f"{path}: the column {recipe.text_field!r} must be text; it holds {kind}.")
            for batch in file.iter_batches(batch_size=_ROWS, columns=[recipe.text_field]):
                for text in batch.column(0):
                    yield text.as_py() or ""
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not readable as parquet ({reason}): write it again.") from None


def _no_field(where: str, recipe: DataRecipe, found: object) -> InputError:
    names = ", ".join(map(str, found)) or "none"  # type: ignore[call-overload]
    return InputError(
        f"{where} has no field {recipe.text_field!r}; fields found: {names}. "
        "Set data.text_field to the one that holds the text."
    )


_READERS: dict[str, Callable[[Path, DataRecipe], Iterator[str]]] = {".jsonl": _jsonl, ".parquet": _parquet}
