"""What this installation can do: versions, machine, kernels, and what is missing with the command that mends it.

Needs nothing but the standard library and Rich to start: it must speak where PyTorch does not import.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any, Literal

from rich.console import Console

import spannorm
from spannorm.console import Grid, wide_console

State = Literal["fine", "missing", "bad"]
IMPORTED = ("torch", "transformers", "accelerate", "numpy", "scipy", "matplotlib")
"""Packages with compiled parts, or on top of such: they can be installed and still not load."""


@dataclass(frozen=True)
class Check:
    """One line."""

    topic: str
    name: str
    value: str
    state: State = "fine"
    """`missing`: something optional is not there. `bad`: spannorm needs it and cannot work."""
    mend: str = ""
    """What to do about it."""


@dataclass(frozen=True)
class Examination:
    """All that was looked at."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that is needed works."""
        return all(check.state != "bad" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def examine() -> Examination:
    """Look at this Python, its packages, the machine and the kernels. Imports PyTorch and Transformers."""
    return Examination((*_python(), *_packages(), *_machine()))


def _python() -> Iterator[Check]:
    fine = sys.version_info >= (3, 11)
    yield Check("versions", "python", platform.python_version(), "fine" if fine else "bad",
                "" if fine else "spannorm needs Python 3.11 or newer: make a new environment with one")  # fmt: skip
    try:
        installed = version("spannorm")
    except PackageNotFoundError:
        yield Check("versions", "spannorm", f"{spannorm.__version__}, not installed", "bad",
                    "its requirements are unknown: pip install -e . in the checkout")  # fmt: skip
        return
    if installed == spannorm.__version__:
        yield Check("versions", "spannorm", installed)
    else:
        yield Check("versions", "spannorm", f"{spannorm.__version__}, installed as {installed}", "missing",
                    "the checkout is newer than its installation: pip install -e .")  # fmt: skip


def _packages() -> Iterator[Check]:
    """Every requirement of the package, then of its extras; what it needs must load too."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in requires("spannorm") or ()]
    except PackageNotFoundError:
        return
    for requirement in declared:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement, f"pip install '{str(requirement).partition(';')[0].strip()}'", needed=True)
    for extra in ("parquet", "eval", "torchtitan", "slurm", "triton"):
        for requirement in declared:
            marker = requirement.marker
            if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
                yield _package(requirement, f"pip install 'spannorm[{extra}]'", needed=False, topic=f"extra {extra}")


def _package(requirement: Any, mend: str, needed: bool, topic: str = "versions") -> Check:
    wrong: State = "bad" if needed else "missing"
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(topic, requirement.name, "not installed", wrong, mend)
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(topic, requirement.name, f"{found}, and {requirement.specifier} is needed", wrong, mend)
    if requirement.name in IMPORTED and (error := _import_error(requirement.name)):
        of_torch = requirement.name != "torch" and _import_error("torch")
        mend = "needs PyTorch first" if of_torch else f"install it again: {mend}"
        return Check(topic, requirement.name, f"{found} does not load: {error}", wrong, mend)
    return Check(topic, requirement.name, found)


def _import_error(name: str) -> str:
    try:
        import_module(name)
    except Exception as error:  # a broken library raises every kind
        return next(iter(str(error).splitlines()), type(error).__name__)
    return ""


def _machine() -> Iterator[Check]:
    yield Check("machine", "system", f"{platform.system()} {platform.machine()}")
    if _import_error("torch"):
        yield Check("machine", "cores", str(os.cpu_count()))
        return
    import torch

    from spannorm.train.environment import cores, machine, memory

    about = machine()
    yield Check("machine", "processor", about["processor"])
    yield Check("machine", "cores", f"{cores()}, PyTorch uses {torch.get_num_threads()} threads")
    kind = "of the GPU" if about["devices"] else "that this process may use"
    yield Check("machine", "memory", f"{memory() / 2**30:.1f} GiB {kind}")
    yield _gpu(about)
    yield _kernels()


def _gpu(about: dict[str, Any]) -> Check:
    import torch

    if about["devices"]:
        major, minor = torch.cuda.get_device_capability()
        return Check("machine", "GPU", f"{about['devices']} × {about['device']}, compute capability {major}.{minor}")
    if torch.version.cuda is None and torch.version.hip is None:
        return Check("machine", "GPU", "none that this CPU build of PyTorch can use", "missing",
                     "where there is one: make install TORCH=torch, or PyTorch's own instructions")  # fmt: skip
    return Check("machine", "GPU", "none found by PyTorch", "missing", "where there is one: nvidia-smi must list it")


def _kernels() -> Check:
    """Which add-and-norm a training step on this machine runs."""
    from spannorm import kernels

    name, reason = kernels.chosen()
    said = f"{name}: {reason}" if reason else name
    if "not installed" in reason:
        return Check("machine", "kernels", said, "missing", "pip install 'spannorm[triton]'")
    return Check("machine", "kernels", said)


def show(found: Examination, console: Console | None = None) -> None:
    """Print the checks as a table, and what is wrong in one line."""
    console = console or wide_console()
    grid = Grid()
    for heading in ("", "name", "found"):
        grid.column(heading)
    grid.column("to mend it", "note")
    styles = {"fine": "", "missing": "yellow", "bad": "red"}
    topic = ""
    for check in found.checks:
        grid.row("" if check.topic == topic else check.topic, check.name, check.value, check.mend,
                 style=styles[check.state])  # fmt: skip
        topic = check.topic
    console.print(grid.fitted(console))
    bad = [check.name for check in found.checks if check.state == "bad"]
    console.print(f"spannorm cannot work: see {', '.join(bad)}." if bad else "spannorm can work here.")
