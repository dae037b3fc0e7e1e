"""What a value may be: its declared kind and its limits. There is one check for all values, and one message per rule.

Recipes declare both at each field (`limited`); the model's keys are in a table (`spannorm.model_keys`).
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping
from dataclasses import Field, dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

from spannorm.errors import InputError, shorter, shown, unknown


@dataclass(frozen=True)
class Limits:
    """The range of a number, or the known texts. Every number must also be finite."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    known: tuple[str, ...] = ()

    def check(self, value: Any, where: str) -> None:
        """Raise an `InputError` that names the limit that a value breaks."""
        if isinstance(value, str) and self.known and value not in self.known:
            raise unknown(where.strip("`"), value, self.known)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        for broken, rule in (
            (isinstance(value, float) and not math.isfinite(value), "be a finite number"),
            (value < self.least == 0, "not be negative"),
            (value < self.least, f"be at least {self.least}"),
            (value <= self.above, f"be above {self.above}"),
            (value > self.most, f"be at most {self.most}"),
            (value >= self.below, f"be below {self.below}"),
        ):
            if broken:
                raise InputError(f"{where} must {rule}; got {shown(value)}.")


NONE = Limits()
_KEY = "limits"


def limited(default: Any, **limits: Any) -> Any:
    """A dataclass field whose values must be within `Limits(**limits)`."""
    return field(default=default, metadata={_KEY: Limits(**limits)})


def limits_of(declared: Field[Any]) -> Limits:
    """The limits of a field."""
    limits: Limits = declared.metadata.get(_KEY, NONE)
    return limits


def checked(kind: Any, value: Any, where: str, limits: Limits = NONE) -> Any:
    """The value as its kind, within its limits.

    Args:
        kind: a type as in an annotation: `int`, `float | None`, `tuple[str, ...]`, `Mapping[str, float]`, a `Literal`,
            or `Any`. A float may be given as a whole number; an int may not be given as true or false.
        where: the name of the value in the message.

    Raises:
        InputError: another kind, or outside the limits.
    """
    kinds = get_args(kind) if _is_union(kind) else (kind,)
    for one in kinds:
        fits, found = _as(one, value, where, limits)
        if fits:
            limits.check(found, where)
            return found
    hint = ""
    if isinstance(value, bool) and str in kinds:
        hint = " YAML reads yes, no, on and off as true and false: put it in quotes."
    raise InputError(f"{where} must be {words(kind)}; got {shown(value)}.{hint}")


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _as(kind: Any, value: Any, where: str, limits: Limits) -> tuple[bool, Any]:
    """Whether a value is of one kind, and the value as that kind."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        if isinstance(value, str) and value not in inside:
            raise unknown(where.strip("`"), value, inside)
        return value in inside, value
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            return False, value
        return True, origin(checked(inside[0], item, f"{where}[{i}]", limits) for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return False, value
        named = {(k if isinstance(k, str) else shown(k)): v for k, v in value.items()}
        return True, {k: checked(inside[1], v, f"{where}.{shorter(k)}") for k, v in named.items()}
    if kind is Any:
        return True, number_or_text(value)
    if kind in (None, type(None)):
        return value is None, value
    if kind is float and not isinstance(value, bool):
        value = number_or_text(value)
        if isinstance(value, int | float):
            try:
                return True, float(value)
            except OverflowError:
                raise InputError(f"{where} must be a finite number; got {shown(value)}.") from None
    if kind is str and isinstance(value, str) and not _is_unicode(value):
        raise InputError(f"{where} must be text; {shown(value)} has half a surrogate pair.")
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def number_or_text(value: Any) -> Any:
    """YAML 1.1 reads `6e-3` as text, but the user means the number. Also inside lists and mappings."""
    if isinstance(value, Mapping):
        return {(k if isinstance(k, str) else shown(k)): number_or_text(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(number_or_text(v) for v in value)
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def words(kind: Any) -> str:
    """The name of a kind in a message."""
    if _is_union(kind):
        return " or ".join(dict.fromkeys(words(k) for k in get_args(kind)))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    origin = get_origin(kind)
    if origin is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if origin is not None:
        return "a list" if origin in (tuple, list) else "a mapping"
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def finite(value: Any) -> Any:
    """The value with every NaN and infinity replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
