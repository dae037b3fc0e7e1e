"""The command line's TARGET: a configuration, a folder, a Hub name, a family, or a function that builds a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spannorm.auditing.families import default_configuration
from spannorm.auditing.shrink import VOCABULARY, depth_of, shrink
from spannorm.errors import InputError
from spannorm.named_code import check_configuration

TOKENS = (2, 13)
"""Sequences and tokens for a model of text. No other size is 13, so an axis of that length is the tokens' axis."""


@dataclass
class Target:
    """A model to audit, and a function that builds it with another depth."""

    name: str
    model: nn.Module
    config: Any = None
    """As it was given, not shrunk."""
    shrunk: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    build: Callable[[int], nn.Module] | None = None
    """Number of blocks → a new model; None if it cannot be built again."""


def build_small(config: Any, depth: int, seed: int = 0) -> tuple[nn.Module, Mapping[str, tuple[Any, Any]]]:
    """A small model for a configuration of Transformers. The random generator is as before afterwards.

    Raises:
        InputError: Transformers cannot build it; the message has Transformers' text.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            small, changed = shrink(config, depth)
            model = class_for(small)(small).float()
        except Exception as error:  # whatever a stranger's code raises
            raise InputError(
                f"{type(config).__name__} cannot be built small: {_words(error)}. Give a smaller configuration of your "
                "own, or a function that builds the model."
            ) from error
    return model.eval(), changed


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def class_for(config: Any) -> Callable[[Any], nn.Module]:
    """The class that a configuration names, or the first automatic one that takes it; as a function that builds it."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            kind = getattr(transformers, name)
            if isinstance(config, kind.config_class):
                return kind._from_config
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification", "AutoModel"):
        kind = getattr(transformers, auto)
        if type(config) in kind._model_mapping:
            return lambda c: kind.from_config(c, trust_remote_code=False, attn_implementation="eager")
    raise InputError(f"Transformers has no model for {type(config).__name__}.")


def resolve(target: str, depth: int = 4) -> Target:
    """Find and build the model that the command line names.

    Args:
        target: a folder with `config.json`, such a file, the name of a family of Transformers (`llama`), a name on the
            Hub (`Qwen/Qwen3-8B`; only its configuration is downloaded), or `module:function`.
        depth: blocks of the small model.

    Raises:
        InputError: it does not exist, or cannot be built.
    """
    module, colon, function = target.partition(":")
    if colon and not Path(target).exists():
        return _from_function(target, module, function)
    try:
        config = _configuration(target)
    except InputError:
        raise
    except Exception as error:  # a default configuration that does not pass its own validation
        raise InputError(f"{target} has no default configuration: {_words(error)}") from error
    model, changed = build_small(config, depth)
    return Target(target, model, config, changed, lambda d: build_small(config, d)[0])


def _from_function(target: str, module: str, function: str) -> Target:
    import sys

    sys.path.insert(0, str(Path.cwd()))
    try:
        build = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"there is no function {target!r}: {error}. Give `module:function`.") from error
    finally:
        sys.path.pop(0)
    model = build() if callable(build) else build
    if not isinstance(model, nn.Module):
        raise InputError(f"{target} must return a torch module; got {type(model).__name__}.")
    return of_model(model, target)


def of_model(model: nn.Module, name: str | None = None) -> Target:
    """A model object as a target. If it is one of Transformers, small ones can be built from its configuration."""
    config = getattr(model, "config", None)
    kind = type(model)
    if config is None or not hasattr(kind, "_from_config") or depth_of(config) is None:
        return Target(name or kind.__name__, model, config)

    def build(depth: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                return kind._from_config(shrink(config, depth)[0]).float().eval()  # type: ignore[attr-defined]
            except Exception as error:  # whatever a stranger's code raises
                raise InputError(f"{kind.__name__} cannot be built small: {_words(error)}.") from error

    return Target(name or kind.__name__, model, config, {}, build)


def _configuration(target: str) -> Any:
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = Path(target)
    if not path.exists() and target in CONFIG_MAPPING:
        return default_configuration(target)
    if not path.exists() and (target.count("/") != 1 or target.startswith((".", "/"))):
        raise InputError(
            f"no configuration at {target!r}: give a folder with config.json, a family such as llama, a Hub name such "
            "as Qwen/Qwen3-8B, or module:function."
        )
    try:
        check_configuration(PreTrainedConfig.get_config_dict(path if path.exists() else target)[0], target)
        return AutoConfig.from_pretrained(path if path.exists() else target, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"no configuration could be read from {target!r}: {' '.join(str(error).split())[:200]}"
        ) from error


def made_up_inputs(model: nn.Module, config: Any) -> dict[str, Any]:
    """Made-up inputs for a model of Transformers: tokens, or an image; for an encoder–decoder, tokens for both.

    Raises:
        InputError: the model takes neither; give `made_up_inputs`.
    """
    main = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(1)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    size = min(getattr(text, "vocab_size", VOCABULARY) or VOCABULARY, 100)
    ids = torch.randint(min(10, size - 1), size, TOKENS, generator=generator)
    if main == "pixel_values":
        side = getattr(getattr(config, "vision_config", config), "image_size", None) or 32
        side = side if isinstance(side, int) else side[0]
        return {main: torch.randn(2, getattr(config, "num_channels", 3), side, side, generator=generator)}
    if main == "input_ids":
        inputs: dict[str, Any] = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids.flip(1)
        if hasattr(text, "use_cache"):
            inputs["use_cache"] = False
        return inputs
    raise InputError(
        f"{type(model).__name__} does not say what it takes: give made_up_inputs, a tensor, tuple or dict."
    )
