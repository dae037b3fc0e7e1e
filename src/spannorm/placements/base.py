"""What every placement is: a block-level object that takes two opaque sublayers.

    placement(x, attn, ffn)        attn, ffn: Tensor → Tensor, shape (batch, seq, hidden)

In the equations `N` is a norm with a learned gain, `A` attention, `F` the feed-forward, `x` the block's input, `h`
the state between the two sublayers, `x'` the block's output; `L` is the number of blocks, `b` this block's index
from 0. `c` is the factor on a branch's output, before it is added to the skip. A `:forward` depth rule sets it, for
attention and for the FFN; without such a rule it is 1 or a learned gain.
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
    """What a placement decides for a whole stack."""

    kinds: Mapping[int, type[Placement]]
    """First block → the class of the blocks from there on; one entry unless placements are mixed over depth."""
    embedding_norm: bool
    """Whether the embedding is normalized once, before block 0, by the model."""


class Projection(NamedTuple):
    """A matrix that a placement owns. Its std is `scale` × the base std of the role `projection`; 0 gives zeros."""

    fan_out: int
    fan_in: int
    scale: float = 1.0


class Owned(nn.Module):
    """Learned parameters of a placement that are not in its norms, by name."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value.clone()))

    def forward(self, name: str) -> Tensor:
        """One of them. It is a call so that tools that keep weights elsewhere (offload, ZeRO-3) can load them first."""
        value: Tensor = getattr(self, name)
        return value


