"""`spannorm.load`: any model that this library saved, ours or rewired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from spannorm import models, rewiring
from spannorm.errors import InputError


def load(path: str | Path, **kwargs: Any) -> Any:
    """Load a model that `save_pretrained` wrote, with exactly the weights and the wiring it had.

    Args:
        path: a folder, or a name on the Hub, of a `SpanNormForCausalLM`, a `SpanNormModel`, one of our classification
            heads or a rewired model.
        kwargs: those of Transformers' `from_pretrained` (`dtype`, `device_map`, `revision` …).

    Raises:
        InputError: the checkpoint is neither, its class is unknown, or its weights do not fit.
    """
    hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
    saved, _ = PreTrainedConfig.get_config_dict(path, **hub)
    if saved.get("model_type") != models.SpanNormConfig.model_type:
        return rewiring.load(path, **kwargs)
    name = (saved.get("architectures") or [models.SpanNormForCausalLM.__name__])[0]
    if name not in models.__all__:
        raise InputError(f"{path} holds a {name!r}, a class of somebody's own: load it with {name}.from_pretrained.")
    return getattr(models, name).from_pretrained(path, **kwargs)
