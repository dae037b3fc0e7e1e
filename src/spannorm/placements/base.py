"""What every placement is: a block-level object that takes two opaque sublayers.

    placement(x, attn, ffn)        attn, ffn: Tensor → Tensor, shape (batch, seq, hidden)

In the equations `N` is a norm with a learned gain, `A` attention, `F` the feed-forward, `x` the block's input, `h`
what stands between the two sublayers, `x'` the block's output; `L` is the number of blocks, `b` this block's index
from 0. `c` is the branch factor of a `:forward` depth rule, of attention or of the FFN (1 otherwise, or a learned
gain); it multiplies what is added to the skip.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, signature
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spannorm.errors import InputError
from spannorm.norms import Add, Norm, Scale, build_norm
from spannorm.scaling import Branch, DepthRule
from spannorm.scaling import depth_rule as work_out
from spannorm.shapes import State, Stream

Sublayer = Callable[[Stream], Stream]


class Layout(NamedTuple):
    """What a placement says of a whole stack."""

    kinds: Mapping[int, type[Placement]]
    """First block → the class of the blocks from there on; one entry unless placements are mixed over depth."""
    embedding_norm: bool
    """Whether the embedding is normalized once, before block 0, by the model."""


class Projection(NamedTuple):
    """A matrix that a placement owns: drawn with std `scale` × the base std of the role `projection`, 0 for zeros."""

    fan_out: int
    fan_in: int
    scale: float = 1.0


class Gains(nn.Module):
    """The learned parameters of a placement besides its norms, by name."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value.clone()))

    def forward(self, name: str) -> Tensor | None:
        """One of them: by a call, so that whoever keeps weights elsewhere (offload, ZeRO-3) brings them first."""
        return self._parameters[name]


