"""All operations of a model in one forward pass, as a graph of PyTorch's own operators that can be run again.

It does not depend on modules: an addition inside a function, a norm written by hand and a fused kernel are all calls of
`aten` operators. The model does not change: the module names come from PyTorch's global hooks, and the parameters are
only read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


@dataclass(eq=False, repr=False)
class Node:
    """A tensor: its operator, the operator's arguments, and the module in which it ran."""

    index: int
    value: Tensor
    op: str
    """Name of the operator, such as `add`; `parameter`, `constant` or `input` if no operator made the tensor."""
    func: Any = None
    args: tuple[Any, ...] = ()
    """The operator's arguments, with nodes in place of tensors."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    item: int | None = None
    """Which of several results it is."""
    module: str = ""
    """Path of the innermost module that ran."""
    name: str = ""
    """Of a parameter or buffer."""
    data: bool = False
    """Whether it depends on the model's input."""
    replays: bool = True
    """Whether it can be computed again from its arguments; not if a view was written to."""

    @cached_property
    def parents(self) -> list[Node]:
        """The tensors among its arguments."""
        return [a for a in tree_flatten((self.args, dict(self.kwargs)))[0] if isinstance(a, Node)]

    @property
    def shape(self) -> torch.Size:
        return self.value.shape


@dataclass(eq=False, repr=False)
class Call:
    """One call of a module."""

    path: str
    start: int
    """Number of nodes there were before it."""
    inputs: list[Node]
    outputs: list[Node] = field(default_factory=list)
    end: int = 0


