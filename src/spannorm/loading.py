"""`spannorm.load`: any model that this library saved, our own or a rewired one."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from spannorm import models, rewiring
from spannorm.errors import InputError
from spannorm.files import read_json
from spannorm.named_code import check_configuration
from spannorm.text import line


def load(path: str | Path, **kwargs: Any) -> Any:
    """Load a model that `save_pretrained` wrote, with exactly the weights and the wiring it had.

    Args:
        path: a folder, or a name on the Hub, of a `SpanNormForCausalLM`, a `SpanNormModel`, one of our classification
            heads or a rewired model.
        kwargs: as in Transformers' `from_pretrained` (`dtype`, `device_map`, `revision` …).

    Raises:
        InputError: the checkpoint is none of these, is damaged, asks for code that the caller did not name, or its
            weights do not fit.
    """
    with opening(path):
        hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
        saved, _ = PreTrainedConfig.get_config_dict(path, **hub)
        check_configuration(saved, path)
        if saved.get("model_type") != models.SpanNormConfig.model_type:
            return rewiring.load(path, **kwargs)
        name = (saved.get("architectures") or [models.SpanNormForCausalLM.__name__])[0]
        if name not in models.__all__:
            raise InputError(f"{path} holds a {name!r}, a class of somebody's own: load it by that class.")
        kind: Any = getattr(models, name)
        told = kwargs.pop("output_loading_info", False)
        model, info = kind.from_pretrained(path, output_loading_info=True, **kwargs)
        missing = sorted(map(str, info["missing_keys"]))
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise InputError(f"the weights in {path} lack {shown}: the folder is damaged or not whole.")
        return (model, info) if told else model


@contextmanager
def opening(path: str | Path) -> Iterator[None]:
    """Within the block, Transformers' errors about a damaged folder become an `InputError` that names the folder."""
    folder = Path(path)
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.exists() and not stat.S_ISREG(file.stat().st_mode) and not file.is_dir():
                raise InputError(f"{file} is not a regular file: a saved model consists of files and folders.")
        read_json(folder / "config.json", dict)
    try:
        yield
    except (InputError, torch.OutOfMemoryError, MemoryError, ImportError):
        raise
    except Exception as error:  # the readers behind it raise nearly every kind
        reason = line(next(iter(str(error).strip().splitlines()), ""))[:300]
        raise InputError(
            f"{path} cannot be loaded ({type(error).__name__}: {reason}): give the folder that save_pretrained wrote, "
            "with all its files as they were."
        ) from error
