"""The only YAML reader: plain values, no key twice, no aliases that expand to much more than the text."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from spannorm.errors import InputError, shown

_LONGEST = 1 << 20  # characters
_MOST_VALUES = 100_000
"""With every alias counted as often as it stands there."""
_LARGEST = 1 << 63
_DEEPEST = 100


class _Loader(yaml.SafeLoader):
    """null, booleans, numbers, text, lists, mappings; a date is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in kinds if tag != "tag:yaml.org,2002:timestamp"]
        for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: how
        for tag, how in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or str(tag).rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise InputError("it is nested too deeply.")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise InputError(f"the key {shown(key)} stands twice in one mapping{_place(node)}: keep one.")
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node) if len(node.value) < 100 else _LARGEST
        if not -_LARGEST < value < _LARGEST:
            raise InputError(f"{shown(node.value)} is a whole number of more than 64 bits{_place(node)}.")
        return value

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{shown(text)} has half a surrogate pair{_place(node)}, which is no text.") from None
        return text


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        InputError: it is not YAML; it holds other kinds than null, booleans, numbers, text, lists and mappings; a key
            twice; a whole number of more than 64 bits; an alias inside the value that it names; or aliases that expand
            to more than 100,000 values.
    """
    if len(text) > _LONGEST:
        raise InputError(f"{where} is longer than {_LONGEST:,} characters: that is no recipe.")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return _unshared(loader.construct_document(node))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not readable as YAML: {' '.join(str(error).split())[:400]}") from None
    except Exception as error:  # PyYAML's constructors raise nearly every kind for tags such as `!!int`
        raise InputError(f"{where} is not readable as YAML: {type(error).__name__}, {str(error)[:200]}.") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values of a node after its aliases are expanded."""
    if id(node) in known:
        if not known[id(node)]:
            raise InputError(f"an alias stands inside what it names{_place(node)}.")
        return known[id(node)]
    known[id(node)] = 0
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_size(item, known) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        size += sum(_size(key, known) + _size(value, known) for key, value in node.value)
    if size > _MOST_VALUES:
        raise InputError(f"it unfolds to more than {_MOST_VALUES:,} values{_place(node)}.")
    known[id(node)] = size
    return size


def _unshared(value: Any) -> Any:
    """The value. Each use of an alias gets its own copy, so that an override changes only one of them."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _place(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})"
