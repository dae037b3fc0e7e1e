"""What the README shows a newcomer is true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_snippet_runs_as_printed(capsys: pytest.CaptureFixture) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(snippet, {})
    assert "no mismatches" in capsys.readouterr().out


def test_every_file_it_points_to_exists() -> None:
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).exists(), path


def test_it_is_short_and_names_the_two_commands() -> None:
    assert len(README.splitlines()) <= 120
    assert "make demo" in README and "make test" in README
