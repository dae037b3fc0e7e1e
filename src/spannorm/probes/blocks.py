"""Finding a model's blocks, and standing between a placement and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spannorm.errors import InputError

Sublayer = Callable[[Tensor], Tensor]
Given = tuple[Tensor, Sublayer, Sublayer]


def find_placements(model: nn.Module) -> dict[str, Any]:
    """A model's placements, first block to last, by the name of the block that holds each as `placement`.

    Raises:
        InputError: there are none, there are several stacks, or there is not one whole stack.
    """
    held: dict[str, Any] = {name: getattr(module, "placement", None) for name, module in model.named_modules()}
    found = {name: p for name, p in held.items() if hasattr(p, "layer_idx") and hasattr(p, "num_layers")}
    if not found:
        raise InputError(
            f"{type(model).__name__} has no block with a `placement`: a probe reads models built of placements."
        )
    ordered = dict(sorted(found.items(), key=lambda item: item[1].layer_idx))
    there, depth = [p.layer_idx for p in ordered.values()], next(iter(ordered.values())).num_layers
    if there == list(range(depth)):
        return ordered
    if len(parents := sorted({name.rpartition(".")[0] for name in found})) > 1:
        raise InputError(
            f"{type(model).__name__} has several stacks, in {', '.join(parents)}: give the part that holds one, such "
            f"as model.{parents[0]}."
        )
    raise InputError(f"a probe reads one whole stack, blocks 0 … {depth - 1}; found blocks {there}.")


def read_out(last: Any, state: Tensor) -> Tensor:
    """What the stack would hand on if it ended with this state of several streams: the last block's `exit` of it."""
    state = state.to(next((p.dtype for p in last.parameters()), state.dtype))  # a probe runs without autocast
    shards = {f"last.{n}": p.full_tensor() for n, p in last.named_parameters() if hasattr(p, "full_tensor")}
    leave = nn.Module()
    leave.last, leave.forward = last, last.exit
    return torch.func.functional_call(leave, shards, (state,)) if shards else last.exit(state)


@contextmanager
def intercepting(
    placements: Iterable[Any], before: Callable[[int, Tensor, Sublayer, Sublayer], Given]
) -> Iterator[None]:
    """Within the context, block b works on what `before(b, x, attn, ffn)` returns."""

    def hook(placement: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Given, dict[str, Any]]:
        given = {**dict(zip(("x", "attn", "ffn"), args, strict=False)), **kwargs}
        return before(placement.layer_idx, given["x"], given["attn"], given["ffn"]), {}

    handles = [placement.register_forward_pre_hook(hook, with_kwargs=True) for placement in placements]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
