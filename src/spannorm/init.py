"""What a parameter's role decides: its first value, its learning rate, its weight decay.

Works on any module whose parameters carry the Llama family's names and whose blocks hold a `Placement` under the
name `placement`. Each tensor's standard-normal draw is seeded by (seed, parameter name), so that models which
differ in placement or depth rule share a body and differ by std alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from spannorm.errors import InputError
from spannorm.placements import Placement
from spannorm.scaling import BASE_INITS, DepthRule, Role, base_std, cut_std, depth_rule

ROLE_OF_MODULE: dict[str, Role] = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "attn_out",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "gate": "router",
}
ROLE_OF_PARAMETER: dict[str, Role] = {
    "attn_scale": "gain",
    "ffn_scale": "gain",
    "head_scale": "norm",
    "bias": "bias",
    # Of all experts at once, (experts, fan-out, fan-in); gate and up, one above the other, have one std in every rule.
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
FUSED: dict[str, int] = {"gate_up_proj": 2}
"""How many matrices a parameter stacks along its fan-out."""

NO_DECAY: frozenset[Role] = frozenset({"norm", "bias", "gain", "embedding"})


def role_of(name: str) -> Role:
    """The role of a parameter, read off its dotted name.

    Raises:
        InputError: no role is known for that name.
    """
    module, _, leaf = name.rpartition(".")
    module = module.rpartition(".")[2]
    if leaf in ROLE_OF_PARAMETER:
        return ROLE_OF_PARAMETER[leaf]
    if leaf == "weight" and module.endswith("norm"):
        return "norm"
    if module in ROLE_OF_MODULE:
        return ROLE_OF_MODULE[module]
    raise InputError(
        f"no role is known for the parameter {name!r}: name its module one of {', '.join(ROLE_OF_MODULE)}."
    )


@dataclass(frozen=True)
class Draw:
    """A parameter's initial distribution: N(mean, σ²), drawn again beyond ±`cut`·σ, constant where σ is 0."""

    role: Role
    mean: float
    sigma: float
    cut: float | None = None

    @property
    def std(self) -> float:
        """What the values' std should be."""
        return self.sigma if self.cut is None else self.sigma * cut_std(self.cut)


def _named_roles(model: nn.Module) -> Iterator[tuple[str, Tensor, Role, DepthRule]]:
    """Each parameter once, with its role and the depth rule of the block it stands in (`none` outside)."""
    rules = {name: m.placement.rule for name, m in model.named_modules() if isinstance(_placement(m), Placement)}
    outside = depth_rule("none", 1)
    known: dict[str, Role] = getattr(model, "parameter_roles", {})  # a rewired model brings its family's own
    for name, parameter in model.named_parameters():
        block = next((b for b in rules if name.startswith(f"{b}." if b else "")), None)
        role = known[name] if name in known else role_of(name)
        yield name, parameter, role, outside if block is None else rules[block]


def _placement(module: nn.Module) -> object:
    return getattr(module, "placement", None)


def init_plan(
    model: nn.Module,
    *,
    width: int,
    base_init: str = "fan_in",
    initializer_range: float = 0.02,
    tied: bool = False,
) -> dict[str, Draw]:
    """How every parameter is to be drawn: base σ by role, times the depth rule's factor for that role.

    Works on meta device: only names and shapes are read. Arguments are those of `spannorm.scaling.base_std`.
    """
    plan = {}
    for name, parameter, role, rule in _named_roles(model):
        fan_out, fan_in = parameter.shape[-2:] if parameter.ndim > 1 else (1, 1)
        fan_out //= FUSED.get(name.rpartition(".")[2], 1)
        sigma = base_std(
            role, fan_in, fan_out, width=width, base_init=base_init, initializer_range=initializer_range, tied=tied
        )
        mean = {"norm": 1.0, "gain": rule.gain}.get(role, 0.0)
        plan[name] = Draw(role, mean, sigma * rule.init.get(role, 1.0), BASE_INITS[base_init] if sigma else None)
    return plan


