"""Only code that the caller named may run: what a checkpoint's file may ask for, and what only a caller may."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spannorm.errors import InputError

SAFE = (None, "eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")
"""Implementations that are part of PyTorch and Transformers. Any other may be downloaded from the Hub and run."""
_KEYS = ("attn_implementation", "experts_implementation")


def check_configuration(saved: Any, where: object) -> None:
    """Refuse a saved configuration that chooses code outside the installed libraries.

    Raises:
        InputError: names the key and its value.
    """
    if isinstance(saved, list):
        for item in saved:
            check_configuration(item, where)
    if not isinstance(saved, Mapping):
        return
    for key, value in saved.items():
        if str(key).strip("_").removesuffix("_internal") in _KEYS:
            for name in value.values() if isinstance(value, Mapping) else (value,):
                if name not in SAFE:
                    raise InputError(
                        f"{where}: `{key}` asks for {name!r}, which may be code from the Hub: take the key out of "
                        f"the file, and give {_KEYS[0]}=… yourself where you load the model and trust it."
                    )
        elif key == "use_kernels" and value:
            raise InputError(f"{where}: `use_kernels` runs code from the Hub: take the key out of the file.")
        else:
            check_configuration(value, where)
