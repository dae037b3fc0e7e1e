"""What a parameter's role decides: its first value, its learning rate, its weight decay.

Works on any module whose blocks hold a `Placement` under the name `placement`. roles.py finds the role of each
parameter. The seed of each tensor's standard-normal draw is (seed, parameter name). So two models that differ only in
placement or depth rule draw the same numbers, and differ only in their std.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spannorm.errors import InputError
from spannorm.roles import NO_DECAY, Fused, Roles, known_parameters
from spannorm.scaling import BASE_INITS, Role, base_std, cut_std


@dataclass(frozen=True)
class Draw:
    """A parameter's initial distribution: N(mean, σ²). Values beyond ±`cut`·σ are drawn again; σ = 0 is a constant."""

    role: Role
    mean: float | Tensor
    sigma: float
    cut: float | None = None
    fused: tuple[Fused, tuple[float, ...]] | None = None
    """For several matrices stored as one: their layout, and the σ of each. `role` and `sigma` are the last one's."""

    @property
    def std(self) -> float:
        """What the values' std should be."""
        return self.sigma if self.cut is None else self.sigma * cut_std(self.cut)

    def matrices(self, stored: Tensor) -> Iterator[tuple[Draw, Tensor]]:
        """The draw of each matrix that a parameter holds, and its values, a view."""
        if self.fused is None:
            yield self, stored
            return
        layout, sigmas = self.fused
        for sigma, (role, view) in zip(sigmas, layout.split(layout.matrix(stored)).items(), strict=True):
            yield replace(self, role=role, sigma=sigma, fused=None), view


def init_plan(
    model: nn.Module,
    *,
    roles: Roles | None = None,
    width: int | None = None,
    base_init: str = "fan_in",
    initializer_range: float = 0.02,
    tied: bool | None = None,
) -> dict[str, Draw]:
    """How every parameter is to be drawn: base σ by role, times the depth rule's factor for that role.

    Works on meta device, because it reads only names and shapes.

    Args:
        roles: what the matrices of your model do, by the ends of their paths; see `spannorm.roles.known_parameters`.
        width: the model's hidden size. None: it is read from the configuration, or else from a placement.
        base_init, initializer_range: as in `spannorm.scaling.base_std`.
        tied: whether embedding and head share one matrix. None: it is read from the model.

    Raises:
        InputError: a parameter without a role; no `width` where there is neither a configuration nor a placement.
    """
    owners: list[Any] = [getattr(model, "config", None), *(getattr(m, "placement", None) for m in model.modules())]
    if width is None:
        width = next((owner.hidden_size for owner in owners if hasattr(owner, "hidden_size")), None)
    if width is None:
        raise InputError(
            f"{type(model).__name__} has neither a configuration nor a placement: give init_plan a `width`."
        )
    if tied is None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        tied = any(id(m.weight) in tables for m in model.modules() if isinstance(m, nn.Linear))
    base: dict[str, Any] = {
        "width": width,
        "base_init": base_init,
        "initializer_range": initializer_range,
        "tied": tied,
        "num_layers": next((owner.num_layers for owner in owners[1:] if hasattr(owner, "num_layers")), 1),
    }
    plan: dict[str, Draw] = {}
    for k in known_parameters(model, roles):
        if k.role == "own":
            continue
        matrix = k.layout.matrix(k.parameter)
        fan_out, fan_in = matrix.shape[-2:] if matrix.ndim > 1 else (1, 1)
        rows: dict[Role, int] = {k.role: fan_out}
        if len(k.layout.roles) > 1:
            rows = {role: part.numel() for role, part in k.layout.split(torch.empty(fan_out), -1).items()}
        sigmas = tuple(
            base_std(role, fan_in, n, **base) * k.rule.init.get(role, 1.0) * k.scale for role, n in rows.items()
        )
        fused = (k.layout, sigmas) if len(sigmas) > 1 or k.layout.transposed else None
        plan[k.name] = Draw(k.role, k.mean, sigmas[-1], BASE_INITS[base_init] if any(sigmas) else None, fused)
    return plan


@torch.no_grad()
def init_weights_(model: nn.Module, plan: dict[str, Draw], *, seed: int = 0, prefix: str = "") -> None:
    """Draw parameters as planned, in place. Parameters that are not in the plan stay as they are.

    Args:
        plan: from `init_plan`.
        seed: seeds each draw together with the parameter's name. The draw is on CPU in fp32, for any device and dtype.
        prefix: removed from a name before it seeds, so that a body draws the same alone and inside a causal LM.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor  # takes half a second, and only this needs it

    for name, parameter in model.named_parameters():
        if name in plan:
            draw = plan[name]
            value = torch.as_tensor(draw.mean, dtype=torch.float32, device="cpu").expand(parameter.shape).clone()
            if draw.sigma:
                normal = standard_normal(parameter.shape, seed, name.removeprefix(prefix), draw.cut)
                for one, part in draw.matrices(normal):
                    part.mul_(one.sigma)
                value += normal
            if isinstance(parameter, DTensor):  # each process keeps its shard of the same draw
                value = distribute_tensor(
                    value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.copy_(value)


def standard_normal(shape: torch.Size, seed: int, name: str, cut: float | None = None) -> Tensor:
    """N(0, 1), fp32 on CPU. Depends on (seed, name) and the shape alone. Values beyond ±cut are drawn again."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    draw = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    while cut is not None and (beyond := draw.abs() > cut).any():
        again = torch.randn(int(beyond.sum()), generator=generator, dtype=torch.float32, device="cpu")
        draw[beyond] = again
    return draw


