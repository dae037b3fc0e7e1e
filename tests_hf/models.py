"""The models that Transformers' suites are run on, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig

from spannorm.models import SpanNormConfig, SpanNormForCausalLM, SpanNormModel
from spannorm.rewiring.families import FAMILIES
from spannorm.rewiring.loading import BornRewired, born_with, config_of

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Those of Transformers' own tiny causal models."""

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

OURS: dict[str, dict[str, Any]] = {
    "pre": {"placement": "pre"},
    "span": {"placement": "span"},
    "siamese": {"placement": "siamese"},
    "hybrid": {"placement": "hybrid"},
    "mixture": {"placement": "span", **EXPERTS},
}
REWIRED = "rewired llama"
MODELS = (*OURS, REWIRED)


class Rewired(BornRewired):
    """A Llama that is rewired whenever it is made: the suites make models from configurations all the time."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        with born_with(FAMILIES["llama"]):
            super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `spannorm.load`, of whatever a suite left in the folder."""
        path = kwargs.pop("pretrained_model_name_or_path", path)
        if path is not None and "config" not in kwargs:
            saved = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
            kwargs["config"] = config_of(saved)
        return super().from_pretrained(path, *args, **kwargs)  # type: ignore[misc]


# Under the names of the family's own, by which Transformers tells what they are for.
class LlamaModel(Rewired, transformers.LlamaModel):
    pass


class LlamaForCausalLM(Rewired, transformers.LlamaForCausalLM):
    pass


class ModelTester:
    """What the suites ask a tester for: a configuration, inputs, and the sizes to check outputs against."""

    is_training = True
    batch_size, seq_length = 13, 7

    def __init__(self, name: str) -> None:
        self.name = name
        for size, value in SIZES.items():
            setattr(self, size, value)
        rewired = name == REWIRED
        self.config_class = LlamaConfig if rewired else SpanNormConfig
        self.base_model_class = LlamaModel if rewired else SpanNormModel
        self.causal_lm_class = LlamaForCausalLM if rewired else SpanNormForCausalLM

    @property
    def all_model_classes(self) -> tuple[Any, Any]:
        return self.base_model_class, self.causal_lm_class

    def get_config(self) -> Any:
        if self.name != REWIRED:
            return SpanNormConfig(**SIZES, **OURS[self.name])
        rewiring = {"placement": "span", "depth_rule": "1/sqrt(L)", "options": {}}
        return LlamaConfig(**SIZES, rewiring=rewiring)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))  # type: ignore[attr-defined]
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
