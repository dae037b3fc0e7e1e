"""The modules that a layer calls, in order, with their arguments. They are recorded during one call."""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature, unwrap
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spannorm.auditing.steps import LayerCalls, Source, Step
from spannorm.errors import InputError


@dataclass(eq=False)
class _Event:
    path: str
    """From the layer; empty for a dropout that is a function."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    out: Any = None
    inside: tuple[str, ...] = ()
    """The modules that were open, the outermost first."""
    p: float = 0.0


@dataclass(eq=False)
class Recording:
    """One call of a layer."""

    layer: nn.Module
    given: dict[str, Any] = field(default_factory=dict)
    events: list[_Event] = field(default_factory=list)
    out: Any = None


class _Dropouts(TorchFunctionMode):
    """Notes each `F.dropout`."""

    def __init__(self, note: Any) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.dropout:
            bound = signature(F.dropout).bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self.note(bound.arguments["input"], float(bound.arguments["p"]), out)
        return out


@contextlib.contextmanager
def recording(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Recording]]:
    """Within the context, the first call of each of these layers is recorded."""
    found: dict[str, Recording] = {}
    handles: list[Any] = []
    open_layer: list[Recording] = []
    open_modules: list[str] = []

    def enters(path: str, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not name:
                new = Recording(module, bound(module, args, kwargs))
                found.setdefault(path, new)
                open_layer.append(new)
            else:
                open_modules.append(name)

        return hook

    def leaves(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            if not name:
                open_layer.pop().out = out
            else:
                open_modules.pop()
                open_layer[-1].events.append(_Event(name, args, dict(kwargs), out, tuple(open_modules)))

        return hook

    def dropout(x: Tensor, p: float, out: Tensor) -> None:
        if open_layer:
            open_layer[-1].events.append(_Event("", (x,), {}, out, tuple(open_modules), p))

    for path, layer in layers.items():
        for name, module in layer.named_modules():
            handles.append(module.register_forward_pre_hook(enters(path, name), with_kwargs=True))
            handles.append(module.register_forward_hook(leaves(name), with_kwargs=True))
    try:
        with _Dropouts(dropout):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def parameters_of_call(module: nn.Module) -> list[Parameter]:
    """The parameters of a module's `forward`, without `self`."""
    return list(signature(type(module).forward).parameters.values())[1:]


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    names = [p.name for p in parameters_of_call(module) if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def layer_calls(
    recorded: Recording, norms: Collection[str], weights: Mapping[str, Sequence[str]], width: int
) -> LayerCalls:
    """The two sublayers of a layer as steps.

    Args:
        recorded: one call of the layer.
        norms: paths of the norms in its equation.
        weights: `attn` and `ffn` → names of the parameters of each, from the layer.
        width: of the stream.

    Raises:
        InputError: a sublayer is not a sequence of modules, or the source of one of its arguments is unknown.
    """
    layer, events = recorded.layer, recorded.events
    holders = {n.rpartition(".")[0] for n in norms}
    holders |= {h.rsplit(".", k)[0] for h in holders for k in range(h.count(".") + 1)}
    holders.discard("")
    units = [e for e in events if e.path not in holders | set(norms) and all(i in holders for i in e.inside)]
    declared = [p.name for p in parameters_of_call(layer)[1:] if p.kind is not Parameter.VAR_KEYWORD]
    extra = set(recorded.given) - {p.name for p in parameters_of_call(layer)}
    used: set[str] = set()
    steps: dict[str, tuple[Step, ...]] = {}
    read: set[str] = set()
    for branch, names in weights.items():
        chain = _chain(units, names, layer)
        written: list[Step] = []
        x: Any = None
        for event in chain:
            if event.path in used:
                raise InputError(f"its module {event.path} runs more than once in a layer")
            used |= {event.path} if event.path and _has_parameters(layer, event.path) else set()
            step, x = _step(event, x, recorded, units, width)
            read |= {s.what for _, s in step.arguments if s.kind == "argument"} | (extra if step.rest else set())
            written.append(step)
        steps[branch] = tuple(written)
    loaded = {i.argval for i in dis.get_instructions(unwrap(type(layer).forward)) if i.opname.startswith("LOAD")}
    none = [k for k in declared if recorded.given.get(k) is None and k in loaded]
    unread = tuple(k for k in (*none, *sorted(extra)) if k not in read and recorded.given.get(k) is None)
    owners = {s.path: type(layer.get_submodule(s.path)).__name__ for b in steps.values() for s in b if s.path}
    return LayerCalls(steps, _returns(recorded, units), unread, tuple(sorted(owners.items())))


def _chain(units: Sequence[_Event], names: Sequence[str], layer: nn.Module) -> list[_Event]:
    """The events of one sublayer in order: those with its weights, and those between and after them."""
    own = [e for e in units if e.path and any(n.startswith(f"{e.path}.") for n in names)]
    if not own:
        raise InputError("a sublayer has no module of its own")
    chain, last = [], _first(own[0].out)
    begun = False
    for event in units:
        if event is own[0]:
            begun = True
            chain.append(event)
            continue
        if not begun:
            continue
        free = not event.path or not _has_parameters(layer, event.path)
        reads = [v for v in (*event.args, *event.kwargs.values()) if isinstance(v, Tensor)]
        follows = any(_same(v, last) for v in reads)
        if event in own and not follows:
            raise InputError(
                f"between the modules {chain[-1].path or 'dropout'} and {event.path} something is computed"
            )
        if follows and (free or event in own):
            chain.append(event)
            last = _first(event.out)
    missing = [e.path for e in own if e not in chain]
    if missing:
        raise InputError(f"its modules {', '.join(missing)} do not run in a row")
    return chain


def _has_parameters(layer: nn.Module, path: str) -> bool:
    return any(True for _ in layer.get_submodule(path).parameters())


def _same(a: Tensor, b: Any) -> bool:
    return a is b or (isinstance(b, Tensor) and a.data_ptr() == b.data_ptr() and a.numel() == b.numel() > 0)


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) else out


