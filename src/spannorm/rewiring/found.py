"""The row of a model's family: from the table, or from an audit of a small model of the same configuration.

A row that an audit found is tested before it is used. A model of full depth and small width, with changed parameters,
is rewired to its own wiring. It must give the same results as before: in eval mode, in training mode with its dropouts,
its gradient, and with a cache. The requested change is then tried on a small model first, so that the real model is
unchanged if something is refused.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spannorm.auditing.inspection import audit_target
from spannorm.auditing.row import family_fields
from spannorm.auditing.shrink import depth_of, shrink
from spannorm.auditing.targets import Target, made_up_inputs
from spannorm.errors import InputError
from spannorm.rewiring.change import change
from spannorm.rewiring.families import FAMILIES, Family
from spannorm.rewiring.report import Init
from spannorm.rewiring.surgery import find

DEPTH = 4
"""Blocks of the model that is audited; one of each kind, where there are no more kinds."""
ROUNDING = 1e-5
"""The largest difference of logits that is allowed, relative to the largest one: sums may run in another order."""

_KNOWN: dict[tuple[type, str], Family | InputError] = {}


def family_of(model: PreTrainedModel) -> Family:
    """The row of a model's family.

    Raises:
        InputError: there is none, and the audit found no wiring that can be changed.
    """
    family = model.config.model_type
    if family in FAMILIES:
        return FAMILIES[family]
    if (alias := _alias(model)) is not None:
        return FAMILIES[alias]
    key = _class(model), plain_config(model.config).to_json_string(use_diff=False)
    if key not in _KNOWN:
        try:
            _KNOWN[key] = audited(model)
        except InputError as error:
            _KNOWN[key] = error
        except Exception as error:  # whatever a stranger's code raises
            _KNOWN[key] = InputError(f"{type(error).__name__}: {error}.")
    found = _KNOWN[key]
    if isinstance(found, InputError):
        raise InputError(
            f"{family!r} has no row in spannorm.rewiring.FAMILIES, and an audit found none: {found} Nothing was "
            f"changed. A row of your own: FAMILIES[{family!r}] = Family(norms={{…}}, attention=…, final_norm=…), as in "
            "docs/rewire.md."
        ) from found
    return found


def rehearse(
    model: PreTrainedModel, row: Family, placement: str, depth_rule: str | None, init: Init | None, options: Any
) -> None:
    """Rewire a small model of the same configuration first.

    Raises:
        InputError: the same as for the real model, or the small model does not run afterwards.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        warnings.simplefilter("ignore")
        small = _small(model, DEPTH)
        change(small, row, placement, depth_rule, init, 0, options)
        small.eval()
        with torch.no_grad():
            logits = _logits(small, _inputs(small), use_cache=False)
    if not bool(logits.isfinite().all()):
        raise InputError(
            f"a small {type(model).__name__} rewired to {placement!r} returns numbers that are not finite."
        )


def _alias(model: PreTrainedModel) -> str | None:
    """The family in the table whose classes a model with another name uses."""
    home = type(model.base_model).__module__
    for name, row in FAMILIES.items():
        if home == f"transformers.models.{name}.modeling_{name}":
            layers: Any = find(model.base_model, row.layers)
            return name if layers and type(layers[0]).__module__ == home else None
    return None


def _class(model: PreTrainedModel) -> Any:
    """Its own class, where it is about to be rewired as it is built."""
    return getattr(type(model), "adopted", type(model))


def plain_config(config: Any) -> Any:
    """A copy of a configuration without `rewiring`."""
    plain = copy.deepcopy(config)
    plain.__class__ = getattr(type(plain), "adopted", type(plain))
    if hasattr(plain, "rewiring"):
        del plain.rewiring
    return plain


def _small(model: PreTrainedModel, depth: int) -> Any:
    """A small new model of the same class and configuration, on CPU in fp32."""
    kind = _class(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            return kind._from_config(shrink(plain_config(model.config), depth)[0]).float()
        except Exception as error:  # whatever a stranger's code raises
            raise InputError(f"{kind.__name__} cannot be built small: {type(error).__name__}: {error}.") from error


def audited(model: PreTrainedModel) -> Family:
    """The row that an audit finds for a model's class and configuration, tested on a small model. Ignores the table.

    Args:
        model: it is neither run nor changed, so it may be on meta device.

    Raises:
        InputError: there is none.
    """
    with torch.device("cpu"):
        small = _small(model, DEPTH).eval()
        found = audit_target(Target(type(small).__name__, small))
        row = Family(**family_fields(found, small))
        return replace(row, off=_hold(_small(model, depth_of(model.config) or DEPTH), row))


def _inputs(model: Any) -> dict[str, Any]:
    return {k: v for k, v in made_up_inputs(model, model.config).items() if k != "use_cache"}


def _logits(model: Any, inputs: Any, **more: Any) -> Tensor:
    taken = inspect.signature(type(model).forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    out = model(**inputs, **{k: v for k, v in more.items() if k in taken or open_ended})
    return out[0] if isinstance(out, tuple) else out.logits if "logits" in out else next(iter(out.values()))


def _hold(before: Any, row: Family) -> float:
    """Rewire a small model to its own wiring: it must give the same results. Returns the largest relative difference.

    Raises:
        InputError: the difference is larger than rounding.
    """
    worst = 0.0
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        with torch.no_grad():
            for p in before.parameters():
                p.add_(0.1 * torch.randn_like(p) * (p.float().std() if p.ndim > 1 else 1.0))
        after = copy.deepcopy(before)
        change(after, row, row.placement, "none", False, 0, row.options)
        for words, look in (("in eval mode", _in_eval), ("in training mode", _in_training), ("with a cache", _cached)):
            wanted, got = look(before), look(after)
            same = wanted.shape == got.shape
            off = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-30)) if same else math.inf
            if not off <= ROUNDING:
                raise InputError(
                    f"rewired to its own wiring, a small {type(before).__name__} computes something else {words}, off "
                    f"by {off:.1e} of the largest value."
                )
            worst = max(worst, off)
    return worst


def _in_eval(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return _logits(model, _inputs(model), use_cache=False)


def _in_training(model: Any) -> Tensor:
    """The gradient of the embedding, which passes through every block, with the same dropout masks."""
    model.train()
    torch.manual_seed(2)
    logits = _logits(model, _inputs(model), use_cache=False)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    table = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad((logits * weights).sum(), table)
    return torch.cat([gradient.flatten(), logits.detach().flatten()])


def _cached(model: Any) -> Tensor:
    """Logits of tokens that were generated with a cache, if the model supports one."""
    model.eval()
    if not hasattr(model, "generate") or not model.can_generate():
        return torch.zeros(1)
    ids = _inputs(model)["input_ids"][:, :6]
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    try:
        out = model.generate(ids, output_logits=True, **how)
    except Exception as error:  # some cannot, and then the rewired one cannot either, by the same words
        return torch.tensor([float(sum(map(ord, f"{type(error).__name__}")))])
    return torch.stack([*out.logits])
