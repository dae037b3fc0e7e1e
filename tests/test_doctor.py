"""`spannorm doctor` says what is missing and how to mend it, and its exit code whether spannorm can work."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spannorm import doctor
from spannorm.cli import app

DECLARED = ["torch>=2.11", "numpy", "submitit>=1.5; extra == 'slurm'"]


def ran(
    monkeypatch: pytest.MonkeyPatch, there: dict[str, str], out: Path
) -> tuple[int, str, dict[str, dict[str, str]]]:
    def version(name: str) -> str:
        if name not in there:
            raise PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(doctor, "requires", lambda _: DECLARED)
    monkeypatch.setattr(doctor, "version", version)
    found = CliRunner().invoke(app, ["doctor", "--json", str(out)])
    return found.exit_code, found.stdout, {check["name"]: check for check in json.loads(out.read_text())["checks"]}


def test_what_is_there_is_fine_and_an_absent_extra_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = {"spannorm": doctor.spannorm.__version__, "torch": "2.11.0", "numpy": "2.0"}
    code, said, checks = ran(monkeypatch, there, tmp_path / "a.json")
    assert code == 0 and "can work here" in said
    assert checks["torch"]["value"] == "2.11.0" and {checks[name]["state"] for name in there} == {"fine"}
    assert checks["submitit"]["state"] == "missing" and checks["submitit"]["mend"] == "pip install 'spannorm[slurm]'"
    assert checks["kernels"]["value"].startswith(("triton", "reference"))


@pytest.mark.parametrize(
    ("torch", "words"), [({}, "not installed"), ({"torch": "2.10.0+cpu"}, "2.10.0+cpu, and >=2.11 is needed")]
)
def test_a_requirement_that_is_absent_or_too_old_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch: dict[str, str], words: str
) -> None:
    code, said, checks = ran(monkeypatch, {"spannorm": "0", "numpy": "2.0", **torch}, tmp_path / "a.json")
    assert code == 1 and "cannot work: see torch" in said
    assert checks["torch"]["value"] == words and checks["torch"]["mend"] == "pip install 'torch>=2.11'"
    assert checks["spannorm"]["mend"] == "the checkout is newer than its installation: pip install -e ."


def test_a_package_that_does_not_load_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(name: str) -> None:
        if name == "numpy":
            raise ImportError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "import_module", broken)
    there = {"spannorm": doctor.spannorm.__version__, "torch": "2.11.0", "numpy": "2.0"}
    code, _, checks = ran(monkeypatch, there, tmp_path / "a.json")
    assert code == 1 and "does not load: libfoo.so" in checks["numpy"]["value"]