def _step(
    event: _Event, x: Any, recorded: Recording, units: Sequence[_Event], width: int
) -> tuple[Step, Any]:  # fmt: skip
    if not event.path:
        return Step("", dropout=event.p), _first(event.out)
    module = recorded.layer.get_submodule(event.path)
    if x is None:
        x = next((v for v in (*event.args, *event.kwargs.values()) if isinstance(v, Tensor)), None)
    names = [p.name for p in parameters_of_call(module) if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    arguments = []
    for name, value in (*((f"*{i}", v) for i, v in enumerate(event.args)), *event.kwargs.items()):
        i = int(name[1:]) if name.startswith("*") else -1
        known = name if i < 0 else names[i] if i < len(names) else ""
        arguments.append((name, _source(known, value, x, recorded, units, event, width)))
    declared = {p.name for p in parameters_of_call(recorded.layer)}
    extra = {k for k in recorded.given if k not in declared}
    handed = {s.what for n, s in arguments if s.kind == "argument"}
    open_ended = [any(p.kind is Parameter.VAR_KEYWORD for p in parameters_of_call(m)) for m in (module, recorded.layer)]
    rest = all(open_ended) and extra <= handed
    return Step(event.path, tuple(a for a in arguments if not (rest and a[1].what in extra)), rest), _first(event.out)


def _source(
    name: str, value: Any, x: Any, recorded: Recording, units: Sequence[_Event], event: _Event, width: int
) -> Source:
    given = recorded.given
    stream = next(iter(given))
    if isinstance(value, Tensor) and _same(value, x):
        return Source("x")
    if name in given and given[name] is value and name != stream:
        return Source("argument", name)
    plain = value is None or isinstance(value, (bool, int, float, str))
    if not plain:
        for k, v in given.items():
            if v is value and k != stream:
                return Source("argument", k)
        for other in units:
            parts = other.out if isinstance(other.out, (tuple, list)) else (other.out,)
            for i, part in enumerate(parts):
                if part is value and other is not event and i > 0:
                    return Source("output", other.path, i)
    if isinstance(value, Tensor) and value.shape == (*x.shape[:-1], width):
        return Source("zeros")
    if plain:
        return Source("value", value)
    raise InputError(f"its module {event.path} is handed {name or 'an argument'} that is no argument of the layer")


def _returns(recorded: Recording, units: Sequence[_Event]) -> tuple[Source, ...] | None:
    out = recorded.out
    if not isinstance(out, (tuple, list)):
        return None
    found = []
    for value in out[1:]:
        source = next((Source("argument", k) for k, v in recorded.given.items() if v is value and v is not None), None)
        for event in units if source is None and value is not None else ():
            parts = event.out if isinstance(event.out, (tuple, list)) else (event.out,)
            for i, part in enumerate(parts):
                if part is value:
                    source = Source("output", event.path, i)
        if source is None and not (value is None or isinstance(value, (bool, int, float, str))):
            raise InputError("a layer returns something besides its stream that cannot be told")
        found.append(source or Source("value", value))
    return tuple(found)
