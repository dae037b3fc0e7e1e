"""The names for `--config`: every configuration in torchtitan's registries of `llama3` and `qwen3`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchtitan.models.llama3 import config_registry as llama3
from torchtitan.models.qwen3 import config_registry as qwen3

from spannorm.torchtitan.trainer import Trainer, with_placement

_REGISTRIES: dict[str, ModuleType] = {"llama3": llama3, "qwen3": qwen3}


def _names() -> list[str]:
    return [n for prefix, registry in _REGISTRIES.items() for n in vars(registry) if n.startswith(f"{prefix}_")]


def __dir__() -> list[str]:
    return _names()


def __getattr__(name: str) -> Callable[[], Trainer.Config]:
    theirs: Any = getattr(_REGISTRIES.get(name.split("_")[0]), name, None)
    if name not in _names() or not callable(theirs):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lambda: with_placement(theirs())
