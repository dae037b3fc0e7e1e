"""The parts of a rewired model: each class overrides the family's own class on one instance."""

from __future__ import annotations

from functools import wraps
from inspect import signature
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from spannorm.errors import InputError
from spannorm.norms import Norm, scaled_add
from spannorm.placements import Placement
from spannorm.rewiring.families import Family
from spannorm.shapes import State, Stream


class FamilyNorm(Norm):
    """The family's norm with its weights and its rounding, but called like ours: add first, then normalize."""

    def add_norm(self, x: Stream, f: Stream | None, *, return_sum: bool, **scales: Any) -> Any:
        total = x if f is None else scaled_add(x, f, **scales)
        normed = super(Norm, self).forward(total)
        return (normed, total) if return_sum else normed

    def extra_repr(self) -> str:
        return super(Norm, self).extra_repr()


class RewiredLayer:
    """A decoder layer whose placement calls the family's own attention and feed-forward."""

    placement: Placement
    family: Family
    argument_names: list[str]
    """The names of the layer's arguments after the hidden states, because GPT-2 passes some by position."""
    embedding_norm: nn.Module | None
    """In the first layer, if the placement normalizes the embedding."""
    last_norm: nn.Module | None
    """In the last layer, if the placement has a final norm and the family has none."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(self.argument_names, args, strict=False))
        row, seen = self.family, {}  # type: ignore[var-annotated]
        for name in row.unread:
            if kwargs.get(name) is not None:
                raise InputError(f"the audit that rewired this model saw nothing read {name!r}: it must be None.")

        def attn(x: Stream) -> Stream:
            return self._branch("attn", row.attention, x, kwargs, seen)

        def ffn(x: Stream) -> Stream:
            return self._branch("ffn", row.ffn, x, {} if not row.steps else kwargs, seen)

        if self.embedding_norm is not None:
            hidden_states = self.embedding_norm(hidden_states)
        x = self.placement(hidden_states, attn, ffn)
        if self.last_norm is not None:
            x = self.last_norm(x)
        if row.returns is None:
            return x
        return x, *(kwargs.get(w) if kind == "argument" else w if kind == "value" else seen[w][i]
                    for kind, w, i in row.returns)  # fmt: skip

    def read(self, x: State) -> Stream:
        """What attention reads before its norm, of what comes into the layer."""
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return self.placement.read(self.placement.enter(x) if self.placement.is_first else x)

    def _branch(self, name: str, path: str, x: Stream, kwargs: dict[str, Any], seen: dict[str, Any]) -> Stream:
        steps = self.family.steps.get(name, ())
        if steps:
            f = x
            for step in steps:
                f = step(self, f, x, kwargs, self.argument_names, seen)
            f = f.reshape(x.shape)
        else:
            output = getattr(self, path)(x, **kwargs)
            f = output[0] if isinstance(output, tuple) else output
        if name in self.family.dropouts:
            f = getattr(self, self.family.dropouts[name])(f)
        return f if self.family.multiplier is None else f * getattr(self, self.family.multiplier)


class RewiredBody:
    """The base model. Its hidden states are as in our own models, for any number of streams.

    `hidden_states` are the input of each layer's attention before its norm, and the head's input: each (batch, seq,
    hidden).
    """

    config: Any
    layer_path: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own, theirs = RewiredBody.forward, super().forward  # type: ignore[misc]
        names = list(signature(theirs).parameters)[1:]  # without self
        at = names.index("return_dict") if "return_dict" in names else None

        @wraps(theirs)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # clients read the family's signature
            # CPM-Ant passes all by position, and `return_dict` is changed on the way
            by_name = {} if at is None else dict(zip(names[at : len(args)], args[at:], strict=True))
            return own(self, *args[:at], **by_name, **kwargs)

        cls.forward = forward  # type: ignore[method-assign]

    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        # Transformers records what goes into the first layer and what comes out of each, or None where only some are
        # asked for, and puts what the head reads in the place of the last
        outputs = super().forward(*args, return_dict=True, **kwargs)  # type: ignore[misc]
        if outputs.get("hidden_states"):
            states, layers = outputs["hidden_states"], attrgetter(self.layer_path)(self)
            # given indices, Transformers 5.17 leaves out what goes into the first layer
            layers = layers[max(0, len(layers) + 1 - len(states)) :]
            read = [x if x is None else layer.read(x) for layer, x in zip(layers, states, strict=False)]
            outputs["hidden_states"] = (*read, *states[len(read) :])
        as_tuple = (self.config.return_dict if return_dict is None else return_dict) is False
        return outputs.to_tuple() if as_tuple else outputs


class NormedExperts:
    """Fused experts with one norm, shared by all experts, on the input of FFN-down."""

    config: Any
    input_norm: nn.Module

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.input_norm(super()._apply_gate(gate_up))  # type: ignore[misc]

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        how = self.config._experts_implementation
        if x.dtype == torch.float64 and how in ("eager", "grouped_mm"):  # which grouped_mm does not take
            return batched_mm_experts_forward(self, x, *args)
        # most families' eager loop gates in line and would pass the norm by
        return grouped_mm_experts_forward(self, x, *args) if how == "eager" else super().forward(x, *args)  # type: ignore[misc]
