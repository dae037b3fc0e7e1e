"""A module's text as definitions and imports: the meaning of each name at its top level."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True, eq=False)
class Definition:
    """A function, a class, or an assignment at a module's top level, with the comment above and the string below it."""

    name: str
    nodes: tuple[ast.stmt, ...]
    lines: tuple[str, ...]
    first: int
    """Number of its first line, from 1."""

    @cached_property
    def free(self) -> list[ast.Name]:
        """Uses of names that no scope inside it binds."""
        return [name for node in self.nodes for name in _free(node, frozenset())]

    @cached_property
    def local(self) -> set[str]:
        """All names that a scope inside it binds."""
        inside = [n for node in self.nodes for n in ast.walk(node)]
        return {n.arg for n in inside if isinstance(n, ast.arg)} | {
            n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }

    def text(self, new: Mapping[ast.expr, str]) -> str:
        """Its source, with some expressions replaced. Each expression is within one line."""
        lines = [line.encode() for line in self.lines]  # the parser counts bytes
        for node, words in sorted(new.items(), key=lambda item: (item[0].lineno, item[0].col_offset), reverse=True):
            assert node.lineno == node.end_lineno
            line = lines[node.lineno - self.first]
            lines[node.lineno - self.first] = line[: node.col_offset] + words.encode() + line[node.end_col_offset :]
        return b"".join(lines).decode().rstrip()

    def renamed(self, name: str) -> Mapping[ast.expr, str]:
        """The replacements for `text` that rename an assignment."""
        stores = (n for node in self.nodes for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == self.name)
        return {n: name for n in stores if isinstance(n.ctx, ast.Store)}


@dataclass
class Source:
    """A module from its text.

    `definitions`: name → its definition. `imports`: name → (module, name there), or (module, None) for `import`.
    """

    text: str
    definitions: dict[str, Definition] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)
        lines = self.text.splitlines(keepends=True)
        body = [*self.tree.body, ast.Pass(lineno=len(lines) + 1)]
        for node, after in pairwise(body):
            self._import(node)
            names = _defined(node)
            nodes = [node, *([after] if names and _is_string(after) and isinstance(node, _ASSIGNMENTS) else [])]
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            while first > 1 and lines[first - 2].startswith("#"):
                first -= 1
            for name in names:
                last = nodes[-1].end_lineno
                self.definitions[name] = Definition(name, tuple(nodes), tuple(lines[first - 1 : last]), first)

    @property
    def title(self) -> str:
        """The first line of its docstring."""
        return (ast.get_docstring(self.tree) or "").partition("\n")[0]

    def _import(self, node: ast.stmt) -> None:
        if isinstance(node, ast.If):  # TYPE_CHECKING
            for inside in node.body:
                self._import(inside)
        elif isinstance(node, ast.ImportFrom) and node.module:
            self.imports |= {a.asname or a.name: (node.module, a.name) for a in node.names}
        elif isinstance(node, ast.Import):
            for a in node.names:
                parent, _, last = a.name.rpartition(".")
                if a.asname and parent:  # `import torch.nn.functional as F` is `from torch.nn import functional as F`
                    self.imports[a.asname] = (parent, last)
                else:
                    name = a.asname or a.name.partition(".")[0]
                    self.imports[name] = (a.name if a.asname else name, None)


_ASSIGNMENTS = (ast.Assign, ast.AnnAssign)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    named = [n for target in targets for n in ast.walk(target)]  # `a, b = 1, 2` defines both
    return [n.id for n in named if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _free(node: ast.AST, bound: frozenset[str]) -> Iterator[ast.Name]:
    """Names read in a node that neither it nor a scope around it (`bound`) binds."""
    if isinstance(node, ast.Name):
        if node.id not in bound and isinstance(node.ctx, ast.Load):
            yield node
        return
    inner = bound
    outside: list[ast.AST] = []
    if isinstance(node, _SCOPES):
        a = node.args
        args = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        outside = [*a.defaults, *filter(None, a.kw_defaults), *(arg.annotation for arg in args if arg.annotation)]
        if not isinstance(node, ast.Lambda):
            outside += [*node.decorator_list, *([node.returns] if node.returns else [])]
        body = node.body if isinstance(node.body, list) else [node.body]
        inner = bound | {arg.arg for arg in args} | {name for part in body for name in _bound(part)}
        inside: list[ast.AST] = list(body)
    elif isinstance(node, _COMPREHENSIONS):
        inner = bound | {name for g in node.generators for name in _bound(g.target)}
        inside = list(ast.iter_child_nodes(node))
    else:
        inside = list(ast.iter_child_nodes(node))
    for part in outside:
        yield from _free(part, bound)
    for part in inside:
        yield from _free(part, inner)


def _bound(node: ast.AST) -> Iterator[str]:
    """Names that a statement binds in the scope it stands in."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (a.asname or a.name.partition(".")[0] for a in node.names)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name
    if not isinstance(node, (*_SCOPES, *_COMPREHENSIONS)):
        for part in ast.iter_child_nodes(node):
            yield from _bound(part)
