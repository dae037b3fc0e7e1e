"""Every benchmark that a CPU can run comes to its end, and says what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "run.py --rows 1,2,3,4,5,6,7,8 --pairs 1",
        "run.py --rows 9 --placements post,mhc --pairs 1",
        "llama.py --rounds 1 --steps 4",
        "probes.py --rounds 1",
        "rewire.py --rounds 1",
        "moe.py --rounds 1 --steps 3 --depth 2 --experts 4",
        "cpu.py --pairs 1",
        "processes.py --pairs 1 --width 64",
        "theory.py --depths 4 --arms pre,span --seeds 1",
    ],
)
def test_a_benchmark_comes_to_its_end(command, tmp_path):
    script, *options = command.split()
    given = [sys.executable, script, *options, "--json", str(tmp_path / "figures.json")]
    run = subprocess.run(given, cwd=BENCHMARKS, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["machine"]["cores"] >= 1 and len(found) > 1
