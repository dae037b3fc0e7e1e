"""Finding a model's blocks, and changing what a block or a placement is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spannorm.errors import InputError

Sublayer = Callable[[Tensor], Tensor]
Given = tuple[Tensor, Sublayer, Sublayer]


def find_placements(model: nn.Module) -> dict[str, Any]:
    """A model's placements, first block to last, by the name of the block that holds each as `placement`.

    Raises:
        InputError: there are none, there are several stacks, or a stack is not complete.
    """
    attributes: dict[str, Any] = {name: getattr(module, "placement", None) for name, module in model.named_modules()}
    placements = {name: p for name, p in attributes.items() if hasattr(p, "layer_idx") and hasattr(p, "num_layers")}
    if not placements:
        raise InputError(
            f"{type(model).__name__} has no block with a `placement`: a probe reads models built of placements."
        )
    ordered = dict(sorted(placements.items(), key=lambda item: item[1].layer_idx))
    indices, depth = [p.layer_idx for p in ordered.values()], next(iter(ordered.values())).num_layers
    if indices == list(range(depth)):
        return ordered
    if len(parents := sorted({name.rpartition(".")[0] for name in placements})) > 1:
        raise InputError(
            f"{type(model).__name__} has several stacks, in {', '.join(parents)}: give the part that holds one, such "
            f"as model.{parents[0]}."
        )
    raise InputError(f"a probe reads one whole stack, blocks 0 … {depth - 1}; found blocks {indices}.")


def has_placements(model: nn.Module) -> bool:
    """Whether any block of the model holds a placement."""
    return any(hasattr(getattr(module, "placement", None), "layer_idx") for module in model.modules())


def find_blocks(model: nn.Module, path: str | None = None) -> list[str]:
    """The paths of a model's blocks, first to last, whether they hold placements or not.

    Without placements the blocks are the items of a `ModuleList` or `Sequential` that is in no other such list. It must
    be the longest one and hold the most parameters.

    Args:
        path: of the list of blocks, such as `model.layers`; None means to search for it.

    Raises:
        InputError: there is no such list, or several lists could be it.
    """
    if path is None and has_placements(model):
        return list(find_placements(model))
    name = type(model).__name__
    lists = {n: m for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)}
    if path is None:
        outer = {n: m for n, m in lists.items() if not any(n != o and (not o or n.startswith(f"{o}.")) for o in lists)}
        depths = {n: len(m) for n, m in outer.items()}
        sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in outer.items()}
        candidates = [n for n in outer if depths[n] == max(depths.values()) or sizes[n] == max(sizes.values())]
        if len(candidates) > 1:
            shown = ", ".join(f"{n} ({depths[n]} blocks)" for n in candidates)
            raise InputError(
                f"{name} has several lists that may be its blocks, {shown}: give the part of the model that has one "
                "stack, or name the list by `blocks` where that can be given."
            )
        path = candidates[0] if candidates else None
    if path is None or path not in lists:
        raise InputError(
            f"{name} has no list of blocks{'' if path is None else f' at {path!r}'}: give a model, or the path of a "
            "list in it, whose blocks are in a ModuleList or Sequential."
        )
    return [f"{path}.{child}".lstrip(".") for child, _ in lists[path].named_children()]


def read_out(last: Any, state: Tensor) -> Tensor:
    """The stack's output if it ended with this state of several streams: the last block's `exit` applied to it."""
    state = state.to(next((p.dtype for p in last.parameters()), state.dtype))  # a probe runs without autocast
    shards = {f"last.{n}": p.full_tensor() for n, p in last.named_parameters() if hasattr(p, "full_tensor")}
    leave = nn.Module()
    leave.last, leave.forward = last, last.exit
    return torch.func.functional_call(leave, shards, (state,)) if shards else last.exit(state)


@contextmanager
def intercepting(
    placements: Iterable[Any], before: Callable[[int, Tensor, Sublayer, Sublayer], Given]
) -> Iterator[None]:
    """Within the context, block b is given what `before(b, x, attn, ffn)` returns."""

    def hook(placement: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Given, dict[str, Any]]:
        given = {**dict(zip(("x", "attn", "ffn"), args, strict=False)), **kwargs}
        return before(placement.layer_idx, given["x"], given["attn"], given["ffn"]), {}

    handles = [placement.register_forward_pre_hook(hook, with_kwargs=True) for placement in placements]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Before = Callable[[int, Tensor], Tensor]
After = Callable[[int, Tensor, Tensor], Tensor]


class Blocks:
    """A model's blocks in order, with or without placements. Their states can be read and changed.

    The state is the input of block b. With several streams it holds all of them, (batch, seq, n, hidden).

    Args:
        model: holds a whole stack of placements; or a list of blocks, as Transformers' decoders do, that take the
            hidden states first and return them, alone or first of a tuple.

    Raises:
        InputError: there is no stack, or there are several.
    """

    def __init__(self, model: nn.Module) -> None:
        self.placements: list[Any] = list(find_placements(model).values()) if has_placements(model) else []
        self.modules = [model.get_submodule(path) for path in find_blocks(model)]

    def __len__(self) -> int:
        return len(self.modules)

    def read_out(self, state: Tensor) -> Tensor:
        """(batch, seq, hidden): one stream as it is. Several streams: the model's readout of them, or their sum in a
        model without placements."""
        if state.ndim < 4:
            return state
        return read_out(self.placements[-1], state) if self.placements else state.sum(-2)

    @contextmanager
    def changing(self, after: After, before: Before = lambda _, x: x) -> Iterator[None]:
        """Within the context block b reads `before(b, x)`, and its output y is replaced by `after(b, x, y)`."""
        with ExitStack() as hooks:
            for b, module in enumerate(self.modules):
                if self.placements:
                    placement = self.placements[b]
                    placement.block = self._changed_block(b, placement, after, before)  # on the instance
                    hooks.callback(delattr, placement, "block")
                else:
                    self._hook(b, module, after, before, hooks)
            yield

    @staticmethod
    def _changed_block(b: int, placement: Any, after: After, before: Before) -> Callable[..., Tensor]:
        def block(x: Tensor, attn: Sublayer, ffn: Sublayer) -> Tensor:
            x = before(b, x)
            return after(b, x, type(placement).block(placement, x, attn, ffn))

        return block

    @staticmethod
    def _hook(b: int, module: nn.Module, after: After, before: Before, hooks: ExitStack) -> None:
        read: list[Tensor] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            read[:] = [before(b, args[0] if args else kwargs["hidden_states"])]
            return ((*read, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": read[0]})

        def leave(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (after(b, read[0], output[0]), *output[1:])
            return after(b, read[0], output)

        hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(module.register_forward_hook(leave).remove)
