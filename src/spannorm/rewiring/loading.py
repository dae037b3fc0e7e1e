"""Loading a rewired model that `save_pretrained` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from spannorm.errors import InputError
from spannorm.rewiring.adopt import adopted_class
from spannorm.rewiring.configuration import MODEL_TYPE
from spannorm.rewiring.rewire import rewire


class BornRewired:
    """A model class whose instances rewire themselves before their weights are loaded."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        how = config.rewiring
        rewire(self, how["placement"], depth_rule=how["depth_rule"], init=False, **how["options"])  # type: ignore[arg-type]


def load(path: str | Path, **kwargs: Any) -> Any:
    """Load a rewired model that `save_pretrained` wrote, with exactly the weights and the wiring it had.

    Args:
        path: a folder, or a name on the Hub.
        kwargs: those of Transformers' `from_pretrained` (`dtype`, `device_map`, `revision` …).

    Raises:
        InputError: the checkpoint is not a rewired model's, its class is unknown, or its weights do not fit.
    """
    hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
    saved, _ = PreTrainedConfig.get_config_dict(path, **hub)
    if saved.get("model_type") != MODEL_TYPE:
        raise InputError(
            f"{path} holds a plain {saved.get('model_type')!r} model, not a rewired one: load it with from_pretrained."
        )
    name = (saved["architectures"] or ["none"])[0]
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise InputError(f"{path} holds a {name!r}, which this version of Transformers does not have.")
    config = AutoConfig.for_model(saved["family"], **saved["config"])
    config.rewiring = saved["rewiring"]
    model, info = adopted_class(cls, BornRewired).from_pretrained(
        path, config=config, use_safetensors=True, output_loading_info=True, **kwargs
    )
    wrong = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise InputError(f"the weights in {path} do not fit the model its config.json describes: {', '.join(wrong)}.")
    model.__class__ = cls
    return model
