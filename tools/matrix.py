"""Build wheel and sdist, and run the tests from outside the checkout, in a fresh environment for each set of versions.

    python tools/matrix.py [--python python3.11 …] [--torch 2.13.0 …] [--transformers 5.17.0 5.24.0 …]
                           [--torch-index URL] [--tests core|fast] [--work DIR]

Each environment holds the wheel and the packages of the tests; the tests are the sdist's, unpacked in a folder of their
own whose `src` is removed. `core` takes minutes, `fast` is all of `make test`. Ends in a table; exits with 1 if a row
failed. Needs `pip install build`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = (
    *("placements", "init", "scaling", "norms", "block", "streams", "routing", "originals", "own_placements"),
    *("arrows", "doctor", "theory", "probes/test_record.py", "probes/test_experiments.py", "kernels/test_add_norm.py"),
    *("models/test_modeling.py", "models/test_model_init.py", "models/test_persistence.py", "models/test_clients.py"),
    *("rewire/test_rewire.py", "train/test_run.py", "lab/test_handover.py", "lab/test_statistics.py"),
)
"""Of the fast tests those that meet other packages the most, and all of the core's equations."""


def run(command: Sequence[object], log: Path, **options: object) -> int:
    """Run a command with its output added to a file; its exit code."""
    with log.open("a", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        return subprocess.run([str(c) for c in command], stdout=file, stderr=file, check=False, **options).returncode


def built(work: Path) -> tuple[Path, Path]:
    """A new wheel, and the folder of the unpacked sdist without its source."""
    dist = work / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    if run([sys.executable, "-m", "build", "--outdir", dist, ROOT], work / "build.log"):
        sys.exit(f"the build failed: see {work / 'build.log'}")
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    outside = work / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    with tarfile.open(sdist) as file:
        file.extractall(outside, filter="data")
    (tests,) = outside.iterdir()
    shutil.rmtree(tests / "src")
    return wheel, tests


def dev_packages() -> list[str]:
    """What `spannorm[dev]` asks for, but for its linters."""
    import tomllib

    raw = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    dev = raw["project"]["optional-dependencies"]["dev"]
    return [p for p in dev if not p.startswith(("spannorm", "mypy", "ruff", "types-"))]


def environment(python: str, torch: str, transformers: str, index: str | None, wheel: Path, log: Path) -> Path | None:
    """A fresh virtual environment with the wheel; None where it cannot be made."""
    folder = log.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    from_index = ["--index-url", index] if index else []
    # Triton 3.6, which belongs to PyTorch 2.11: its interpreter, which the kernels' tests use, fails with NumPy 2.4
    older = ["numpy<2.4"] if torch.startswith("2.11.") else []
    for command in (
        [python, "-m", "venv", folder],
        [*pip, *from_index, f"torch=={torch}"],
        [*pip, f"{wheel}[slurm,triton]", f"torch=={torch}", f"transformers=={transformers}", *older, *dev_packages()],
    ):
        if run(command, log):
            return None
    return folder


def test_paths(tests: Path, which: str) -> list[str]:
    """Of a suite, as pytest takes them."""
    if which == "fast":
        return ["tests"]
    paths = [f"tests/{name}" if "/" in name or (tests / "tests" / name).is_dir() else f"tests/test_{name}.py"
             for name in CORE]  # fmt: skip
    if missing := [path for path in paths if not (tests / path).exists()]:
        sys.exit(f"not in the sdist: {', '.join(missing)}")
    return paths


def tested(folder: Path, tests: Path, which: str, log: Path) -> str:
    """Run the tests in an environment; pytest's last line."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    python = folder / "bin" / "python"
    where = subprocess.run([python, "-c", "import spannorm; print(spannorm.__file__)"], cwd=tests, env=clean,
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    if not where.startswith(str(folder)):
        sys.exit(f"spannorm came from {where.strip()}, not from the wheel")
    run([python, "-m", "pytest", "-n", "0", *test_paths(tests, which)], log, cwd=tests, env=clean)
    return log.read_text(encoding="utf-8").splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--torch", nargs="+", default=["2.13.0"])
    parser.add_argument("--transformers", nargs="+", default=["5.17.0", "5.24.0"])
    parser.add_argument("--torch-index", help="where torch is taken from; default pip's own")
    parser.add_argument("--tests", choices=("core", "fast"), default="core")
    parser.add_argument("--work", type=Path, default=Path("runs/matrix"))
    o = parser.parse_args()
    o.work.mkdir(parents=True, exist_ok=True)
    work = o.work.absolute()
    wheel, tests = built(work)
    rows = []
    for python, torch, transformers in product(o.python, o.torch, o.transformers):
        found = subprocess.run([python, "-c", "import platform; print(platform.python_version())"],
                               capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
        name = f"python {found}, torch {torch}, transformers {transformers}"
        log = work / f"{found}-{torch}-{transformers}.log"
        log.unlink(missing_ok=True)
        folder = environment(python, torch, transformers, o.torch_index, wheel, log)
        outcome = tested(folder, tests, o.tests, log) if folder else f"cannot be installed: see {log}"
        rows.append({"name": name, "outcome": outcome})
        print(f"{name:50} {outcome}", flush=True)
    (work / "matrix.json").write_text(json.dumps({"tests": o.tests, "rows": rows}, indent=1), encoding="utf-8")
    sys.exit(any("passed" not in row["outcome"] or "failed" in row["outcome"] for row in rows))


if __name__ == "__main__":
    main()
