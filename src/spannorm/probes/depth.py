"""Use of depth: what each block contributes, and how it affects other blocks. DepthBench's measures, on any decoder."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from spannorm.probes.blocks import After, Blocks
from spannorm.probes.statistics import apart, exact, summed, token_cosine, unit

_log = logging.getLogger("spannorm")


@dataclass(frozen=True)
class DepthUse:
    """Measures of arXiv 2609.32534 (DepthBench), for L blocks and L+1 points: the input of block 0, every output.

    With several streams a point is the readout at that place, as in `Record`. docs/probes.md explains each measure.
    """

    loss: float
    """Mean over the batches."""
    angular_distance: list[float]
    """By block: the angle between its input and its output, divided by π, mean over tokens."""
    token_cosine: list[float]
    """By point: mean cosine between different tokens of a sequence."""
    skip_cost: list[float]
    """By block: how much the loss increases if its output is replaced by its input. 0 means that removing the block
    costs nothing."""
    usefulness: list[float]
    """By block: how much the loss increases if its output is replaced by the best linear map of its input, by least
    squares. NaN if there are fewer tokens than twice the channels of its input."""
    causal: list[list[float]]
    """`[l][k]`: ‖Δ'_k − Δ_k‖/‖Δ_k‖ over tokens and channels. Δ_k is block k's output minus its input, Δ'_k the same
    when block l is skipped. 0 for k ≤ l, NaN if Δ_k is 0."""
    permutation: list[list[float]]
    """`[l][k]`: |change of the loss|/loss if blocks l and k exchange their weights. NaN if not measured."""
    logit_lens: list[float]
    """By point: the loss if all later blocks are skipped. The model's own final norm and head follow."""
    jacobian: list[float]
    """By point: ‖∂y/∂x‖ (Frobenius) divided by the root of y's size, y the stack's output. Estimated with random
    vectors."""

    def effect_on_later(self) -> list[float]:
        """By block: the mean of its causal scores on later blocks; NaN for the last one."""
        rows = [row[block + 1 :] for block, row in enumerate(self.causal)]
        return [math.fsum(row) / len(row) if row else math.nan for row in rows]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def depth_use(
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    batches: Sequence[Any],
    *,
    fit: Sequence[Any] = (),
    reach: int | None = None,
    draws: int = 1,
) -> DepthUse:
    """Measure how a model uses its depth, on held-out text. Afterwards weights and random state are as before.

    Cost per batch: one forward pass; one pass per block for each of `skip_cost`, `usefulness` and `logit_lens` (and
    one over `fit`); one pass per pair of blocks within `reach`; one backward pass.

    Args:
        model: made of placements, rewired, or any decoder whose blocks `Blocks` finds; in evaluation mode.
        loss_of: computes the mean loss of a batch through the model, without a cache.
        batches: inputs of `loss_of`, of equal size.
        fit: batches for the fit of the linear maps of `usefulness`; empty means `batches`.
        reach: exchange the weights of blocks whose distance is at most `reach`; None means every pair.
        draws: random vectors per batch for the Jacobian.

    Raises:
        InputError: as `Blocks`.
    """
    blocks = Blocks(model)
    depth = len(blocks)

    @torch.no_grad()
    def loss(change: After | None = None) -> float:
        if change is None:
            return math.fsum(loss_of(batch).item() for batch in batches) / len(batches)
        with blocks.changing(change):
            return math.fsum(loss_of(batch).item() for batch in batches) / len(batches)

    whole = loss()
    distance, cosine, causal, skipped = _angles_and_causes(blocks, loss_of, batches)
    return DepthUse(
        loss=whole,
        angular_distance=distance,
        token_cosine=cosine,
        skip_cost=[value - whole for value in skipped],
        usefulness=_usefulness(blocks, loss_of, fit or batches, loss, whole),
        causal=causal,
        permutation=_permutation(blocks, loss, whole, depth if reach is None else reach),
        logit_lens=[loss(_skipping_from(point)) for point in range(depth)] + [whole],
        jacobian=_jacobian(blocks, loss_of, batches, draws),
    )


def _skipping_from(first: int) -> After:
    return lambda b, x, y: x if b >= first else y


@torch.no_grad()
def _angles_and_causes(
    blocks: Blocks, loss_of: Callable[[Any], Tensor], batches: Sequence[Any]
) -> tuple[list[float], list[float], list[list[float]], list[float]]:
    """Angular distance, token cosine, causal scores, and the loss with each block skipped."""
    depth = len(blocks)
    distance, cosine = torch.zeros(depth, dtype=torch.float64), torch.zeros(depth + 1, dtype=torch.float64)
    losses = [0.0] * depth
    change, size = torch.zeros(depth, depth, dtype=torch.float64), torch.zeros(depth, dtype=torch.float64)
    for batch in batches:
        points, _ = _points(blocks, loss_of, batch)
        units = [unit(point) for point in points]
        cosine += torch.stack([token_cosine(u) for u in units]).cpu()
        distance += torch.stack([_angle(a, b).mean() for a, b in pairwise(units)]).cpu()
        steps = [b - a for a, b in pairwise(points)]
        size += torch.tensor([_square(step) for step in steps], dtype=torch.float64)
        for skipped in range(depth):
            others, loss = _points(blocks, loss_of, batch, skipped)
            losses[skipped] += loss / len(batches)
            for k in range(skipped + 1, depth):
                change[skipped, k] += _square(others[k + 1] - others[k] - steps[k])
    scores = (change / size).sqrt().triu(1)
    return (distance / len(batches)).tolist(), (cosine / len(batches)).tolist(), scores.tolist(), losses


