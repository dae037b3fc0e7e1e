"""What each parameter of a model does: its role, the depth rule of its block, and the mean of its initial values.

The type of the module tells embeddings, norms and biases. The placement tells its own parameters. The end of the path
tells the matrices: the names in `LLAMA`, or names of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spannorm.errors import InputError
from spannorm.norms import Norm
from spannorm.placements import Owned, Placement
from spannorm.scaling import ROLES, DepthRule, Role, depth_rule


@dataclass(frozen=True)
class Fused:
    """The matrices of several roles stored as one: the rows of each role in turn, repeated `groups` times."""

    roles: tuple[Role, ...]
    sizes: Callable[[Any], tuple[int, ...]] | tuple[int, ...] = ()
    """Rows of each role in one group, or a function from the configuration to these. Empty means equal parts."""
    groups: Callable[[Any], int] | int = 1
    """The number of groups, or a function from the configuration to it."""
    transposed: bool = False
    """Whether it is stored (in, out), as GPT-2's `Conv1D` is."""

    def of(self, config: Any) -> Fused:
        """The same with numbers in place of functions, for a model of this configuration."""
        sizes = self.sizes(config) if callable(self.sizes) else self.sizes
        return replace(self, sizes=sizes, groups=self.groups(config) if callable(self.groups) else self.groups)

    def matrix(self, stored: Tensor) -> Tensor:
        """A stored parameter as (…, out, in), a view. The `in` of a convolution is all dimensions but the first."""
        return stored.mT if self.transposed else stored.flatten(1) if stored.ndim > 3 else stored

    def split(self, rows: Tensor, dim: int = -2) -> dict[Role, Tensor]:
        """Each role's part, a view, with `dim` unflattened to (groups, rows)."""
        grouped = rows.unflatten(dim, (self.groups, -1))  # type: ignore[arg-type]
        parts: Any = self.sizes or (grouped.shape[dim] // len(self.roles),) * len(self.roles)
        return dict(zip(self.roles, grouped.split(parts, dim), strict=True))


Roles = Mapping[str, Role | Fused]
"""The end of a module's or a parameter's path → what that matrix does."""

GATE_UP = Fused(("ffn_gate", "ffn_up"))
LLAMA: Roles = {
    "lm_head": "head",
    "score": "head",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "attn_out",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "gate": "router",
    "head_scale_norm": "norm",
    "gate_up_proj": GATE_UP,  # of all experts at once, (experts, fan-out, fan-in)
}

NO_DECAY: frozenset[Role] = frozenset({"norm", "bias", "gain", "embedding"})


@dataclass(frozen=True)
class Known:
    """One parameter and what is known about it."""

    name: str
    parameter: Tensor
    layout: Fused
    """Its role, or the roles of its parts."""
    rule: DepthRule
    """The depth rule of its block; `none` outside of blocks."""
    mean: float | Tensor
    """The mean of its initial values: a gain's or a norm's initial value, 0 for all others."""
    scale: float
    """Factor on the base std."""

    @property
    def role(self) -> Role:
        """Its role; of a fused matrix the last of its roles."""
        return self.layout.roles[-1]


def known_parameters(model: nn.Module, roles: Roles | None = None) -> Iterator[Known]:
    """Each parameter once, in the model's order.

    Args:
        model: if it has `keeps_unknown_parameters = True`, a parameter without a role has the role `own`: its module
            draws it.
        roles: what the parameters of your model do, by the ends of their paths:
            `{"attn.c_proj": "attn_out", "cls_token": "embedding"}`, or a `Fused` for several matrices stored as one.
            These come before all other rules. A model may carry its own as `parameter_roles`.

    Raises:
        InputError: an unknown role, or a parameter that has none.
    """
    tails = {**LLAMA, **getattr(model, "parameter_roles", {}), **(roles or {})}
    for tail, what in tails.items():
        for role in what.roles if isinstance(what, Fused) else (what,):
            if role not in ROLES:
                raise InputError(f"roles: {tail!r} has the role {role!r}; choose one of {', '.join(ROLES)}.")
    modules = dict(model.named_modules())
    kept: set[str] = set()
    rules = {n: p.rule for n, m in modules.items() if isinstance(p := getattr(m, "placement", None), Placement)}
    nowhere, config = depth_rule("none", 1), getattr(model, "config", None)
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        parts = path.split(".") if path else []
        parents = [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
        rule = next((rules[p] for p in parents if p in rules), nowhere)
        try:
            what, mean, scale = _what([modules[p] for p in parents], parts, leaf, tails)
        except InputError:
            if not getattr(model, "keeps_unknown_parameters", False):
                raise
            kept.add(path)
        if path in kept:  # a bias is treated as its matrix is
            what, mean, scale = "own", 0.0, 1.0
        layout = what.of(config) if isinstance(what, Fused) else Fused((what,))
        yield Known(name, parameter, layout, rule, mean, scale)


def _what(
    owners: list[nn.Module], path: list[str], leaf: str, tails: Roles
) -> tuple[Role | Fused, float | Tensor, float]:
    """What a parameter does, its mean and its scale. `owners`: its module, that module's parent, and so on."""
    owner, full = owners[0], path if leaf == "weight" else [*path, leaf]
    if isinstance(owner, Norm) and leaf in owner.STARTS:
        return "norm", owner.STARTS[leaf], 1.0
    if isinstance(owner, Owned):
        placement: Any = owners[1]
        if path[-1] == "matrices":
            return "projection", 0.0, placement.projections()[leaf].scale
        with torch.device("cpu"):  # on any device of the model, because a meta tensor has no value
            return "gain", placement.own_gains()[leaf], 1.0
    for start in range(len(full)):  # the longest end of the path first
        if (what := tails.get(".".join(full[start:]))) is not None:
            return what, 1.0 if what == "norm" else 0.0, 1.0
    if leaf.endswith(("bias", "sinks")):  # GPT-OSS's attention sinks are offsets too
        return "bias", 0.0, 1.0
    if isinstance(owner, (Norm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) or type(owner).__name__.endswith("Norm"):
        gain = next((p.norm_gain(path[-1]) for p in owners[1:2] if isinstance(p, Placement)), 1.0)
        return "norm", getattr(owner, "unit_gain", 1.0) - 1.0 + gain, 1.0
    if isinstance(owner, nn.Embedding):
        return "embedding", 0.0, 1.0
    raise InputError(
        f"no role is known for the parameter {'.'.join([*path, leaf])!r}: say what it does by the tail of its path, "
        f"roles={{{'.'.join(full[-2:])!r}: …}}, or name its module one of {', '.join(LLAMA)}."
    )
