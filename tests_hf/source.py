"""Transformers' own tests, from the source distribution of the installed release. None of them is copied here."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

HERE = Path(__file__).resolve().parent
PACKAGE = "transformers"


def download(folder: Path) -> Path:
    """The unpacked source distribution, fetched from the package registry on first use."""
    name = f"{PACKAGE}-{transformers.__version__}"
    if not (folder / name / "tests").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
        subprocess.run([*command, "--dest", str(folder), f"{PACKAGE}=={transformers.__version__}"], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        # as in a checkout, except that what the distribution lacks is looked for elsewhere on the path
        package = "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n"
        (folder / name / "tests" / "__init__.py").write_text(package, encoding="utf-8")
    return folder / name


def search_path(checkout: Path) -> list[str]:
    """Folders to import from: `tests` is the release's, and what that lacks is found in our stand-ins.

    The `tests` of a source distribution is made to look into both folders (`download`), that of a checkout does not.
    """
    return [str(checkout), str(HERE / "stand_ins"), str(HERE)]


def missing(checkout: Path) -> list[str]:
    """Suites that the checkout or distribution lacks."""
    parts = {"generation": "generation/test_utils.py", "export": "exporters/test_export.py"}
    parts["pipelines"] = "pipelines/test_pipelines_text_generation.py"
    return [name for name, path in parts.items() if not (checkout / "tests" / path).is_file()]