class Placement(nn.Module, ABC):
    """The norms, skips, branch factors and learned parameters of one block.

    Args:
        hidden_size: channels of the residual stream.
        layer_idx: this block's index, from 0.
        num_layers: blocks in the stack. All constants follow from it and `layer_idx`.
        depth_rule: a name of `spannorm.scaling.depth_rule`; None means `default_depth_rule`.
        norm: `rmsnorm` or `layernorm`; `dyt` where `norms_only_reads`.
        eps: the norms' epsilon.
        options: the placement's own options, which are the keywords of `layout`.

    Raises:
        InputError: an unknown rule or norm, a block outside the stack, `:gain` without a norm on the branch's output,
            `dyt` where it is not allowed.
    """

    default_depth_rule: ClassVar[str] = "none"
    recommended_base_init: ClassVar[str] = "normal"
    """The base init of the method's own recipe. A comparison on a common body uses one base init for all methods."""
    final_norm: ClassVar[bool]
    """Whether the stack needs a norm between its last block and the head. It belongs to the model."""
    inner_norms: ClassVar[Mapping[str, Literal["head", "width"]]] = {}
    """Norms inside a sublayer: the code that builds the sublayer must add them.

    Keys: q, k, v (on the projection's output), attn_out, ffn_down (on the projection's input), head_scale (a gain per
    head before attn_out). Value: whether the norm is over each head alone or over the whole width."""
    output_norms: ClassVar[Mapping[str, Branch]] = {}
    """The norms on a branch's output, and the branch of each. A depth rule's `:gain` sets their initial gain."""

    norms_only_reads: ClassVar[bool] = False
    """Whether every norm is on a sublayer's input, and none on the stream or on a branch's output. Such norms need not
    fix a scale, so `dyt` is allowed."""

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
            for name in gains.keys() & self.__dict__.keys():  # the constant that a learned gain replaces
                delattr(self, name)
            # Transformers' Trainer decides weight decay by name: parameters under `…_norm` have none
            self.gains_norm = Owned(gains)
        if projections := self.projections():
            drawn = {n: torch.randn(p.fan_out, p.fan_in) * p.scale * p.fan_in**-0.5 for n, p in projections.items()}
            self.matrices = Owned(drawn)
        self._owner_of = {**dict.fromkeys(gains, "gains_norm"), **dict.fromkeys(projections, "matrices")}
        self.add = Add()
        for name in self.norms():
            self.add_module(name, build_norm(norm, hidden_size, eps, gain=self.norm_gain(name)))
        reason = self.discouraged(self.rule)
        if reason is not None and layer_idx == 0:
            warnings.warn(f"{type(self).__name__} with depth rule {self.rule.name!r}: {reason}", stacklevel=2)

    @classmethod
    def layout(cls, num_layers: int) -> Layout:
        """What the placement decides for a whole stack. Its own options are keywords here, and are checked here."""
        return Layout({0: cls}, embedding_norm=False)

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """The placement's own options, which are the keywords of `layout`, with their defaults."""
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

        `block` reads them as attributes. They have no weight decay. A number becomes a parameter of one element,
        because FSDP2 cannot shard a parameter without a dimension.
        """
        return {}

    def own_gains(self) -> dict[str, Tensor]:
        """`gains`, and before them one gain per branch if the depth rule learns them."""
        size = 1 if self.rule.learned == "scalar" else self.hidden_size
        learned = ("attn_scale", "ffn_scale") if self.rule.learned else ()
        gains = {**{name: torch.full((size,), self.rule.gain) for name in learned}, **self.gains()}
        return {name: torch.atleast_1d(value) for name, value in gains.items()}

    def __getattr__(self, name: str) -> Any:
        owner = self.__dict__.get("_owner_of", {}).get(name)
        return super().__getattr__(name) if owner is None else self.get_submodule(owner)(name)

    def projections(self) -> dict[str, Projection]:
        """The matrices that the method owns, by name. Their role is `projection`."""
        return {}

    def discouraged(self, rule: DepthRule) -> str | None:
        """Why the method's authors warn against a depth rule, with the source; None if they do not."""
        return None

    @property
    def is_first(self) -> bool:
        return self.layer_idx == 0

    @property
    def is_last(self) -> bool:
        return self.layer_idx == self.num_layers - 1

    def forward(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> State:
        """One block. The first also calls `enter`, the last also calls `exit`."""
        attn, ffn = partial(_answer, "attention", attn), partial(_answer, "the feed-forward", ffn)
        if self.is_first:
            x = self.enter(x)
        x = self.block(x, attn, ffn)
        return self.exit(x) if self.is_last else x

    @abstractmethod
    def block(self, x: Stream, attn: Sublayer, ffn: Sublayer) -> State:
        """The placement's equation."""

    def enter(self, x: Stream) -> State:
        """Embedding → the state that the blocks carry. A placement with several streams creates them here."""
        return x

    def exit(self, x: Stream) -> State:
        """The state that the blocks carry → the input of the final norm or the head."""
        return x

    def read(self, x: State) -> Stream:
        """The input of the block's attention, before its norm.

        Args:
            x: the state that enters `block`. For block 0 it is the output of `enter`.

        Returns:
            (batch, seq, hidden); with one stream, the stream itself.
        """
        return x

    def unit(self, x: State, dims: int = 1) -> State:
        """`x` divided by its RMS over the last `dims` dimensions: a norm without a gain, for weights of streams."""
        return F.rms_norm(x, x.shape[-dims:], eps=self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self.own_gains():  # in version 0.1 a gain was on the placement itself, without a dimension
            if (value := state_dict.pop(prefix + name, None)) is not None:
                state_dict[f"{prefix}gains_norm.{name}"] = torch.atleast_1d(value)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"block {self.layer_idx} of {self.num_layers}, depth_rule={self.rule.name!r}"


def _answer(name: str, sublayer: Sublayer, x: Stream) -> Stream:
    """A sublayer's output, after a check: a norm would read None as "no branch", and a sum would broadcast."""
    f = sublayer(x)
    if not hasattr(f, "shape") or (isinstance(f, Tensor) and f.shape != x.shape):
        what = f"a tensor of shape {tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
        raise InputError(f"{name} must return one tensor of the shape it was given, {tuple(x.shape)}; got {what}.")
    return f


def check_norm(kind: type[Placement], norm: str) -> None:
    """Refuse `dyt`, which fixes no scale, if one of the placement's norms must fix one."""
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
