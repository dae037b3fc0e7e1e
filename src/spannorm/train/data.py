"""Tokens on disk: prepared once, completely or not at all, and opened as memory maps."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spannorm.errors import InputError, unknown
from spannorm.files import read_json
from spannorm.folders import partial_folder, sweep_partial
from spannorm.text import line
from spannorm.train.corpus import documents, left_out, placed_documents
from spannorm.train.recipe import DataRecipe
from spannorm.train.tokenizer import encode_documents, load_tokenizer

logger = logging.getLogger("spannorm")

SPLITS = ("train", "validation", "test")

_DESCRIPTION = "data.json"
_TOKENS = 1 << 22  # counted at a time
CHECKED = 1 << 30
"""Token files of at most this many bytes are read once more before a run, which takes a second or two."""
_DTYPES = ("uint16", "uint32")
_SPLIT = {"tokens": int, "documents": int, "bytes": int, "sha256": str}
_SHAPE = {
    "recipe": dict, "vocab_size": int, "end_of_document": int, "dtype": str, "sha256": str, "corpus_sha256": str,
    "duplicates": int, "splits": {name: _SPLIT for name in SPLITS},
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """The content of one token file."""

    tokens: int
    """With the end-of-document tokens."""
    documents: int
    bytes: int
    """Size of the documents as UTF-8 text."""
    sha256: str
    """Of the token file."""


@dataclass(frozen=True)
class TokenData:
    """A folder of tokens: `train.bin`, `validation.bin`, `test.bin`, `tokenizer/` and `data.json`.

    A token file is a sequence of little-endian integers of `dtype`; after every document comes the token
    `end_of_document`. `sha256` covers the tokens of all splits: runs with the same hash saw the same data.
    `corpus_sha256` covers the distinct documents, for any order and tokenizer. `duplicates` counts the documents that
    were dropped.
    """

    directory: Path
    recipe: DataRecipe
    vocab_size: int
    end_of_document: int
    dtype: str
    sha256: str
    corpus_sha256: str
    duplicates: int
    splits: Mapping[str, Split]

    @classmethod
    def open(cls, directory: str | Path) -> TokenData:
        """Open data that `prepare_data` wrote.

        Raises `InputError` if there is none, or if a file is unreadable or has another length. The tokens themselves
        are not read, so this does not notice bytes that were changed in place.
        """
        directory = Path(directory)
        again = f"delete the folder {directory} and prepare the data again."
        if not (directory / _DESCRIPTION).exists():
            raise InputError(f"no prepared data in {directory}: it has no {_DESCRIPTION}.")
        try:
            raw = read_json(directory / _DESCRIPTION, _SHAPE)
            if raw["dtype"] not in _DTYPES or not 0 <= raw["end_of_document"] < raw["vocab_size"] <= 1 << 32:
                raise ValueError("dtype, vocab_size or end_of_document is not what was written")
            entries = raw.pop("splits")
            splits = {name: Split(**entries[name]) for name in SPLITS}
            data = cls(directory, DataRecipe(**raw.pop("recipe")), splits=splits, **raw)
            width = np.dtype(data.dtype).itemsize
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{directory / _DESCRIPTION} is not readable ({error}): {again}") from None
        for name, split in splits.items():
            path = directory / f"{name}.bin"
            size = path.stat().st_size if path.is_file() else 0
            off = size - split.tokens * width
            if off:
                wrong = f"truncated by {-off}" if off < 0 else f"too long by {off}"
                raise InputError(
                    f"{path} is {wrong} bytes: it has {size}, and {_DESCRIPTION} says {size - off}; {again}"
                )
        return data

    def check(self) -> None:
        """Read the token files (if they have at most `CHECKED` bytes) and the tokenizer, so that errors come early.

        Raises `InputError` for bytes that changed, and for a damaged tokenizer.
        """
        again = f"delete the folder {self.directory} and prepare the data again."
        paths = {name: self.directory / f"{name}.bin" for name in self.splits}
        if sum(path.stat().st_size for path in paths.values()) <= CHECKED:
            for name, path in paths.items():
                with path.open("rb") as file:
                    if file_digest(file, "sha256").hexdigest() != self.splits[name].sha256:
                        raise InputError(f"{path} was altered: {again}")
        try:
            tokenizer = self.tokenizer()
            same = max(tokenizer.get_vocab().values()) + 1 == self.vocab_size
            same = same and tokenizer.eos_token_id == self.end_of_document
        except Exception as error:  # its parsers raise many kinds of errors
            reason = line(next(iter(str(error).strip().splitlines()), type(error).__name__))
            raise InputError(f"{self.directory / 'tokenizer'} is not readable ({reason}): {again}") from None
        if not same:
            raise InputError(f"{self.directory / 'tokenizer'} is not the one the tokens were made with: {again}")

    def split(self, name: str) -> Split:
        """The description of a split; `InputError` for a name not in `SPLITS`."""
        if name not in self.splits:
            raise unknown("split", name, self.splits)
        return self.splits[name]

    def tokens(self, split: str) -> np.ndarray:
        """The tokens of a split, shape (tokens,), as a read-only memory map."""
        shape = (self.split(split).tokens,)
        return np.memmap(self.directory / f"{split}.bin", _on_disk(self.dtype), mode="r", shape=shape)

    def documents(self, split: str) -> Iterator[str]:
        """The texts of a split, decoded. Exact for `bytes` and `bpe`; other tokenizers may lose characters."""
        tokens, tokenizer = self.tokens(split), self.tokenizer()
        start = 0
        for end in np.flatnonzero(tokens == self.end_of_document):
            yield tokenizer.decode(tokens[start:end].tolist())
            start = int(end) + 1

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made the data."""
        return AutoTokenizer.from_pretrained(self.directory / "tokenizer", trust_remote_code=False)

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text per token. Bits per byte are nats per token divided by (this · ln 2)."""
        return self.split(split).bytes / self.split(split).tokens

    def unigram_loss(self, split: str = "validation") -> float:
        """Cross-entropy of a split, in nats per token, under the unigram frequencies of the training tokens.

        One is added to every count, so that a token that training never saw has a finite loss. If a model is not
        clearly below this value, it has learned only which tokens are frequent.
        """
        frequency = self._counts("train") + 1
        seen = self._counts(split)
        return float(seen @ (math.log(frequency.sum()) - np.log(frequency)) / seen.sum())

    def _counts(self, split: str) -> np.ndarray:
        tokens = self.tokens(split)
        counts = np.zeros(self.vocab_size, np.int64)
        for start in range(0, len(tokens), _TOKENS):
            counts += np.bincount(tokens[start : start + _TOKENS], minlength=self.vocab_size)
        return counts


def prepare_data(recipe: DataRecipe, directory: str | Path, *, same_corpus: bool = False) -> TokenData:
    """Turn the corpus into tokens in `directory`, or open the data of an equal recipe there.

    Exact duplicates are dropped. Documents are split in the order of the SHA-256 of their text: the first go to
    validation until they reach `validation_fraction` of all bytes, the next to test in the same way, the rest to
    train. So a document's split depends on the texts alone, not on file names. The corpus `packages` is split by
    package instead; a text that is in several splits goes to train. Within a split the documents keep the order of the
    corpus. A document is in memory only while it is encoded.

    The folder appears complete or not at all. Existing data is checked (`TokenData.check`). The corpus is read again
    only with `same_corpus`, because with an equal recipe its files, or Python's own library, may still have changed.

    Raises `InputError` as `documents` and `load_tokenizer` do, before anything is written; for fewer than three
    distinct documents; if the folder holds something else or another recipe's data; and if it cannot be written.
    """
    directory = Path(directory).absolute()
    there = os.path.lexists(directory / _DESCRIPTION)
    try:
        if not there:
            if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
                raise InputError(f"{directory} holds something else than prepared data: give a new folder.")
            _prepare(recipe, directory)
    except OSError as error:
        raise InputError(
            f"cannot write token files to {directory}: {error.strerror or error}. "
            "Make room there, or give a folder that can be written."
        ) from None
    data = TokenData.open(directory)
    differing = [
        f"data.{field.name} ({there!r} there, {given!r} given)"
        for field in fields(DataRecipe)
        if (there := getattr(data.recipe, field.name)) != (given := getattr(recipe, field.name))
    ]
    if differing:
        raise InputError(
            f"{directory} holds data of another recipe: {', '.join(differing)}. Give another folder, or delete it."
        )
    if there:
        data.check()
        if same_corpus and _plan(recipe).corpus_sha256 != data.corpus_sha256:
            raise InputError(
                f"the corpus {recipe.corpus!r} has changed since {directory} was made: give a new folder, or delete it."
            )
    return data


@dataclass(frozen=True)
class _Plan:
    """Which split each distinct document goes to, by the digest of its text."""

    recipe: DataRecipe
    split: dict[bytes, str]
    bytes: dict[str, int]
    duplicates: int

    @property
    def corpus_sha256(self) -> str:
        return sha256(b"".join(sorted(self.split))).hexdigest()

    def documents(self) -> Iterator[tuple[str, str]]:
        """Read the corpus again: (split, text) of each distinct document."""
        waiting = dict(self.split)
        for text in documents(self.recipe):
            digest = sha256(text.encode()).digest()
            if digest in waiting:
                yield waiting.pop(digest), text
            elif digest not in self.split:
                waiting[digest] = ""
                break
        if waiting:
            raise InputError("the corpus changed while it was being read: prepare the data again.")


def _plan(recipe: DataRecipe) -> _Plan:
    size: dict[bytes, int] = {}
    placed: dict[bytes, str] = {}
    read = 0
    for name, text in placed_documents(recipe):
        encoded = text.encode()
        size[digest := sha256(encoded).digest()] = len(encoded)
        placed.setdefault(digest, name)
        read += 1
    if len(size) < 3:
        raise InputError(
            f"the corpus {recipe.corpus!r} has {len(size)} distinct documents, and the three splits need one "
            "each: give more files, or set data.document_separator to the text that ends a document."
        )
    total = dict.fromkeys(SPLITS, 0)
    if all(placed.values()):
        for digest, name in placed.items():
            total[name] += size[digest]
        return _Plan(recipe, placed, total, read - len(size))
    rest = deque(sorted(size))
    split: dict[bytes, str] = {}
    shares = {"validation": recipe.validation_fraction, "test": recipe.test_fraction, "train": math.inf}
    for left, (name, share) in zip((2, 1, 0), shares.items(), strict=True):
        while len(rest) > left and total[name] < share * sum(size.values()):
            digest = rest.popleft()
            split[digest] = name
            total[name] += size[digest]
    return _Plan(recipe, split, total, read - len(size))


def _prepare(recipe: DataRecipe, directory: Path) -> None:
    plan = _plan(recipe)
    if passed_over := left_out(recipe):
        logger.warning("%s: left out of the corpus: %s.", line(recipe.corpus), passed_over)
    tokenizer = load_tokenizer(recipe, lambda: (text for split, text in plan.documents() if split == "train"))
    directory.parent.mkdir(parents=True, exist_ok=True)
    sweep_partial(directory.parent)
    try:
        with partial_folder(directory) as partial:
            _write(plan, tokenizer, partial)
            if directory.exists():
                directory.rmdir()
            partial.rename(directory)
    except OSError:
        if not (directory / _DESCRIPTION).exists():  # else another process was first
            raise


def _write(plan: _Plan, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps, so not the number of tokens
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    end = np.array([tokenizer.eos_token_id], _on_disk(dtype)).tobytes()
    try:
        tokenizer.save_pretrained(folder / "tokenizer")
    except Exception as error:  # the writer behind it raises a plain Exception when the disk is full
        raise OSError(str(error)) from None
    digest = {name: sha256() for name in SPLITS}
    tokens = dict.fromkeys(SPLITS, 0)
    going_to: deque[str] = deque()  # the splits of the texts read but not yet encoded

    def texts() -> Iterator[str]:
        for split, text in plan.documents():
            going_to.append(split)
            yield text

    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in SPLITS}
        for ids in encode_documents(tokenizer, texts()):
            name = going_to.popleft()
            encoded = ids.astype(_on_disk(dtype)).tobytes() + end
            files[name].write(encoded)
            digest[name].update(encoded)
            tokens[name] += len(ids) + 1

    placed = list(plan.split.values())
    splits = {
        name: Split(tokens[name], placed.count(name), plan.bytes[name], digest[name].hexdigest()) for name in SPLITS
    }
    description = {
        "recipe": asdict(plan.recipe),
        "vocab_size": vocab_size,
        "end_of_document": tokenizer.eos_token_id,
        "dtype": dtype,
        "sha256": sha256("".join(splits[name].sha256 for name in SPLITS).encode()).hexdigest(),
        "corpus_sha256": plan.corpus_sha256,
        "duplicates": plan.duplicates,
        "splits": {name: asdict(split) for name, split in splits.items()},
    }
    (folder / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _on_disk(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")
