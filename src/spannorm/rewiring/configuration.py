"""The configuration of a rewired model. Its folder opens as the family's configuration, not as the family's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spannorm.auto_code import AUTO_CODE, write_auto_code

MODEL_TYPE = "spannorm_rewired"
REFUSAL = "this model was rewired, load it with spannorm.load: not a file.safetensors"
"""Transformers looks for the weights under this name. It finds none, and its error quotes it."""


class RewiredConfig:
    """The family's configuration, which also says how the model was rewired (`rewiring`).

    In memory it is the family's in all respects. On disk it has its own model type, which the Auto classes know from
    the file beside it. It also names a weights file that does not exist. So PEFT and others can read the configuration
    as the family's, but cannot build the family's model from a rewired model's weights.
    """

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        write_auto_code(Path(save_directory))

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        super().to_json_file(json_file_path, use_diff)  # type: ignore[misc]
        path = Path(json_file_path)
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved["family"] = saved.pop("model_type")
        auto_map = dict.fromkeys(("AutoConfig", _auto_of(saved.get("architectures"))), f"{AUTO_CODE}.RewiredAuto")
        saved |= {"model_type": MODEL_TYPE, "transformers_weights": REFUSAL, "auto_map": auto_map}
        path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _auto_of(architectures: list[str] | None) -> str:
    """The Auto class that opens a model of this class."""
    name = (architectures or ["ForCausalLM"])[0]
    for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        if name.endswith(f"For{head}"):
            return f"AutoModelFor{head}"
    body = name.endswith("Model") and not name.endswith("HeadModel")
    return "AutoModel" if body else "AutoModelForCausalLM"