@dataclass(frozen=True)
class ReceiptRow:
    """One tensor: its planned distribution and its actual mean and std."""

    name: str
    shape: tuple[int, ...]
    expected: Draw
    mean: float
    std: float
    ok: bool


@dataclass(frozen=True)
class InitReceipt:
    """Expected against actual mean and std of every parameter; `print` it, or assert `not receipt.mismatches`."""

    rows: tuple[ReceiptRow, ...]
    kept: tuple[str, ...] = ()
    """Parameters that are not in the plan: they keep the values that their own modules drew."""

    @property
    def mismatches(self) -> tuple[ReceiptRow, ...]:
        return tuple(row for row in self.rows if not row.ok)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"{'parameter':{width}}  role       expected std   actual std"]
        for row in self.rows:
            flag = "" if row.ok else "  ✗ mismatch"
            lines.append(f"{row.name:{width}}  {row.expected.role:9}  {row.expected.std:12.6g} {row.std:12.6g}{flag}")
        lines += [f"{name:{width}}  not drawn here: it keeps its own module's init" for name in self.kept]
        bad = len(self.mismatches)
        return "\n".join([*lines, f"{len(self.rows)} tensors, {bad or 'no'} mismatch{'' if bad == 1 else 'es'}"])


@torch.no_grad()
def init_receipt(model: nn.Module, plan: dict[str, Draw]) -> InitReceipt:
    """Compare a freshly drawn model with its plan.

    A drawn matrix of n elements passes if its mean and std are within five standard errors, σ/√n and σ/√(2n), plus
    the rounding of its dtype. A constant must be constant. If a parameter holds several matrices (those of all experts,
    or fused ones), each must pass; the row shows the one with the largest difference.

    Raises:
        InputError: the model is still on meta device, so it has no values to compare.
    """
    rows, kept = [], []
    for name, parameter in model.named_parameters():
        if name not in plan:
            kept.append(name)
            continue
        if parameter.is_meta:
            raise InputError(
                f"{name} is on meta device: call to_empty and init_weights_ before asking for the receipt."
            )
        mean = torch.as_tensor(plan[name].mean, dtype=torch.float64, device=parameter.device)
        found = []
        for draw, values in plan[name].matrices(parameter.double() - mean):
            values = values.reshape(len(parameter) if parameter.ndim == 3 else 1, -1)
            means, stds, n = values.mean(1), values.std(1, correction=0), values.shape[1]
            rounding = 2 * torch.finfo(parameter.dtype).eps * max(mean.abs().max().item(), draw.std)
            mean_off = means.abs() - 5 * draw.std / n**0.5 - rounding
            std_off = (stds - draw.std).abs() - 5 * draw.std / (2 * n) ** 0.5 - rounding
            off, at = torch.maximum(mean_off, std_off).nan_to_num(torch.inf).max(0)
            centre = mean.item() if mean.ndim == 0 else 0.0
            found.append((off.item(), draw, centre + means[at].item(), stds[at].item()))
        worst, draw, centre, std = max(found, key=lambda f: f[0])
        rows.append(ReceiptRow(name, tuple(parameter.shape), draw, centre, std, worst <= 0))
    return InitReceipt(tuple(rows), tuple(kept))


def matrices_of_blocks(model: nn.Module, roles: Roles | None = None) -> list[Tensor]:
    """The 2-D weights of attention and feed-forward, for a matrix optimizer such as Muon."""
    outside = {"embedding", "head", "router", "projection", "own", *NO_DECAY}
    return [k.parameter for k in known_parameters(model, roles) if k.parameter.ndim == 2 and k.role not in outside]


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, eps: float = 1e-8, roles: Roles | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups for AdamW, one per (learning rate, weight decay, ε).

    Only matrices have weight decay. Norms, biases, learned gains and embeddings (with a head tied to one) have none.
    Learning rate, decay and ε are multiplied by the depth rule's factors for the parameter's role. For example, under
    `:init+lr` with factor c the output matrices get learning rate c·η and decay λ/c, which under Adam is equal to a
    forward factor c (docs/depth_rules.md). A group has `eps` only if a rule changes it.

    Args:
        eps: Adam's ε, which `completep` and `depth-mup` scale.
        roles: as in `init_plan`.
    """
    groups: dict[tuple[float, float, float], list[Tensor]] = {}
    for k in known_parameters(model, roles):
        if k.parameter.requires_grad:
            decay = (
                0.0
                if k.role in NO_DECAY or (k.role == "own" and k.parameter.ndim < 2)
                else weight_decay * k.rule.weight_decay.get(k.role, 1.0)
            )
            rate = learning_rate * k.rule.learning_rate.get(k.role, 1.0)
            groups.setdefault((rate, decay, k.rule.eps.get(k.role, 1.0)), []).append(k.parameter)
    return [
        {"params": ps, "lr": rate, "weight_decay": decay, **({} if factor == 1.0 else {"eps": factor * eps})}
        for (rate, decay, factor), ps in groups.items()
    ]
