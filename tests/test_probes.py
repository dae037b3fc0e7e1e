"""Probes against a hand-made stack, whose streams and gradients are written out."""

import pytest
import torch
from torch import nn

from spannorm.probes import measure_layers


class Scale(nn.Module):
    """x → c·x, so that signal and gradient by layer are known powers of c."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c * x


@pytest.mark.parametrize("frozen", [False, True])
def test_signal_and_gradient_by_layer_are_the_known_powers(frozen: bool) -> None:
    blocks = nn.ModuleList(Scale(2.0) for _ in range(4)).requires_grad_(not frozen)
    x = torch.randn(3, 5, 8)
    target = torch.randn(3, 5, 8)

    def loss() -> torch.Tensor:
        y = x
        for block in blocks:
            y = block(y)
        return (y * target).sum(-1).mean()

    record = measure_layers(blocks, loss, tokens=15)
    rms = x.square().mean().sqrt().item()
    assert record.signal_rms == pytest.approx([rms * 2.0**i for i in range(5)])
    # the summed loss has gradient `target` at the top and 2^k times it k blocks below
    top = target.square().mean().sqrt().item()
    assert record.gradient_rms == pytest.approx([top * 2.0 ** (4 - i) for i in range(5)], rel=1e-5)
    assert record.loss == pytest.approx(loss().item())
    assert all(p.grad is None for p in blocks.parameters()), "parameters get no gradient"
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks), "no hook stays behind"


def test_similarity_is_the_mean_cosine_over_tokens() -> None:
    turn = nn.Linear(4, 4, bias=False)
    flip = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        turn.weight.copy_(torch.tensor([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]]))  # by 90°
        flip.weight.copy_(-3 * torch.eye(4))
    x = torch.randn(2, 6, 4)
    record = measure_layers([turn, flip], lambda: flip(turn(x)).mean(), tokens=12)
    expected = torch.tensor([[1.0, 0, 0], [0, 1, -1], [0, -1, 1]])
    torch.testing.assert_close(torch.tensor(record.similarity), expected, atol=1e-4, rtol=0)