class Trace(TorchDispatchMode):
    """While it is active, every operation becomes a node.

        with torch.no_grad(), Trace(model, inputs) as trace:
            trace.result(model(**inputs))

    It keeps every tensor until it is deleted, so give it few tokens.

    Args:
        model: the names of its parameters, buffers and modules are used.
        inputs: the model's inputs. Tensors that depend on them are data; all others are the model's own.
    """

    def __init__(self, model: nn.Module, inputs: Any = ()) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self.outputs: list[Node] = []
        self._named = {id(t): n for n, t in (*model.named_buffers(), *model.named_parameters())}
        self._inputs: list[Tensor] = [t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)]
        self._kept = [*model.buffers(), *model.parameters(), *self._inputs]
        self._tensors: dict[int, Tensor] = {}  # kept, so that an id stays one tensor's
        self._model = model
        self._paths = {id(m): n for n, m in model.named_modules()}
        self._by_id: dict[int, Node] = {}
        self._sharing: dict[int, set[int]] = {}  # storage → ids of the tensors that lie in it
        self.batch_first = self._inputs[0].shape[:2] if self._inputs and self._inputs[0].ndim == 2 else None
        self._by_place: dict[tuple[Any, ...], Node] = {}
        self._open: list[Call] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Trace:
        # on each module: PyTorch's global hooks with arguments leave an entry behind, which changes torch.compile
        for module in self._model.modules():
            self._handles.append(module.register_forward_pre_hook(self._enters, prepend=True))
            self._handles.append(module.register_forward_hook(self._leaves, with_kwargs=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enters(self, module: nn.Module, args: Any) -> None:
        self._open.append(Call(self._paths[id(module)], len(self.nodes), []))

    def _leaves(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        call = self._open.pop()
        call.inputs = self.nodes_in((args, kwargs))
        call.outputs, call.end = self.nodes_in(out), len(self.nodes)
        self.calls.append(call)

    def nodes_in(self, found: Any) -> list[Node]:
        """The nodes of all tensors in arguments or results, in order."""
        leaves = []
        for leaf in tree_flatten(_plain(found))[0]:
            if isinstance(leaf, Tensor):
                leaves.append(self._node(leaf))
        return leaves

    def result(self, out: Any) -> None:
        """Note what the model returned."""
        self.outputs = self.nodes_in(out)

    def _node(self, tensor: Tensor) -> Node:
        known = self._by_id.get(id(tensor)) or self._by_place.get(_place(tensor))
        if known is not None:
            return known
        name = self._named.get(id(tensor), "")
        if not name and isinstance(tensor, nn.Parameter):
            name = "?"
        given = any(tensor is t for t in self._inputs)
        node = Node(0, tensor, "input" if given else "parameter" if name else "constant", name=name, data=given)
        return self._add(node, tensor)

    def _add(self, node: Node, tensor: Tensor) -> Node:
        node.index = len(self.nodes)
        self.nodes.append(node)
        self._by_id[id(tensor)] = node
        self._sharing.setdefault(_storage(tensor), set()).add(id(tensor))
        if tensor.layout is torch.strided and tensor.numel():
            self._by_place[_place(tensor)] = node
        self._tensors[id(tensor)] = tensor
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        held = tree_map(lambda a: self._node(a) if isinstance(a, Tensor) else a, (args, kwargs))
        parents = [a for a in tree_flatten(held)[0] if isinstance(a, Node)]
        written = [] if name.startswith("empty") else _written(func, args, kwargs)
        for t in written:  # what lies in the memory that is written to is kept as it was
            for shared in self._sharing.get(_storage(t), ()):
                old = self._by_id[shared]
                old.value = old.value.detach().clone()
        out = func(*args, **kwargs)
        where = self._open[-1].path if self._open else ""
        data = any(p.data for p in parents)
        if written:
            for t in written:
                self._writes(t, name, func, held, where, data)
            return out
        results = out if isinstance(out, (tuple, list)) else (out,)
        for i, value in enumerate(results):
            if isinstance(value, Tensor):
                item = i if isinstance(out, (tuple, list)) else None
                made = Node(0, value, name, func, held[0], held[1], item, where, data=data)
                self._add(made, value)
        return out

    def _writes(self, t: Tensor, name: str, func: Any, held: Any, where: str, data: bool) -> None:
        """An operation in place: from here on, the tensor is a new node, and so are all that share its memory."""
        fresh = Node(0, t, name.rstrip("_"), func, held[0], held[1], None, where, data=data)
        others = [i for i in self._sharing.get(_storage(t), ()) if i != id(t)]
        self._add(fresh, t)
        for i in others:
            other, tensor = self._by_id[i], self._tensors[i]
            same = tensor.numel() == t.numel() and tensor.data_ptr() == t.data_ptr()
            args = (fresh,) if same else (other, fresh)
            mixed = Node(0, tensor, "view" if same else "written", None, args, {}, None, where, data=data or other.data)
            mixed.replays = False
            self._add(mixed, tensor)


def _plain(found: Any) -> Any:
    """Dictionaries and tuples in place of Transformers' outputs, without caches."""
    if isinstance(found, Mapping):
        return [_plain(v) for v in found.values()]
    if isinstance(found, (tuple, list)):
        return [_plain(v) for v in found]
    return found if isinstance(found, Tensor) else None


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata if t.layout is torch.strided else 0


def _place(t: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies: two Python objects may be one tensor."""
    if t.layout is not torch.strided or not t.numel():
        return ("object", id(t))
    return (t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operator writes to."""
    found = []
    for i, spec in enumerate(func._schema.arguments):
        if spec.alias_info is not None and spec.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(spec.name)
            found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Tensor)]
    return found


class CannotReplay(Exception):
    """A part of the graph cannot be computed again."""


def replay(target: Node, given: Mapping[Node, Tensor], limit: int = 20_000) -> Tensor:
    """The value of a node if others have the given values. Nodes that do not depend on these keep their values.

    Raises:
        CannotReplay: a view was written to, more than `limit` nodes are needed, or an operation raises.
    """
    depends: dict[int, bool] = {}
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(target, False)]
    start = min((n.index for n in given), default=0)
    while stack:
        node, done = stack.pop()
        if done:
            depends[node.index] = any(depends.get(p.index, False) for p in node.parents)
            if depends[node.index]:
                order.append(node)
            continue
        if node.index in depends:
            continue
        if node in given:
            depends[node.index] = True
            continue
        if node.index < start or not node.parents:
            depends[node.index] = False
            continue
        depends[node.index] = False
        stack.append((node, True))
        stack += [(p, False) for p in node.parents if p.index not in depends]
        if len(depends) > limit:
            raise CannotReplay("too long")
    values: dict[int, Tensor] = {n.index: v for n, v in given.items()}

    def value(a: Any) -> Any:
        return values.get(a.index, a.value) if isinstance(a, Node) else a

    with torch.no_grad():
        for node in sorted(order, key=lambda n: n.index):
            if node.func is None or not node.replays:
                raise CannotReplay(node.op)
            args, kwargs = tree_map(value, (node.args, dict(node.kwargs)))
            if node.func._schema.is_mutable:
                args = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, args)
            try:
                out = node.func(*args, **kwargs)
            except (RuntimeError, IndexError) as error:
                raise CannotReplay(f"{node.op}: {error}") from error
            values[node.index] = out if node.item is None else out[node.item]
    if target.index not in values:
        return target.value
    return values[target.index]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In eval mode inside; afterwards mode, buffers and the random generators are as before."""
    modes = {m: m.training for m in model.modules()}
    owners = [(m, n, b, b.detach().clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # one opaque kernel per layer
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, value in owners:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
                    module._buffers[name] = buffer


def run(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Trace:
    """The trace of one forward pass."""
    kwargs = dict(kwargs or {})
    with undisturbed(model), torch.no_grad(), Trace(model, (args, kwargs)) as trace:
        out = model(*args, **kwargs)
    trace.result(out)
    return trace
