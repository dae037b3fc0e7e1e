"""One version, wherever it stands."""

import re
from pathlib import Path

import spannorm
from spannorm.train.environment import RUNS_SINCE, versions

ROOT = Path(__file__).parents[1]


def test_the_citation_and_the_newest_section_of_the_changelog_name_this_version() -> None:
    cited = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    sections = re.findall(r"^## (\d[\d.]*\d)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == sections[:1] == [spannorm.__version__] == [versions()["spannorm"]]
    assert RUNS_SINCE in sections
