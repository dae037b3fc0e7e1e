"""`spannorm.audit`: the actual wiring and init of a model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from spannorm.auditing.behaviour import Norms
from spannorm.auditing.draws import Row, draw_table, fan_ins, looks_trained, roles
from spannorm.auditing.ends import Ends, read_ends
from spannorm.auditing.facts import NormFacts, norm_facts
from spannorm.auditing.match import Match, match
from spannorm.auditing.shrink import depth_of
from spannorm.auditing.signal import Signal, measure
from spannorm.auditing.stacks import Stack, find_stacks
from spannorm.auditing.targets import Target, made_up_inputs, of_model
from spannorm.auditing.theory import Outlook, outlook
from spannorm.auditing.trace import run
from spannorm.auditing.verdict import Sentence, verdict
from spannorm.auditing.wiring import BlockWiring, read_block, types_of
from spannorm.auditing.writing import Writer
from spannorm.errors import InputError

DEPTHS = (4, 8, 16)
"""Depths of the models that show what changes with depth. The model with the first depth is run."""


@dataclass(frozen=True)
class StackAudit:
    """One stack of blocks."""

    path: str
    blocks: tuple[BlockWiring, ...]
    """In the order in which they ran."""
    ends: Ends
    match: Match

    def kinds(self) -> dict[str, list[int]]:
        """Equation → the positions of the blocks that have it."""
        found: dict[str, list[int]] = {}
        for block in self.blocks:
            found.setdefault(block.text, []).append(block.position)
        return found


@dataclass(frozen=True)
class Audit:
    """The result of `audit`. Use `print`, or `to_dict()`."""

    target: str
    model: str
    """Its class."""
    depth: int | None
    """Blocks of the real model."""
    shrunk: Mapping[str, tuple[Any, Any]]
    stacks: tuple[StackAudit, ...]
    """The output of the last one leads to the model's output."""
    norms: tuple[NormFacts, ...]
    init: tuple[Row, ...] | str
    """One row per matrix, or the reason why init cannot be read."""
    signal: Signal | None
    outlook: Outlook | None
    seconds: float
    verdict: tuple[Sentence, ...] = field(default=())

    @property
    def main(self) -> StackAudit:
        return self.stacks[-1]

    @property
    def ok(self) -> bool:
        """Whether nothing is off."""
        return not any(s.off for s in self.verdict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        main = self.main
        return {
            "target": self.target,
            "model": self.model,
            "depth": self.depth,
            "ok": self.ok,
            "verdict": [asdict(s) for s in self.verdict],
            "placement": main.match.placement,
            "nearest": main.match.nearest,
            "differs": list(main.match.differs),
            "equation": {text: positions for text, positions in main.kinds().items()},
            "blocks": [asdict(b) for b in main.blocks],
            "ends": asdict(main.ends),
            "other_stacks": [{"path": s.path, "equation": s.kinds(), "placement": s.match.placement,
                              "nearest": s.match.nearest, "differs": list(s.match.differs)} for s in self.stacks[:-1]],
            "norms": [asdict(n) for n in self.norms],
            "init": self.init if isinstance(self.init, str) else [asdict(r) for r in self.init],
            "signal": None if self.signal is None else asdict(self.signal),
            "outlook": None if self.outlook is None else asdict(self.outlook),
            "shrunk": {name: list(pair) for name, pair in self.shrunk.items()},
            "seconds": round(self.seconds, 2),
        }  # fmt: skip

    def __str__(self) -> str:
        from spannorm.auditing.page import as_text

        return as_text(self)


def audit(model: nn.Module | Any, example_inputs: Any = None) -> Audit:
    """Find the wiring and the init of a model, by running it.

        print(spannorm.audit(model, {"input_ids": ids}))

    Afterwards the model is as before: weights, mode, buffers, hooks, `.grad`; so are the random generators.

    Args:
        model: any module with a stack of blocks, or a configuration of Transformers, from which a small model is built
            on CPU.
        example_inputs: the model's inputs: a tensor, a tuple of arguments or a dictionary of named ones. None makes up
            tokens or an image for a model of Transformers. Use few tokens, because all results are kept in memory.

    Raises:
        InputError: no stack of blocks was found, or there are no inputs for the model.
    """
    if not isinstance(model, nn.Module):
        from spannorm.auditing.targets import build_small

        config = model
        small, changed = build_small(config, DEPTHS[0])
        return audit_target(
            Target(type(config).__name__, small, config, changed, lambda d: build_small(config, d)[0]), example_inputs
        )
    return audit_target(of_model(model), example_inputs)


def audit_target(target: Target, example_inputs: Any = None) -> Audit:
    """The same as `audit`, for a target of the command line."""
    began, model = time.perf_counter(), target.model
    args, kwargs = _call(model, getattr(model, "config", None), example_inputs)
    with torch.random.fork_rng(devices=[]):
        try:
            trace = run(model, args, kwargs)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            if example_inputs is not None:
                raise
            words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(
                f"{type(model).__name__} does not run on made-up inputs ({', '.join(kwargs)}): {words}. Give it inputs."
            ) from error
        stacks = find_stacks(model, trace)
        if not stacks:
            raise InputError(
                f"no stack of blocks found in {type(model).__name__}: an audit reads a list of modules (ModuleList or "
                "Sequential) that hand a tensor on from one to the next and add to it."
            )
        norms, types = Norms(), types_of(model)
        read: list[StackAudit] = []
        writers: list[Writer] = []
        for stack in stacks:
            pairs = [read_block(b, norms, types, trace.batch_first) for b in stack.blocks]
            ends = read_ends(trace, stack, norms)
            blocks = tuple(wiring for wiring, _ in pairs)
            read.append(StackAudit(stack.path, blocks, ends, match(blocks, ends, len(blocks))))
            writers = [writer for _, writer in pairs]
        facts = norm_facts(model, trace, norms.all())
        main = stacks[-1]
        init = _init(target, trace, writers, read[-1].ends, norms, main)
        signal = measure(model, main, args, kwargs)
    text = target.config.get_text_config(decoder=True) if hasattr(target.config, "get_text_config") else target.config
    found = Audit(
        target=target.name,
        model=type(model).__name__,
        depth=depth_of(target.config) if target.config is not None else len(main.blocks),
        shrunk=target.shrunk,
        stacks=tuple(read),
        norms=tuple(facts),
        init=init,
        signal=signal,
        outlook=None if isinstance(init, str) else outlook(read[-1].match, read[-1].ends, init, text, read[-1].blocks),
        seconds=time.perf_counter() - began,
    )
    return _with_verdict(found)


def _with_verdict(found: Audit) -> Audit:
    from dataclasses import replace

    return replace(found, verdict=tuple(verdict(found)))


def _call(model: nn.Module, config: Any, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        if config is None:
            raise InputError(
                f"give example_inputs for a {type(model).__name__}: a tensor, a tuple of arguments or a dictionary."
            )
        return (), made_up_inputs(model, config)
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}


def _init(
    target: Target, trace: Any, writers: Sequence[Writer], ends: Ends, norms: Norms, stack: Stack
) -> tuple[Row, ...] | str:
    model = target.model
    if looks_trained(model):
        return "trained weights: init cannot be read"
    width = stack.blocks[0].streams[0].shape[-1]
    known: dict[str, str] = {}
    for writer in writers:
        known |= roles(writer.branches.values(), ends, norms, trace, width)
    base = len({b.path for b in stack.blocks})
    built: dict[int, nn.Module] = {base: model} if target.shrunk or target.build is None else {}
    build = target.build
    for depth in DEPTHS if build is not None else ():
        try:
            if build is not None and depth not in built:
                built[depth] = build(depth)
        except InputError:  # a configuration that allows one depth only
            continue
    sizes = [_size(other, stack.path) for other in built.values()]
    if not built or len(set(sizes)) < len(sizes):  # the depth is not where the configuration says
        built = {base: model}
    config = getattr(model, "config", None)
    return tuple(draw_table(model, built, known, fan_ins(trace), config, width, base))


def _size(model: nn.Module, path: str) -> int:
    """The number of modules in a stack; a deeper stack has more."""
    return len({n for n, _ in model.named_modules() if n.startswith(f"{path}.")})
