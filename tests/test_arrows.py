"""Imports point one way, and the core needs PyTorch alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spannorm

ROOT = Path(spannorm.__file__).parent
CORE = (
    *("errors", "values", "files", "scaling", "model_keys", "shapes", "kernels", "norms", "placements", "roles"),
    *("init", "block", "routing", "theory", "probes"),
)

EDGE = ("torchtitan",)  # what another engine is given of the core

# What each file of the core may import, from the package and from outside (the standard library is free to all).
MAY_IMPORT = {
    "errors": ((), ()),
    "values": (("errors",), ()),
    "files": (("errors", "values"), ()),
    "scaling": (("errors",), ()),
    "model_keys": (("errors", "scaling", "values"), ()),
    "shapes": ((), ("torch", "jaxtyping")),
    "kernels": (("errors",), ("torch", "triton")),
    "norms": (("errors", "shapes", "kernels"), ("torch",)),
    "placements": (("errors", "values", "shapes", "scaling", "kernels", "norms"), ("torch",)),
    "roles": (("errors", "scaling", "norms", "placements"), ("torch",)),
    "init": (("errors", "scaling", "roles"), ("torch",)),
    "routing": ((), ("torch",)),
    "theory": (("errors", "scaling", "norms", "placements"), ("numpy", "torch")),
    "probes": (("errors", "values"), ("torch",)),
    "block": (("placements", "shapes"), ("torch",)),
    "torchtitan": (
        ("errors", "files", "placements", "roles", "init", "adopt", "inner_norms"),
        ("numpy", "torch", "torchtitan", "spmd_types"),
    ),
}

# Rooms, and the rooms they must not look into: those that stand on them.
MUST_NOT_IMPORT = {
    "models": ("rewiring", "auditing", "evaluate", "train", "lab", "publishing", "cli"),
    "rewiring": ("models", "evaluate", "train", "lab", "publishing", "cli"),
    "auditing": ("models", "rewiring", "evaluate", "train", "lab", "publishing", "cli"),
    "evaluate": ("models", "rewiring", "auditing", "train", "lab", "publishing", "cli"),
    "train": ("lab", "publishing", "cli"),
    "lab": ("publishing", "cli"),
    "publishing": ("cli",),
}


def imports(path: Path) -> set[str]:
    """Every module a file names in an import, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; this test reads absolute names"
            # `from spannorm import train` names a module too
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("spannorm.")}


@pytest.mark.parametrize("module", (*CORE, *EDGE))
def test_the_core_imports_what_the_picture_shows_and_no_more(module):
    inside, outside = MAY_IMPORT[module]
    files = sorted((ROOT / module).glob("*.py")) or [ROOT / f"{module}.py"]
    for path in files:
        # a package may look into itself
        assert rooms(path) <= {*inside, *([module] if path.parent.name == module else [])}, path
        foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"spannorm"}
        assert foreign <= set(outside), path


def test_a_placement_stands_on_the_base_and_may_be_made_of_others_and_the_registry_knows_all():
    folder = ROOT / "placements"
    inner = {
        path.stem: {name.split(".")[2] for name in imports(path) if re.match(r"spannorm\.placements\.[a-z]", name)}
        for path in folder.glob("*.py")
    }
    files = set(inner) - {"__init__", "base", "stack"}
    assert inner["base"] == set()
    assert {"base", "stack"} <= inner["__init__"] <= {"base", "stack", *files}
    assert inner["stack"] == {"base", *files}
    for name in files:
        assert "base" in inner[name] <= {"base", *files} - {name}


@pytest.mark.parametrize("room", MUST_NOT_IMPORT)
def test_no_room_looks_into_one_that_stands_on_it(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert not rooms(path) & set(MUST_NOT_IMPORT[room]), path.relative_to(ROOT)


def test_the_rooms_of_rewiring_import_each_other_in_one_direction():
    folder = ROOT / "rewiring"
    stands_on = {p.stem: {m.split(".")[2] for m in imports(p) if re.match(r"spannorm\.rewiring\.[a-z]", m)}
                 for p in folder.glob("*.py") if p.stem != "__init__"}  # fmt: skip
    while stands_on:
        free = [name for name, under in stands_on.items() if not under & set(stands_on)]
        assert free, f"a circle among {sorted(stands_on)}"
        for name in free:
            del stands_on[name]


# The rooms of the lab, each with those that it may look into; the files beside them are entry points.
LAB = {
    "results": set(),
    "jobs": {"results"},
    "ladder": {"jobs", "results"},
    "charts": set(),
    "report": {"results", "ladder.fit", "charts"},
    "depth": {"report.looks", "report.figures", "charts"},
}


@pytest.mark.parametrize("room", LAB)
def test_the_rooms_of_the_lab_look_into_each_other_in_one_direction(room):
    files = list((ROOT / "lab" / room).rglob("*.py"))
    assert files and {path.name for path in (ROOT / "lab").iterdir() if path.is_dir()} - {"__pycache__"} == set(LAB)
    for path in files:
        for name in imports(path):
            inner = name.removeprefix("spannorm.lab.")
            if inner != name and not inner.startswith(f"{room}."):
                assert any(f"{inner}.".startswith(f"{other}.") for other in LAB[room]), f"{path.name} imports {name}"


def test_nothing_imports_the_command_line():
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "cli" and path.name != "__main__.py":
            assert "cli" not in rooms(path), path.relative_to(ROOT)


def in_a_fresh_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy_and_the_core_no_transformers():
    heavy = "[m for m in ('torch', 'transformers', 'accelerate', 'beartype') if m in sys.modules]"
    core = "spannorm.Block, spannorm.init_plan, spannorm.theory.predict, spannorm.probes.Probe"
    loaded = in_a_fresh_interpreter(f"import sys, spannorm; print({heavy}); {core}; print({heavy})")
    assert loaded.splitlines() == ["[]", "['torch']"]


@pytest.mark.parametrize(
    ("command", "may_load"),
    [
        ("--help", set()), ("compare --help", set()), ("placements", set()), ("placements span", set()),
        ("theory --placements pre --depths 2", {"torch"}),
    ],
)  # fmt: skip
def test_a_quick_verb_loads_nothing_heavy(command, may_load):
    code = (
        f"import sys; sys.argv = ['spannorm', *{command.split()!r}]\n"
        "from spannorm.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print('loaded', *{'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules))"
    )
    assert set(in_a_fresh_interpreter(code).splitlines()[-1].split()) <= {"loaded", *may_load}


def test_the_core_runs_without_jaxtyping():
    # jaxtyping is a dependency of the tests, not of the package
    code = (
        "import sys; sys.modules['jaxtyping'] = None\n"
        "import torch, spannorm\n"
        "p = spannorm.build_placement('span', hidden_size=8, layer_idx=0, num_layers=2)\n"
        "print(tuple(p(torch.ones(1, 2, 8), torch.tanh, torch.tanh).shape))"
    )
    assert in_a_fresh_interpreter(code) == "(1, 2, 8)"


def test_every_public_name_is_there_and_the_hugging_face_side_loads_on_first_use():
    code = (
        "import sys, spannorm\n"
        "before = 'transformers' in sys.modules\n"
        "missing = [n for n in spannorm.__all__ if not hasattr(spannorm, n)]\n"
        "print(before, missing, 'transformers' in sys.modules)"
    )
    assert in_a_fresh_interpreter(code) == "False [] True"


def test_the_package_lists_what_a_user_may_use_and_nothing_else():
    assert set(dir(spannorm)) == {*spannorm.__all__, "__version__"}


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"spannorm.*SpamNorm"):
        _ = spannorm.SpamNorm
