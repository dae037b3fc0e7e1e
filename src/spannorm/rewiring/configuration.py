"""The configuration of a rewired model. Its `config.json` cannot be read as the family's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
