"""A plain PyTorch block is its placement around the user's modules."""

import pytest
import torch
from torch import nn

import spannorm

SIZES = {"hidden_size": 8, "num_layers": 3}


class Attention(nn.Module):
    """Something that needs more than the stream."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor, *, sign: float = 1.0) -> torch.Tensor:
        return sign * (weight @ x)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_a_block_is_spannorms_equation_around_modules_of_ones_own():
    ffn = nn.Linear(8, 8)
    x, weight = torch.randn(2, 5, 8), torch.randn(5, 5)
    block = spannorm.Block(Attention(), ffn, "span", layer_idx=1, depth_rule="none", **SIZES)
    h = rms(x - weight @ x)
    torch.testing.assert_close(block(x, weight, sign=-1.0), rms(x + ffn(h)))
    assert {name for name, _ in block.named_parameters()} == {
        "placement.attn_norm.weight", "placement.ffn_norm.weight", "ffn.weight", "ffn.bias"
    }  # fmt: skip


def test_a_placement_with_norms_inside_the_sublayers_warns_once_a_stack():
    with pytest.warns(UserWarning, match=r"OLMo2Norm also normalizes inside its sublayers, at q .* build that"):
        spannorm.Block(Attention(), nn.Identity(), "olmo2", layer_idx=0, **SIZES)
    spannorm.Block(Attention(), nn.Identity(), "olmo2", layer_idx=1, **SIZES)


def test_a_stack_with_two_streams_opens_and_closes_them():
    x, weight = torch.randn(2, 5, 8), torch.randn(5, 5)
    for b in range(3):
        x = spannorm.Block(Attention(), nn.Linear(8, 8), "residual", layer_idx=b, **SIZES)(x, weight)
        assert x.shape == ((2, 5, 8) if b == 2 else (2, 5, 2, 8))


def test_its_init_and_groups_know_matrices_of_the_usual_names():
    ffn = nn.Sequential()
    ffn.add_module("up_proj", nn.Linear(8, 16, bias=False))
    ffn.add_module("down_proj", nn.Linear(16, 8, bias=False))
    blocks = nn.ModuleList(
        spannorm.Block(nn.Identity(), ffn, "span", layer_idx=b, depth_rule="1/sqrt(L):init+lr", **SIZES)
        for b in range(1)
    )
    plan = spannorm.init_plan(blocks, width=8)
    assert plan["0.ffn.down_proj.weight"].std == pytest.approx((3 * 16) ** -0.5)
    rates = sorted(g["lr"] for g in spannorm.parameter_groups(blocks, learning_rate=1.0, weight_decay=0.1))
    assert rates == pytest.approx([3**-0.5, 1.0, 1.0])