def _points(
    blocks: Blocks, loss_of: Callable[[Any], Tensor], batch: Any, skipped: int | None = None
) -> tuple[list[Tensor], float]:
    """The L+1 points of a pass, and its loss. One block is skipped; None skips none."""
    points: list[Tensor] = []

    def after(b: int, x: Tensor, y: Tensor) -> Tensor:
        y = x if b == skipped else y
        for state in (x, y) if b == 0 else (y,):
            with apart(state):
                points.append(exact(blocks.read_out(state)))
        return y

    with blocks.changing(after):
        loss = loss_of(batch).item()
    return points, loss


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle between unit vectors, divided by π. The half-angle tangent is exact for small angles; arccos is not."""
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)) / math.pi


def _square(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).square().item()


@torch.no_grad()
def _usefulness(
    blocks: Blocks,
    loss_of: Callable[[Any], Tensor],
    fit: Sequence[Any],
    loss: Callable[[After], float],
    whole: float,
) -> list[float]:
    costs = []
    for block in range(len(blocks)):
        gram, cross, tokens = _moments(blocks, loss_of, fit, block)
        if tokens < 2 * len(gram):
            _log.warning("block %d: %d tokens are too few for a map of %d channels", block, tokens, len(gram))
            costs.append(math.nan)
            continue
        best = torch.linalg.pinv(gram, hermitian=True) @ cross

        def linear(b: int, x: Tensor, y: Tensor, block: int = block, best: Tensor = best) -> Tensor:
            return (_flat(x) @ best).view(y.shape).to(y.dtype) if b == block else y

        costs.append(loss(linear) - whole)
    return costs


def _moments(
    blocks: Blocks, loss_of: Callable[[Any], Tensor], fit: Sequence[Any], block: int
) -> tuple[Tensor, Tensor, int]:
    """XᵀX and XᵀY of a block's input X and output Y, and the number of tokens. A row holds all streams of a token."""
    sums: list[tuple[Tensor, Tensor, int]] = []

    def after(b: int, x: Tensor, y: Tensor) -> Tensor:
        if b == block:
            with apart(x):
                rows, results = _flat(x), _flat(y)
                sums.append((rows.T @ rows, rows.T @ results, len(rows)))
        return y

    with blocks.changing(after):
        for batch in fit:
            loss_of(batch)
            if len(sums) > 1:
                sums = [tuple(a + b for a, b in zip(*sums, strict=True))]  # type: ignore[list-item]
    return sums[0]


def _flat(state: Tensor) -> Tensor:
    return state.flatten(2).flatten(0, 1).double()


def _permutation(blocks: Blocks, loss: Callable[[], float], whole: float, reach: int) -> list[list[float]]:
    depth = len(blocks)
    scores = [[0.0 if a == b else math.nan for b in range(depth)] for a in range(depth)]
    for a in range(depth):
        for b in range(a + 1, min(a + reach + 1, depth)):
            if _matrices(blocks.modules[a]) == _matrices(blocks.modules[b]):
                with exchanged(blocks.modules[a], blocks.modules[b]):
                    scores[a][b] = scores[b][a] = abs(loss() - whole) / whole
    return scores


def _matrices(block: nn.Module) -> dict[str, torch.Size]:
    """Matrices that must have the same names and shapes in two blocks that exchange their weights."""
    return {n: p.shape for n, p in block.named_parameters() if p.ndim > 1 and not n.startswith("placement.")}


@contextmanager
@torch.no_grad()
def exchanged(a: nn.Module, b: nn.Module) -> Iterator[None]:
    """Within the context two blocks have exchanged the weights that have the same name and shape in both."""

    def exchange() -> None:
        theirs = {**dict(b.named_parameters()), **dict(b.named_buffers())}
        for name, mine in [*a.named_parameters(), *a.named_buffers()]:
            other = theirs.get(name)
            if other is not None and other is not mine and other.shape == mine.shape:
                kept = mine.clone()
                mine.copy_(other)  # in place, because tools that shard or offload weights keep the tensor
                other.copy_(kept)

    exchange()
    try:
        yield
    finally:
        exchange()


def _jacobian(blocks: Blocks, loss_of: Callable[[Any], Tensor], batches: Sequence[Any], draws: int) -> list[float]:
    """E‖Jᵀv‖²/‖v‖² = ‖J‖²/size for random v. With several streams, x is a change that is added to all of them."""
    depth, generator = len(blocks), torch.Generator().manual_seed(0)
    squares = torch.zeros(depth + 1, dtype=torch.float64)
    for batch in batches:
        states: list[Tensor] = []

        def before(b: int, x: Tensor, states: list[Tensor] = states) -> Tensor:
            if b == 0:
                x = x if x.requires_grad else x.detach().requires_grad_()  # weights may be frozen
                states.append(x)
            return x

        def after(b: int, x: Tensor, y: Tensor, states: list[Tensor] = states) -> Tensor:
            states.append(y)
            return y

        with blocks.changing(after, before), torch.enable_grad():
            end = _end(blocks, loss_of, batch)
            for draw in range(draws):
                v = torch.randn(end.shape, generator=generator).to(end)
                gradients = torch.autograd.grad(end, states, v, retain_graph=draw + 1 < draws)
                squares += torch.tensor([_square(summed(g)) / _square(v) for g in gradients], dtype=torch.float64)
    return (squares / (draws * len(batches))).sqrt().tolist()


def _end(blocks: Blocks, loss_of: Callable[[Any], Tensor], batch: Any) -> Tensor:
    """The stack's output. It is the last block's own output, because FSDP2's hooks on it load weights in backward."""
    ends: list[Tensor] = []

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        ends.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks.modules[-1].register_forward_hook(leave)
    try:
        loss_of(batch)
    finally:
        handle.remove()
    return blocks.read_out(ends[-1])