@torch.no_grad()
def init_weights_(model: nn.Module, plan: dict[str, Draw], *, seed: int = 0, prefix: str = "") -> None:
    """Draw parameters as planned, in place; names absent from the plan are left alone.

    Args:
        plan: from `init_plan`.
        seed: with the parameter's name it seeds the draw, on CPU in fp32 whatever the parameter's device and dtype.
        prefix: taken off a name before it seeds, so that a body draws the same alone and inside a causal LM.
    """
    for name, parameter in model.named_parameters():
        if name in plan:
            draw = plan[name]
            value = torch.full(parameter.shape, draw.mean, dtype=torch.float32, device="cpu")
            if draw.sigma:
                value += draw.sigma * standard_normal(parameter.shape, seed, name.removeprefix(prefix), draw.cut)
            if isinstance(parameter, DTensor):  # each process keeps its shard of the same draw
                value = distribute_tensor(
                    value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.copy_(value)


def standard_normal(shape: torch.Size, seed: int, name: str, cut: float | None = None) -> Tensor:
    """N(0, 1) of a shape, fp32 on CPU, fixed by (seed, name) alone; values beyond ±cut are drawn again."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    draw = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    while cut is not None and (beyond := draw.abs() > cut).any():
        again = torch.randn(int(beyond.sum()), generator=generator, dtype=torch.float32, device="cpu")
        draw[beyond] = again
    return draw


@dataclass(frozen=True)
class ReceiptRow:
    """One tensor: what its draw should be and what it is."""

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

    @property
    def mismatches(self) -> tuple[ReceiptRow, ...]:
        return tuple(row for row in self.rows if not row.ok)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"{'parameter':{width}}  role       expected std   actual std"]
        for row in self.rows:
            flag = "" if row.ok else "  ✗ mismatch"
            lines.append(f"{row.name:{width}}  {row.expected.role:9}  {row.expected.std:12.6g} {row.std:12.6g}{flag}")
        bad = len(self.mismatches)
        return "\n".join([*lines, f"{len(self.rows)} tensors, {bad or 'no'} mismatch{'' if bad == 1 else 'es'}"])


@torch.no_grad()
def init_receipt(model: nn.Module, plan: dict[str, Draw]) -> InitReceipt:
    """Hold a freshly drawn model against its plan.

    A drawn matrix of n elements passes when its mean and std lie within five standard errors, σ/√n and σ/√(2n), plus
    the rounding of its dtype; a constant must be constant. Of a parameter that holds many matrices (all experts') each
    must pass, and the row shows the one that is farthest off.

    Raises:
        InputError: the model is still on meta device and has no values to hold.
    """
    rows = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"{name} is on meta device: call to_empty and init_weights_ before asking for the receipt."
            )
        draw, matrices = plan[name], parameter.shape[0] if parameter.ndim == 3 else 1
        value = parameter.double().reshape(matrices * FUSED.get(name.rpartition(".")[2], 1), -1)
        means, stds, n = value.mean(1), value.std(1, correction=0), value.shape[1]
        rounding = 2 * torch.finfo(parameter.dtype).eps * max(abs(draw.mean), draw.std)
        mean_off = (means - draw.mean).abs() - 5 * draw.std / n**0.5 - rounding
        std_off = (stds - draw.std).abs() - 5 * draw.std / (2 * n) ** 0.5 - rounding
        off, worst = torch.maximum(mean_off, std_off).max(0)
        mean, std = means[worst].item(), stds[worst].item()
        rows.append(ReceiptRow(name, tuple(parameter.shape), draw, mean, std, off.item() <= 0))
    return InitReceipt(tuple(rows))


def matrices_of_blocks(model: nn.Module) -> list[Tensor]:
    """The 2-D weights of attention and feed-forward: what a matrix optimizer such as Muon is for."""
    outside = {"embedding", "head", "router", *NO_DECAY}
    return [p for _, p, role, _ in _named_roles(model) if p.ndim == 2 and role not in outside]


def parameter_groups(model: nn.Module, *, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups for AdamW, one per (learning rate, weight decay).

    Weight decay falls on matrices alone: not on norms, biases, learned gains and embeddings (nor on a head tied to
    one). Where the depth rule is `:init+lr` with factor c, the output matrices get learning rate c·η and decay λ/c:
    the Adam twin of the forward factor c (docs/depth_rules.md).
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for _, parameter, role, rule in _named_roles(model):
        if parameter.requires_grad:
            c = rule.learning_rate.get(role, 1.0)
            decay = 0.0 if role in NO_DECAY else weight_decay / c
            groups.setdefault((c * learning_rate, decay), []).append(parameter)
    return [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]
