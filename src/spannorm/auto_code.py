"""The file in a saved model's folder with which Transformers' Auto classes open it before spannorm is imported."""

from __future__ import annotations

from pathlib import Path

AUTO_CODE = "modeling_spannorm"
"""Name of the file. `trust_remote_code=True` runs it; Transformers names the package if it is not installed."""

_TEXT = '''"""This folder holds a model of spannorm (`pip install spannorm`): open it with `spannorm.load`."""

from spannorm.models import (
    SpanNormConfig,
    SpanNormForCausalLM,
    SpanNormForSequenceClassification,
    SpanNormForTokenClassification,
    SpanNormModel,
)
from spannorm.rewiring import RewiredAuto
'''


def write_auto_code(folder: Path) -> None:
    """Put the file into a saved model's folder."""
    (folder / f"{AUTO_CODE}.py").write_text(_TEXT, encoding="utf-8")
