"""The function that vLLM calls in each of its processes (entry point `vllm.general_plugins`) to find our models."""

from __future__ import annotations

import sys
from typing import Any


def register() -> None:
    """Let vLLM's Transformers backend build our models: `vllm serve DIR`, no `trust_remote_code`.

    The backend reads a folder's configuration with `AutoConfig` and builds the body with `AutoModel`. Both know our
    models once `spannorm.models` is imported. Its registry also looks for the configuration's class among Transformers'
    own (https://docs.vllm.ai/en/stable/models/supported_models/#transformers), so this function adds it there. vLLM may
    call it several times.
    """
    from vllm import ModelRegistry

    from spannorm.models import SpanNormForCausalLM

    # Transformers replaces its own entry in sys.modules while it is imported: take the one that the registry holds
    registry: Any = sys.modules[type(ModelRegistry).__module__]
    registry.transformers.SpanNormForCausalLM = SpanNormForCausalLM
