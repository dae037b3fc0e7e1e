"""Norms inside a sublayer, beside its projections.

Tools that merge, quantize, replace or shard a projection look at its class, and do not know of a norm inside it. So a
projection stays a plain module, and the norm is a child of the sublayer, `<role>_norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spannorm.adopt import adopt
from spannorm.roles import Fused

READ_BY = {"attn_out": "attn_out", "ffn_down": "ffn_down", "head_scale": "attn_out"}
"""Inner norm → the projection whose input it normalizes. The others (q, k, v) normalize a projection's output."""


class HeadScale(nn.Module):
    """A gain for each head on the input of attention-out: (…, heads · channels)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x.unflatten(-1, (len(self.weight), -1)) * self.weight[:, None]).flatten(-2)


@dataclass(frozen=True)
class Site:
    """The norms around one projection, by role."""

    layout: Fused
    """The roles of the projection's rows."""
    reads: tuple[str, ...] = ()
    """Norms and scales on its input, in order."""
    writes: Mapping[Any, int] = field(default_factory=dict)
    """Norms on its output, and over how many channels each."""


class InnerNorms:
    """A sublayer that normalizes the inputs or outputs of its projections.

    Its class's own forward runs with a view of the module as `self`. In the view a projection includes its norms.
    """

    adopted: type[nn.Module]
    """The class whose forward this is."""
    sites: dict[str, Site]
    """Name of a projection → the norms around it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.adopted.forward(_Normed(self), *args, **kwargs)

    def normed(self, name: str) -> Callable[[Tensor], Tensor]:
        """A projection and its norms as one."""
        return partial(self._project, self.sites[name], getattr(self, name))

    def _project(self, site: Site, projection: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        for role in site.reads:
            x = getattr(self, f"{role}_norm")(x)
        y = projection(x)
        if not site.writes:
            return y
        parts = site.layout.split(y, -1)
        for role, channels in site.writes.items():
            part = parts[role]
            grouped = part.flatten(-2).unflatten(-1, (-1, channels))
            parts[role] = getattr(self, f"{role}_norm")(grouped).reshape(part.shape)
        values = list(parts.values())
        return (values[0] if len(values) == 1 else torch.cat(values, -1)).flatten(-2)


class _Normed:
    """A sublayer, except that its projections come with their norms."""

    def __init__(self, sublayer: Any) -> None:
        self.sublayer = sublayer

    def __getattr__(self, name: str) -> Any:
        return self.sublayer.normed(name) if name in self.sublayer.sites else getattr(self.sublayer, name)


def add_inner_norm(
    sublayer: Any, projection: str, layout: Fused, role: Any, over: str, heads: int, build: Callable[[int], nn.Module]
) -> None:
    """Put a norm beside a projection of a sublayer, in place.

    Args:
        sublayer: the module whose forward calls the projection.
        projection: its name there.
        layout: the roles of the projection's output.
        role: one of `Placement.inner_norms`.
        over: for q, k and v, `head` or `width`.
        heads: the number of heads of the role.
        build: channels → a norm.
    """
    if not isinstance(sublayer, InnerNorms):
        sublayer.sites = {}
        adopt(sublayer, InnerNorms)
    weight = layout.matrix(getattr(sublayer, projection).weight)
    site = sublayer.sites.get(projection, Site(layout))
    if role in READ_BY:  # a scale per head comes before a norm over all of them
        site = replace(site, reads=tuple(sorted({*site.reads, role}, key=lambda r: r != "head_scale")))
        norm = HeadScale(torch.ones_like(weight[0, :heads])) if role == "head_scale" else build(weight.shape[1])
    else:
        width = layout.split(weight[:, 0], -1)[role].numel()
        channels = width // heads if over == "head" else width
        site, norm = replace(site, writes={**site.writes, role: channels}), build(channels)
    sublayer.sites[projection] = site
    sublayer.add_module(f"{role}_norm", norm)
