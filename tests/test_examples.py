"""The examples run, at tiny size, and are as short as they say."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_a_llama_is_trained_saved_loaded_and_writes(tmp_path: Path) -> None:
    script = EXAMPLES / "train_llama.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 60
    command = [sys.executable, str(script), "--steps", "2", "--blocks", "2", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "2 llama layers rewired to span, depth rule 1/sqrt(L):init+lr" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("def ") or "\ndef " in ran.stdout
    assert (tmp_path / "model.safetensors").exists()
