"""Loading a rewired model that `save_pretrained` wrote."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from spannorm.adopt import adopt, adopted_class
from spannorm.errors import InputError
from spannorm.inner_norms import READ_BY
from spannorm.named_code import check_configuration
from spannorm.rewiring.change import change
from spannorm.rewiring.configuration import MODEL_TYPE, RewiredConfig
from spannorm.rewiring.families import FAMILIES, Family
from spannorm.rewiring.found import family_of, plain_config
from spannorm.rewiring.layers import RewiredBody
from spannorm.rewiring.rewire import rewire
from spannorm.roles import Fused

AUTO = ("auto_map", "transformers_weights")
"""What a configuration has by which Transformers comes to `RewiredAuto`, and refuses the family's class."""

FOR_THE_MODEL = ("dtype", "torch_dtype", "attn_implementation", "experts_implementation", "quantization_config")
"""What a configuration has too, but `from_pretrained` sees to."""

_ROW: ContextVar[Family] = ContextVar("row")
"""Of the model that is being loaded: an audit cannot run inside `from_pretrained`, where weights have no values."""


@contextmanager
def born_with(row: Family) -> Iterator[None]:
    """Models of `BornRewired` classes are made by this row."""
    token = _ROW.set(row)
    try:
        yield
    finally:
        _ROW.reset(token)


class BornRewired:
    """A model class whose instances rewire themselves, inside `born_with`, before their weights are loaded."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        how = config.rewiring
        change(self, _ROW.get(), how["placement"], how["depth_rule"], False, options=how["options"])  # type: ignore[arg-type]


def load(path: str | Path, **kwargs: Any) -> Any:
    """Load a rewired model that `save_pretrained` wrote, with exactly the weights and the wiring it had.

    Args:
        path: a folder, or a name on the Hub.
        kwargs: as in Transformers' `from_pretrained` (`dtype`, `device_map`, `revision`, values of the
            configuration, a whole `config` …).

    Raises:
        InputError: the checkpoint or the `config` is not a rewired model's, its class is unknown, or its weights do not
            fit.
    """
    hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
    saved, _ = PreTrainedConfig.get_config_dict(path, **hub)
    if saved.get("model_type") != MODEL_TYPE:
        raise InputError(
            f"{path} holds a plain {saved.get('model_type')!r} model, not a rewired one: load it with from_pretrained."
        )
    cls = _class_of(saved["architectures"], f"{path} holds")
    config = copy.deepcopy(kwargs.pop("config", None)) or config_of(saved)
    if not isinstance(config, RewiredConfig):
        raise InputError(f"the `config` given for {path} does not say how the model was rewired: change its own.")
    _plain(config)
    override(config, kwargs)
    row = _row(cls, config)
    kwargs["key_mapping"] = renamed = {**_renamed(row), **(kwargs.get("key_mapping") or {})}
    with born_with(row):
        model, info = adopted_class(cls, BornRewired).from_pretrained(
            path, config=config, use_safetensors=True, output_loading_info=True, **kwargs
        )
    # save_pretrained would give old names back
    used = getattr(model, "_weight_conversions", [])  # absent where shards were loaded
    model._weight_conversions = [c for c in used if c.source_patterns[0] not in renamed]
    wrong = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind])
    if wrong:
        raise InputError(f"the weights in {path} do not fit the model its config.json describes: {', '.join(wrong)}.")
    model.__class__ = cls
    if model.base_model is model:
        adopt(model, RewiredBody)
    return model


def _class_of(architectures: list[str] | None, who: str) -> Any:
    name = (architectures or ["none"])[0]
    cls = _class_named(name)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise InputError(f"{who} a {name!r}, which this version of Transformers does not have.")
    return cls


def override(config: Any, kwargs: dict[str, Any]) -> None:
    """Take out of `kwargs` the configuration's own values, as Transformers does, and put them into it."""
    for key in [key for key in kwargs if hasattr(config, key) and key not in FOR_THE_MODEL]:
        setattr(config, key, kwargs.pop(key))


def _plain(config: Any) -> None:
    """Take off what leads Transformers to `RewiredAuto`: from here on the family's class loads the weights."""
    for name in AUTO:
        config.__dict__.pop(name, None)


def _row(cls: Any, config: Any) -> Family:
    """The row of a configuration's family; of one that the table does not have, by way of a model without weights."""
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type]
    with torch.device("meta"):
        return family_of(cls(plain_config(config)))


def _class_named(name: str) -> Any:
    """A model class of Transformers, or one that somebody registered for its Auto classes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    registered = {cls.__name__: cls for cls in MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.values()}
    return getattr(transformers, name, None) or registered.get(name)


def config_of(saved: dict[str, Any]) -> Any:
    """The family's configuration, with `rewiring`, from what `config.json` says."""
    check_configuration(saved, "config.json")
    keys = saved.get("config", saved)  # up to 0.1 the family's keys stood one level down
    ours = ("model_type", "family", "rewiring", *AUTO)
    config = AutoConfig.for_model(saved["family"], **{k: v for k, v in keys.items() if k not in ours})
    config.rewiring = saved["rewiring"]
    adopt(config, RewiredConfig)
    return config


class RewiredAuto:
    """How the Auto classes open a rewired model's folder (`trust_remote_code=True`): as `load` does."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: the folder says it."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """The configuration where none is given, and otherwise the model."""
        for key in ("trust_remote_code", "adapter_kwargs", "name_or_path"):
            kwargs.pop(key, None)
        if config is not None:
            return load(path, config=config, **kwargs)
        both = kwargs.pop("return_unused_kwargs", False)
        saved, unused = PreTrainedConfig.get_config_dict(path, **kwargs)
        found = config_of(saved)
        for name in AUTO:
            setattr(found, name, saved[name])
        found._name_or_path = str(path)
        override(found, unused)
        return (found, unused) if both else found

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A new model, rewired as the configuration says: `AutoModelForCausalLM.from_config` comes here."""
        config, how = copy.deepcopy(config), config.rewiring
        _plain(config)
        model = _class_of(config.architectures, "the configuration is of")._from_config(config, **kwargs)
        rewire(model, how["placement"], depth_rule=how["depth_rule"], **how["options"])
        return model


def _renamed(family: Family) -> dict[str, str]:
    """Where inner norms stood in 0.1, inside their projections, and where they stand: beside them."""
    names = {}
    for path, kind in family.matrices.items() if not family.found else ():
        owner = path.rpartition(".")[0]
        for role in kind.roles if isinstance(kind, Fused) else (kind,):
            if role in READ_BY:
                names[f"{path}.input_norm"] = f"{owner}.{role}_norm"
            names[f"{path}.{role}_norm"] = f"{owner}.{role}_norm"
            if role == "attn_out":
                names[f"{path}.head_scale"] = f"{owner}.head_scale_norm.weight"
    return names
