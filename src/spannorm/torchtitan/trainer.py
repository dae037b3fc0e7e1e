"""torchtitan's trainer with one more section, `placement`, and the optimizer groups that a placement needs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer as TitanTrainer

from spannorm.torchtitan.block import PlacementConfig
from spannorm.torchtitan.hugging_face import StateDictAdapter, hugging_face_config
from spannorm.torchtitan.model import as_ours
from spannorm.torchtitan.sublayers import copied


class Optimizers(OptimizersContainer):
    """torchtitan's optimizers. Each group is split by the depth rule's factors on rate, decay and Adam's ε."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _build_param_groups(model: nn.Module, param_group_configs: Any, impl_kwargs: Any) -> Any:
        groups, patterns = OptimizersContainer._build_param_groups(model, param_group_configs, impl_kwargs)
        factors: Any = getattr(model, "optimizer_factors", {})
        split: dict[str, list[Any]] = {}
        said: dict[str, list[str]] = {}
        for optimizer, whole in groups.items():
            for group, pattern in zip(whole, patterns[optimizer], strict=True):
                for part in _split(group, factors):
                    split.setdefault(optimizer, []).append(part)
                    said.setdefault(optimizer, []).append(pattern)
        return split, said


def _split(group: dict[str, Any], factors: dict[str, tuple[float, float, float]]) -> list[dict[str, Any]]:
    parts: dict[tuple[float, float, float], tuple[list[Any], list[str]]] = {}
    for parameter, name in zip(group["params"], group["param_names"], strict=True):
        members = parts.setdefault(factors.get(name, (1.0, 1.0, 1.0)), ([], []))
        members[0].append(parameter)
        members[1].append(name)
    made = []
    for (rate, decay, eps), (parameters, names) in parts.items():
        part = {**group, "params": parameters, "param_names": names}
        for key, factor in (("lr", rate), ("weight_decay", decay), ("eps", eps)):
            if key in part:
                part[key] *= factor
            elif factor not in (0.0, 1.0) or (key == "weight_decay" and factor != 1.0):
                part[key] = _defaults(key) * factor
        made.append(part)
    return made


def _defaults(key: str) -> float:
    """AdamW's value for groups that do not set one."""
    return {"lr": 1e-3, "weight_decay": 1e-2, "eps": 1e-8}[key]


class Trainer(TitanTrainer):
    """torchtitan's trainer. A run with `checkpoint.last_save_in_hf` ends with a folder for `from_pretrained`."""

    @dataclass(kw_only=True, slots=True)
    class Config(TitanTrainer.Config):
        placement: PlacementConfig = field(default_factory=PlacementConfig)

    def train(self) -> None:
        super().train()
        checkpoint: Any = self.config.checkpoint
        if checkpoint.enable and checkpoint.last_save_in_hf and torch.distributed.get_rank() == 0:
            manager: Any = self.checkpointer
            folder = Path(manager._create_checkpoint_id(self.step))
            config = hugging_face_config(self.model_config)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for file in Path(self.config.hf_assets_path).glob("*"):
                if re.fullmatch(r"(tokenizer|special_tokens|vocab|merges|chat_template).*", file.name):
                    shutil.copy(file, folder)


def placed_spec(spec: ModelSpec) -> ModelSpec:
    """A torchtitan model for our trainer: the same sizes and parallelisms, without a placement yet."""
    return replace(spec, name=f"spannorm_{spec.name}", model=as_ours(spec.model), state_dict_adapter=StateDictAdapter)


def with_placement(config: TitanTrainer.Config, placement: PlacementConfig | None = None) -> Trainer.Config:
    """A torchtitan configuration for our trainer, with a placement (`span` if none is given)."""
    assert config.model_spec is not None
    more: dict[str, Any] = {"model_spec": placed_spec(config.model_spec), "placement": placement or PlacementConfig()}
    if type(config.optimizer) is OptimizersContainer.Config:
        more["optimizer"] = copied(config.optimizer, Optimizers.Config)
    made: Trainer.Config = copied(config, Trainer.Config, **more)
    return made