class Placement(nn.Module, ABC):
    """The norms, skips, branch factors and learned parameters of one block.

    Args:
        hidden_size: channels of the residual stream.
        layer_idx: this block's index, from 0.
        num_layers: blocks in the stack; with `layer_idx` it fixes every constant.
        depth_rule: a name of `spannorm.scaling.depth_rule`; None means `default_depth_rule`.
        norm: `rmsnorm` or `layernorm`; `dyt` where `norms_only_reads`.
        eps: the norms' epsilon.
        options: the placement's own, those that `layout` takes.

    Raises:
        InputError: an unknown rule or norm, a block outside the stack, `:gain` without a norm on the branch's output,
            `dyt` where it does not fit.
    """

    default_depth_rule: ClassVar[str] = "none"
    recommended_base_init: ClassVar[str] = "normal"
    """The base init of the method's own recipe; a comparison on a common body uses the same one for all."""
    final_norm: ClassVar[bool]
    """Whether the stack needs a norm between its last block and the head. It belongs to the model."""
    inner_norms: ClassVar[Mapping[str, Literal["head", "width"]]] = {}
    """Norms that live inside a sublayer, put there by whoever builds it: which of q, k, v (the projection's output),
    attn_out, ffn_down (the projection's input), head_scale (a gain per head before attn_out), and whether a norm goes
    over each head by itself or over the whole width."""
    output_norms: ClassVar[Mapping[str, Branch]] = {}
    """The norms that stand on a branch's output, and whose: a depth rule's `:gain` sets their initial gain."""

    norms_only_reads: ClassVar[bool] = False
    """Whether every norm stands on what a sublayer reads, and none in the stream's way or on a branch's output. Then it
    need not fix a scale, and may be `dyt`."""

    attn_norm: Norm
    ffn_norm: Norm

    def __init__(
        self,
        *,
        hidden_size: int,
        layer_idx: int,
        num_layers: int,
        depth_rule: str | None = None,
        norm: str = "rmsnorm",
        eps: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__()
        self.rule = work_out(self.default_depth_rule if depth_rule is None else depth_rule, num_layers, layer_idx)
        check_output_norms(type(self), self.rule)
        check_norm(type(self), norm)
        self.options = {**self.option_defaults(), **options}
        self.embedding_norm = self.layout(num_layers, **options).embedding_norm
        self.hidden_size, self.layer_idx, self.num_layers = hidden_size, layer_idx, num_layers
        self.norm_name, self.eps = norm, eps
        self.attn_scale: Scale = self.rule.forward.get("attn", 1.0)
        self.ffn_scale: Scale = self.rule.forward.get("ffn", 1.0)
        if gains := self.own_gains():
            for name in gains.keys() & self.__dict__.keys():  # the number that a learned gain stands in for
                delattr(self, name)
            # Transformers' Trainer decides weight decay by name: it leaves alone what stands under `…_norm`
            self.gains_norm = Gains(gains)
        for name, p in self.projections().items():
            setattr(self, name, nn.Parameter(torch.randn(p.fan_out, p.fan_in) * p.scale * p.fan_in**-0.5))
        self.add = Add()
        for name in self.norms():
            self.add_module(name, build_norm(norm, hidden_size, eps, gain=self.norm_gain(name)))
        reason = self.discouraged(self.rule)
        if reason is not None and layer_idx == 0:
            warnings.warn(f"{type(self).__name__} with depth rule {self.rule.name!r}: {reason}", stacklevel=2)

    @classmethod
    def layout(cls, num_layers: int) -> Layout:
        """What the placement says of a whole stack. Its own options are taken and checked here, by keyword."""
        return Layout({0: cls}, embedding_norm=False)

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """The placement's own options: those that `layout` takes by keyword, with their defaults."""
        own = signature(cls.layout).parameters.values()
        return {p.name: p.default for p in own if p.kind is Parameter.KEYWORD_ONLY}

    def norms(self) -> tuple[str, ...]:
        """The role names of this block's norms."""
        return "attn_norm", "ffn_norm"

    def norm_gain(self, name: str) -> float:
        """The initial gain of one of this block's norms."""
        return self.rule.output_gain.get(self.output_norms[name], 1.0) if name in self.output_norms else 1.0

    def gains(self) -> dict[str, Tensor]:
        """The method's own learned parameters by name, each with its initial value: numbers, vectors, small matrices.

        `block` reads them as attributes. Weight decay leaves them alone. A number becomes a parameter of one element,
        which FSDP2 can shard.
        """
        return {}

    def own_gains(self) -> dict[str, Tensor]:
        """`gains`, and before them those of a depth rule that learns one per branch."""
        size = 1 if self.rule.learned == "scalar" else self.hidden_size
        learned = ("attn_scale", "ffn_scale") if self.rule.learned else ()
        gains = {**{name: torch.full((size,), self.rule.gain) for name in learned}, **self.gains()}
        return {name: torch.atleast_1d(value) for name, value in gains.items()}

    def __getattr__(self, name: str) -> Any:
        gains = self.__dict__.get("_modules", {}).get("gains_norm")
        return gains(name) if gains is not None and name in gains._parameters else super().__getattr__(name)

    def projections(self) -> dict[str, Projection]:
        """The matrices that the method owns, by name; they have the role `projection`."""
        return {}

    def discouraged(self, rule: DepthRule) -> str | None:
        """Why the method's authors warn against a depth rule, with the source; None where they do not."""
        return None

    @property
    def is_first(self) -> bool:
        return self.layer_idx == 0

    @property
    def is_last(self) -> bool:
        return self.layer_idx == self.num_layers - 1

    def forward(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> State:
        """One block; the first also enters the stack's inner state, the last leaves it."""
        attn, ffn = partial(_answer, "attention", attn), partial(_answer, "the feed-forward", ffn)
        if self.is_first:
            x = self.enter(x)
        x = self.block(x, attn, ffn)
        return self.exit(x) if self.is_last else x

    @abstractmethod
    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> State:
        """The placement's equation."""

    def enter(self, x: Stream) -> State:
        """Embedding → the state the blocks carry. Further streams are opened here."""
        return x

    def exit(self, x: Stream) -> State:
        """The state the blocks carry → what the final norm or the head reads."""
        return x

    def read(self, x: State) -> Stream:
        """What the block's attention reads, before its norm, of the state that the block works on.

        Args:
            x: the state that enters `block`: block 0's is what `enter` makes of the embedding.

        Returns:
            (batch, seq, hidden), of one stream the stream itself.
        """
        return x

    def unit(self, x: State, dims: int = 1) -> State:
        """`x` over its RMS, taken over the last `dims` dimensions: a norm without a gain, for what weighs streams."""
        return F.rms_norm(x, x.shape[-dims:], eps=self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self.own_gains():  # up to 0.1 a gain stood on the placement itself, a number without a dimension
            if (value := state_dict.pop(prefix + name, None)) is not None:
                state_dict[f"{prefix}gains_norm.{name}"] = torch.atleast_1d(value)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"block {self.layer_idx} of {self.num_layers}, depth_rule={self.rule.name!r}"


def _answer(name: str, sublayer: Sublayer, x: Stream) -> Stream:
    """A sublayer's output, held to what it owes: a norm would take None for no branch, a sum stretch another shape."""
    f = sublayer(x)
    if not hasattr(f, "shape") or (isinstance(f, Tensor) and f.shape != x.shape):
        what = f"a tensor of shape {tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
        raise InputError(f"{name} must return one tensor of the shape it was given, {tuple(x.shape)}; got {what}.")
    return f


def check_norm(kind: type[Placement], norm: str) -> None:
    """Refuse `dyt`, which fixes no scale, where a norm must."""
    if norm == "dyt" and not kind.norms_only_reads:
        raise InputError(
            f"norm 'dyt' squashes each channel by itself and fixes no scale, so it may stand only on what a sublayer "
            f"reads, and {kind.__name__} has other norms too: choose a placement such as pre, lns or parallel, or the "
            "norm rmsnorm or layernorm."
        )


def check_output_norms(kind: type[Placement], rule: DepthRule) -> None:
    """Refuse a `:gain` rule for a placement that has no norm on that branch's output."""
    for branch in rule.output_gain:
        if branch not in kind.output_norms.values():
            raise InputError(
                f"depth rule {rule.name!r} sets the initial gain of the norm on the {branch} branch's output, and "
                f"{kind.__name__} has none there: choose a placement that has, such as peri, or a rule without `:gain`."
            )
