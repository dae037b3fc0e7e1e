"""The corpus of pinned packages: what is read, where it goes, and what is said when a wheel cannot be had."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from spannorm.errors import InputError
from spannorm.train import packages
from spannorm.train.data import SPLITS, TokenData, prepare_data
from spannorm.train.packages import Lock, Package, cache_folder, documents, fetch, markdown, read_lock, texts
from spannorm.train.recipe import DataRecipe

DOCS = Path(__file__).parents[2] / "docs"
SHARED = "# what two packages have word for word\nanswer = 42\n"


def made(folder: Path, name: str, split: str, files: dict[str, str | bytes]) -> Package:
    """A wheel that pip accepts, and its line of a lock."""
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Python: <3\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in reversed(files.items()):
            archive.writestr(file, content)
    size = sum(len(content) for file, content in files.items() if file.endswith(".py"))
    return Package(name, "1.0", path.name, sha256(path.read_bytes()).hexdigest(), "MIT", split, "made", size)


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lock:
    """Three packages in an index of this machine's own, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files: dict[str, str | bytes] = {
        "one/b.py": "b = 'é'\r\n",
        "one/a.py": "a = 1  # first\n",
        "one/shared.py": SHARED,
        "one/empty.py": "  \n",
        "one/data.txt": "no source\n",
        "one/tests/case.py": "a test\n",
        "one/test_a.py": "a test too\n",
        "one/a_test.py": "and another\n",
        "one/_vendor/six.py": "somebody else's\n",
        "one/table.py": "[0.123456789, 0.987654321]\n",
        "one/latin.py": "# caf\xe9\n".encode("latin-1"),
    }
    lines = [
        made(index, "three", "test", {"three.py": "c = 3\n"}),
        made(index, "two", "validation", {"two.py": "d = 4\n", "copied.py": SHARED}),
        made(index, "one", "train", files),
    ]
    found = Lock((lines[2], lines[1], lines[0]), "")
    monkeypatch.setattr(packages, "read_lock", lambda: found)
    return found


def held(data: TokenData, split: str) -> list[str]:
    return bytes(t if t < 256 else 0 for t in data.tokens(split).tolist()).decode().split("\0")[:-1]


def test_packages_are_fetched_once_read_in_order_and_split_whole(
    lock: Lock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = prepare_data(DataRecipe(corpus="packages"), tmp_path / "data")
    said = capfd.readouterr().err.replace("\n", " ")
    assert "fetching 3 packages" in said and "once" in said
    assert {split: held(data, split) for split in SPLITS} == {
        "train": ["a = 1  # first\n", "b = 'é'\n", SHARED],
        "validation": ["d = 4\n"],
        "test": ["c = 3\n"],
    }, "what a training package has is in no other split"
    assert data.duplicates == 1
    texts_ = ["a = 1  # first\n", "b = 'é'\n", SHARED, "d = 4\n", "c = 3\n"]
    digests = sorted(sha256(text.encode()).digest() for text in texts_)
    assert data.corpus_sha256 == sha256(b"".join(digests)).hexdigest()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    again = prepare_data(DataRecipe(corpus="packages"), tmp_path / "again")
    assert again.sha256 == data.sha256 and not capfd.readouterr().err
    assert sorted(path.name for path in cache_folder().iterdir()) == sorted(p.wheel for p in lock.packages)


def test_a_damaged_wheel_is_fetched_again(lock: Lock, tmp_path: Path) -> None:
    fetch(lock.packages, tmp_path / "wheels")
    path = tmp_path / "wheels" / lock.packages[0].wheel
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert len(list(documents(lock, tmp_path / "wheels"))) == 7
    assert path.read_bytes() == whole


def test_another_file_under_the_same_name_is_refused(lock: Lock, tmp_path: Path) -> None:
    wrong = replace(lock, packages=(*lock.packages[:2], replace(lock.packages[2], sha256="0" * 64)))
    with pytest.raises(InputError, match=r"three-1\.0-py3-none-any\.whl.* another file for three==1\.0 than the lock"):
        next(documents(wrong, tmp_path / "wheels"))
    assert not list((tmp_path / "wheels").glob("*.partial"))


def test_a_wheel_that_is_gone_is_named_before_anything_is_written(
    lock: Lock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index" / lock.packages[1].wheel).unlink()
    with pytest.raises(InputError) as caught:
        prepare_data(DataRecipe(corpus="packages"), tmp_path / "data")
    message = str(caught.value)
    assert "two-1.0-py3-none-any.whl" in message and "two==1.0" in message and "stdlib" in message
    assert str(cache_folder()) in message and not (tmp_path / "data").exists()


def test_a_cache_that_cannot_be_written_is_said(lock: Lock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(InputError, match="XDG_CACHE_HOME"):
        next(documents(lock))


def test_no_pip_and_no_network_are_told_apart(lock: Lock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(InputError, match="no connection to the package index"):
        next(documents(lock, tmp_path / "wheels"))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(InputError, match="No module named pip"):
        next(documents(lock, tmp_path / "wheels"))


def test_a_share_to_hold_out_is_refused(lock: Lock, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.test_fraction does not apply to data\.corpus packages"):
        prepare_data(DataRecipe(corpus="packages", test_fraction=0.1), tmp_path / "data")


def test_the_lock_is_sound_and_its_page_is_up_to_date() -> None:
    lock = read_lock()
    assert (DOCS / "corpus.md").read_text(encoding="utf-8") == markdown(lock), "run `make docs`"
    size = {split: sum(p.bytes for p in lock.packages if p.split == split) for split in SPLITS}
    assert sum(size.values()) > 100e6 and min(size.values()) > 5e6 and size["train"] > 0.8 * sum(size.values())
    assert len({p.name for p in lock.packages}) == len(lock.packages)
    for package in lock.packages:
        assert package.wheel.endswith("-none-any.whl") and package.version in package.wheel
        assert package.licence in ("MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0")
        assert len(package.sha256) == 64


def _windows(text: str) -> Iterator[int]:
    """Every six lines of code in a row, without indentation, blank lines and comments."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    return (hash(tuple(lines[i : i + 6])) for i in range(len(lines) - 5))


@pytest.mark.slow
def test_the_real_corpus_has_the_size_and_the_hash_of_the_lock(tmp_path: Path) -> None:
    lock = read_lock()
    data = prepare_data(DataRecipe(corpus="packages"), tmp_path / "data")
    assert data.corpus_sha256 == lock.corpus_sha256
    held: set[int] = set()
    for package in lock.packages:
        found = [text for text in texts(cache_folder() / package.wheel) if text and not text.isspace()]
        assert sum(len(text.encode()) for text in found) == package.bytes, package.name
        if package.split == "train":
            held.update(window for text in found for window in _windows(text))
        else:
            windows = [window for text in found for window in _windows(text)]
            assert sum(window in held for window in windows) < 0.01 * len(windows), package.name
    assert sum(split.bytes for split in data.splits.values()) > 150e6
