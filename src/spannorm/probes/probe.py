"""The probe: it measures placements, their norms and their sums, and changes nothing."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from spannorm.errors import InputError
from spannorm.probes.blocks import Given, Sublayer, find_placements, intercepting, read_out
from spannorm.probes.flow import Flow
from spannorm.probes.record import Means, Record
from spannorm.probes.statistics import (
    apart,
    exact,
    power,
    power_by_stream,
    spectrum,
    summed,
    token_cosine,
    tokens,
    unit,
)

_log = logging.getLogger("spannorm")

_Number = Callable[[list[float]], float]
"""A number computed from a vector of means."""


class Probe(AbstractContextManager["Probe"]):
    """Measures every forward and backward pass inside `with Probe(model) as probe:`, training steps included.

    The model's results stay bit-identical. The recomputation of activation checkpointing is not measured again.
    `probe.record()` is the mean over all passes since `with`, and over all ranks of torch.distributed.

    Args:
        model: any module whose blocks hold a `placement`; not compiled, because compiled code runs no hooks. If the
            model has several stacks, give the part that holds one: `Probe(model.encoder)`.
        similarity: compare every point with every other, in O(L²) time. Keeps a copy of all streams during a pass.
        rank: compute the singular values of every point, which takes about an eighth of a training step.
        spectrum: return the singular values too.

    Raises:
        InputError: the model has no placements, or not one complete stack.
    """

    def __init__(self, model: nn.Module, *, similarity: bool = True, rank: bool = True, spectrum: bool = False) -> None:
        self.placements = list(find_placements(model).values())
        self._similarity, self._rank, self._spectrum = similarity, rank, spectrum

    _flow: Any = None

    def __enter__(self) -> Self:
        self._means = Means()
        self._watching = False
        self._units: list[Tensor] = []
        self._unmatched: set[tuple[str, int]] = set()
        self._hooks = ExitStack()
        self._hooks.enter_context(intercepting(self.placements, self._entering))
        self._hooks.callback(self.placements[-1].register_forward_hook(self._leaving).remove)
        for b, placement in enumerate(self.placements):
            self._replace(placement, "block", self._watched_block(b, placement))
            for name, site in placement.named_children():
                if not isinstance(site, nn.Identity) and name not in ("gains_norm", "matrices"):  # only parameters
                    self._replace(site, "forward", self._watched_site(b, name, site))
        return self

    def _replace(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        setattr(module, name, method)  # on the instance: it hides the class's own
        self._hooks.callback(delattr, module, name)

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _entering(self, b: int, x: Tensor, attn: Sublayer, ffn: Sublayer) -> Given:
        self._watch_gradient(b, x)
        self._watching = not _recomputing()
        if not self._watching:
            return x, attn, ffn
        self._named: Counter[tuple[str, str]] = Counter()
        self._at_point(b, x)
        return x, self._watched(b, "attn", attn), self._watched(b, "ffn", ffn)

    def _watched_block(self, b: int, placement: Any) -> Callable[..., Any]:
        def block(x: Tensor, attn: Sublayer, ffn: Sublayer) -> Any:
            if not self._watching:
                return type(placement).block(placement, x, attn, ffn)
            with Flow(lambda *found: self._at_sum(b, "add", *found)) as self._flow:
                output = type(placement).block(placement, x, attn, ffn)
            self._unmatched |= {(branch, b) for branch in self._flow.called - self._flow.added}
            return output

        return block

    def _leaving(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self._watch_gradient(len(self.placements), output)
        if self._watching:
            self._at_point(len(self.placements), output)
            self._flow = None  # frees the tensors that it kept

    def _watched(self, b: int, branch: str, sublayer: Sublayer) -> Sublayer:
        def watched(x: Tensor) -> Tensor:
            with self._flow.paused():
                output = sublayer(x)
                with apart(output):
                    self._add("branch", branch, b, output, power(output))
            self._flow.called.add(branch)
            self._flow.mark(output, branch)
            return output

        return watched

    def _watched_site(self, b: int, name: str, site: nn.Module) -> Callable[..., Any]:
        """A norm, or the sum that no norm follows."""

        def forward(x: Tensor, f: Tensor | None = None, **scales: Any) -> Any:
            if not self._watching:
                return type(site).forward(site, x, f, **scales)
            with self._flow.paused():
                output = type(site).forward(site, x, f, **scales)
                if f is not None:
                    skip, added = (x, scales.get("skip", 1.0)), (f, scales.get("branch", 1.0))
                    swapped = self._flow.branch(x) and not self._flow.branch(f)
                    self._at_sum(b, name, *(added + skip if swapped else skip + added))
                else:
                    with apart(x):
                        self._add("variance", self._unique("site", name), b, x, power(x))
            if f is None:  # the output of a norm on a branch's output counts as the branch
                self._flow.mark(output, self._flow.branch(x))
            return output

        return forward

    def _at_sum(self, b: int, name: str, x: Tensor, skip: Any, f: Tensor, factor: Any) -> None:
        branch = self._flow.branch(f)
        with apart(x):
            added = torch.stack(torch.broadcast_tensors(exact(x) * skip, exact(f) * factor)).flatten(1)
            moments = added @ added.T / added.shape[1]  # ⟨skip²⟩, ⟨skip·branch⟩; ⟨branch·skip⟩, ⟨branch²⟩
            site = f"{branch}_add" if name == "add" and branch else name
            self._add("variance", self._unique("site", site), b, x, moments.sum())
            if branch:
                self._flow.added |= set(branch.split("+"))
                self._add("sum", self._unique("sum", branch), b, x, moments)

    def _unique(self, kind: str, name: str) -> str:
        self._named[kind, name] += 1
        count = self._named[kind, name]
        return name if count == 1 else f"{name}_{count}"

    def _at_point(self, point: int, x: Tensor) -> None:
        with apart(x):
            if x.ndim == 4:
                self._add("signal_by_stream", "", point, x, power_by_stream(x))
                self._watching = False  # the readout's norm is not measured here
                x = read_out(self.placements[-1], x)
                self._watching = True
            self._add("signal", "", point, x, power(x))
            stream = exact(x)
            here, before = unit(stream), self._units[-1:]
            self._add("token_cosine", "", point, x, token_cosine(here))
            if before and point > 0:
                self._add("layer_cosine", "", point - 1, x, (here * before[0]).sum(-1).mean())
            self._units = [*(self._units if self._similarity and point > 0 else ()), here]
            if self._rank or self._spectrum:
                for quantity, value in zip(("spectrum", "rank"), spectrum(stream), strict=True):
                    self._add(quantity, "", point, x, value)
            if point == len(self.placements):
                if self._similarity:
                    units = torch.stack(self._units).flatten(1)
                    self._add("similarity", "", 0, x, units @ units.T / tokens(x))
                self._units = []

    def _watch_gradient(self, point: int, x: Tensor) -> None:
        means = self._means  # those of this `with`, because backward may run later

        def measure(gradient: Tensor) -> None:
            with apart(gradient):
                means.add("gradient", "", point, power(summed(gradient)), tokens(gradient))
                if gradient.ndim == 4:
                    means.add("gradient_by_stream", "", point, power_by_stream(gradient), tokens(gradient))

        # Reentrant checkpointing runs forward without gradients; the recomputation has them.
        if torch.is_grad_enabled() and x.requires_grad:
            x.register_hook(measure)

    def _add(self, quantity: str, site: str, index: int, x: Tensor, mean: Tensor) -> None:
        self._means.add(quantity, site, index, mean, tokens(x))

    def record(self) -> Record:
        """The means over all passes since `with`. If torch.distributed is initialized, every rank must call it.

        The weight of a rank is its number of tokens. Its gradient is that of its own loss.

        Raises:
            InputError: no forward pass ran inside `with`.
        """
        means = self._means.read()
        depth = len(self.placements)
        if len(means.get("signal", {}).get("", ())) <= depth:
            raise InputError(
                "nothing was measured: run a forward pass inside `with Probe(model)`, and of a compiled model probe "
                "the module that was given to torch.compile, called itself."
            )

        def rows(quantity: str, number: _Number, count: int = depth) -> dict[str, list[float]]:
            sites = means.get(quantity, {}).items()
            return {site: [number(v[i]) if i in v else math.nan for i in range(count)] for site, v in sites}

        def points(quantity: str, number: _Number) -> list[float]:
            return rows(quantity, number, depth + 1).get("", [math.nan] * (depth + 1))

        def rms(stream: int = 0) -> _Number:
            return lambda squares: math.sqrt(squares[stream]) if stream < len(squares) else math.nan

        streams = range(max((len(v) for v in means.get("signal_by_stream", {}).get("", {}).values()), default=0))
        lost = sorted(self._unmatched)
        unmatched = {branch: [b for other, b in lost if other == branch] for branch, _ in lost}
        for branch, blocks in unmatched.items():
            _log.warning("the %s branch's output was found in no sum in blocks %s: no ρ, no added size", branch, blocks)

        return Record(
            signal_rms=points("signal", rms()),
            gradient_rms=points("gradient", rms()),
            signal_rms_by_stream=[points("signal_by_stream", rms(i)) for i in streams],
            gradient_rms_by_stream=[points("gradient_by_stream", rms(i)) for i in streams],
            variance=rows("variance", lambda v: v[0]),
            branch_rms=rows("branch", rms()),
            added_rms=rows("sum", rms(3)),
            rho=rows("sum", lambda v: v[1] / math.sqrt(v[0] * v[3]) if v[0] * v[3] else math.nan),
            unmatched=unmatched,
            token_cosine=points("token_cosine", lambda v: v[0]),
            layer_cosine=rows("layer_cosine", lambda v: v[0])[""],
            similarity=_square(means["similarity"][""][0], depth + 1) if self._similarity else None,
            effective_rank=points("rank", lambda v: v[0]) if self._rank else None,
            spectrum=[means["spectrum"][""][point] for point in range(depth + 1)] if self._spectrum else None,
        )


def _square(flat: list[float], n: int) -> list[list[float]]:
    rounded = [round(min(max(c, -1.0), 1.0), 4) if math.isfinite(c) else math.nan for c in flat]
    return [rounded[i : i + n] for i in range(0, n * n, n)]


def _recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass, as the recomputation of activation checkpointing does."""
    return torch._C._current_graph_task_id() != -1
