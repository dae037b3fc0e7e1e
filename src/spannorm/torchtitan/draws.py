"""The initial values of a model with a placement: our plan, as torchtitan's `param_init`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from spannorm.init import Draw, init_plan, standard_normal
from spannorm.roles import Fused, Roles
from spannorm.torchtitan.names import TURNED, hugging_face_name, to_pairs

EXPERTS: Roles = {"w1_EFD": "ffn_gate", "w2_EDF": "ffn_down", "w3_EFD": "ffn_up"}
ROLES: Roles = {
    "wq": "q", "wk": "k", "wv": "v", "wo": "attn_out", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up", **EXPERTS,
}  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """The sizes of attention on which the order of rows depends."""

    queries: int
    keys: int
    channels: int
    pairs: bool
    """Whether RoPE rotates pairs of neighbouring channels."""

    @property
    def fused(self) -> Fused:
        """`wqkv`: for each key head its queries, its key and its value."""
        per_key = self.queries // self.keys
        sizes = per_key * self.channels, self.channels, self.channels
        return Fused(("q", "k", "v"), sizes=sizes, groups=self.keys)


def plan_draws(model: Any, heads: Heads, **base: Any) -> dict[str, Draw]:
    """How every parameter must be drawn, by torchtitan's names. Works on meta device."""
    return init_plan(model, roles={**ROLES, "wqkv": heads.fused}, **base)


def give_draws(model: nn.Module, plan: dict[str, Draw], heads: Heads, seed: int | None) -> None:
    """Set the `param_init` of every module, in place; torchtitan calls them once weights have memory.

    Args:
        seed: None for torchtitan's random numbers.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        own: Any = module
        if leaves := dict(module.named_parameters(recurse=False)):
            own._param_init = {leaf: _init(names[id(p)], plan[names[id(p)]], heads, seed) for leaf, p in leaves.items()}


def _init(name: str, draw: Draw, heads: Heads, seed: int | None) -> Any:
    if not any([draw.sigma] if draw.fused is None else draw.fused[1]):
        return partial(_constant, draw.mean)
    if seed is None:
        return partial(_random, draw)
    return partial(_seeded, name, draw, heads, seed)


@torch.no_grad()
def _copy(value: Tensor, parameter: Tensor) -> None:
    """A whole value into a parameter, sharded or not."""
    value = value.to(device=parameter.device, dtype=parameter.dtype)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = value.redistribute(placements=parameter.placements)  # copy_ alone refuses shards of unlike sizes
    parameter.copy_(value)


def _constant(mean: float | Tensor, parameter: Tensor) -> None:
    _copy(torch.as_tensor(mean, dtype=torch.float32, device="cpu").expand(parameter.shape).contiguous(), parameter)


@torch.no_grad()
def _random(draw: Draw, parameter: Tensor) -> None:
    """As in torchtitan's own inits, a sharded parameter has the same values as a whole one."""

    def fill(tensor: Tensor, sigma: float) -> Tensor:
        if draw.cut is None:
            return nn.init.normal_(tensor, std=sigma)
        return nn.init.trunc_normal_(tensor, std=sigma, a=-draw.cut * sigma, b=draw.cut * sigma)

    if draw.fused is None:
        fill(parameter, draw.sigma)
        return
    layout, sigmas = draw.fused
    sizes: Any = layout.sizes
    groups: Any = layout.groups
    tail = parameter.shape[1:]
    parts = [fill(parameter.new_empty(groups * n, *tail), s) for n, s in zip(sizes, sigmas, strict=True)]
    rows = [part.view(groups, n, *tail) for n, part in zip(sizes, parts, strict=True)]
    parameter.copy_(torch.cat(rows, dim=1).view(-1, *tail))


def _seeded(name: str, draw: Draw, heads: Heads, seed: int, parameter: Tensor) -> None:
    """The numbers that our Hugging Face model draws under its own name for the parameter."""
    value = normal_numbers(name, parameter.shape, heads, seed, draw.cut)
    for one, part in draw.matrices(value):
        part.mul_(one.sigma)
    _copy(value, parameter)


def normal_numbers(name: str, shape: torch.Size, heads: Heads, seed: int, cut: float | None) -> Tensor:
    """N(0, 1) of a parameter, in torchtitan's order."""
    if name.endswith(".wqkv.weight"):
        rows = {"q": heads.queries, "k": heads.keys, "v": heads.keys}
        parts = [
            normal_numbers(
                name.replace("wqkv", f"w{role}"), torch.Size((n * heads.channels, shape[1])), heads, seed, cut
            ).view(heads.keys, -1, shape[1])
            for role, n in rows.items()
        ]
        return torch.cat(parts, dim=1).view(shape)
    key = hugging_face_name(name).removeprefix("model.")
    if key.endswith(".experts.gate_up_proj"):
        both = standard_normal(torch.Size((shape[0], 2 * shape[1], shape[2])), seed, key, cut)
        return both.chunk(2, dim=1)[0 if name.endswith("w1_EFD") else 1].contiguous()
    numbers = standard_normal(shape, seed, key, cut)
    return to_pairs(numbers, heads.channels) if heads.pairs and TURNED.search(name) else numbers
