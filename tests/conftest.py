"""What every test stands on: checked shapes, one thread, no network, and a model small enough to build in passing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from spannorm.models import SpanNormConfig

# Shapes in signatures are checked under pytest and nowhere else. The hook must stand before the modules are imported.
install_import_hook(["spannorm.norms", "spannorm.placements"], "beartype.beartype")

# Read once, when Transformers is imported: by the tests that need it, later than this.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# Without a GPU Triton's kernels run in its interpreter; read when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ["train_fixtures"]  # shared by tests/train and the command line's tests; imported after the hook

torch.set_num_threads(1)  # the models are tiny, and a worker of pytest-xdist has one core

# No deadline: a time limit is no property. Derandomized: a failure is the same for everyone.
hypothesis.settings.register_profile("spannorm", deadline=None, database=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("spannorm")

TINY: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""Three blocks, so that there is a first, a middle and a last; fewer key heads than query heads; no two sizes alike."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test's inputs are the same whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_config():
    """Make a `SpanNormConfig` of three small blocks; keywords override."""
    from transformers.utils import logging

    from spannorm.models import SpanNormConfig

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def make(**overrides: Any) -> SpanNormConfig:
        return SpanNormConfig(**{**TINY, **overrides})

    return make
