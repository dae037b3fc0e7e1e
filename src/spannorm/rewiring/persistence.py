"""Saving and loading a rewired model. Its `config.json` cannot be read as the family's own: see `RewiredConfig`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from spannorm.errors import InputError
from spannorm.rewiring.adopt import adopted_class

MODEL_TYPE = "spannorm_rewired"


class RewiredConfig:
    """The family's configuration, which also says how the model was rewired (`rewiring`).

    In memory it is the family's in all respects. On disk the family's keys stand one level down, under a model type
    that Transformers does not know and beside a vocabulary size that no configuration class takes: so the Auto classes
    and the family's own classes both refuse it, and none builds the family's model from a rewired model's weights.
    """

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        super().to_json_file(json_file_path, use_diff)  # type: ignore[misc]
        path = Path(json_file_path)
        config = json.loads(path.read_text(encoding="utf-8"))
        saved = {
            "model_type": MODEL_TYPE,
            "vocab_size": "none: this model was rewired, load it with spannorm.load",
            "architectures": config.pop("architectures", None),
            "transformers_version": config.get("transformers_version"),
            "rewiring": config.pop("rewiring"),
            "family": config.pop("model_type"),
            "config": config,
        }
        path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


class BornRewired:
    """A model class whose instances rewire themselves before their weights are loaded."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        from spannorm.rewiring.rewire import rewire  # which saves by this module's configuration

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
