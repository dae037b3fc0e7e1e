"""A vision transformer with a class token and a convolution for patches, and two of its towers in one model.

python examples/vision.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import spannorm
from spannorm import probes, theory

WIDTH, HEADS, DEPTH, SIZE, PATCH, CLASSES = 64, 4, 6, 32, 8, 10
TOKENS = (SIZE // PATCH) ** 2 + 1


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)


class Tower(nn.Module):
    def __init__(self, placement, channels=3):
        super().__init__()
        stack = spannorm.Stack(placement, DEPTH, norm="layernorm")
        self.patches = nn.Conv2d(channels, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList(spannorm.Block(Attention(), MLP(), stack.block(b, WIDTH)) for b in range(DEPTH))
        self.norm = spannorm.LayerNorm(WIDTH) if stack.final_norm else nn.Identity()

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class TwoTowers(nn.Module):
    """Color and depth, read by a stack each."""

    def __init__(self, placement):
        super().__init__()
        self.color, self.depth = Tower(placement), Tower(placement, channels=1)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, color, depth):
        return self.head(torch.cat([self.color(color), self.depth(depth)], dim=-1))


ROLES = {
    "patches": "projection",
    "cls_token": "embedding",
    "positions": "embedding",
    "attn.qkv": spannorm.Fused(("q", "k", "v")),
    "attn.proj": "attn_out",
    "ffn.fc1": "ffn_up",
    "ffn.fc2": "ffn_down",
    "head": "head",
}


def main(placement="span"):
    model = TwoTowers(placement)
    plan = spannorm.init_plan(model, roles=ROLES)
    spannorm.init_weights_(model, plan)
    print(spannorm.init_receipt(model, plan))
    g = torch.Generator().manual_seed(0)
    color, depth = (torch.randn(16, channels, SIZE, SIZE, generator=g) for channels in (3, 1))
    classes = torch.randint(CLASSES, (16,), generator=g)

    def loss_of():
        return F.cross_entropy(model(color, depth), classes)

    # patches and positions have variance 1 each; every token attends to all
    body = theory.Body(WIDTH, 4 * WIDTH, HEADS, sequence_length=TOKENS, causal=False, gated=False, hidden_act="gelu",
                       rope_theta=None, embedding_multiplier=2**0.5)  # fmt: skip
    predicted = theory.predict(placement, DEPTH, body=body)
    records = {name: probes.measure(getattr(model, name), loss_of) for name in ("color", "depth")}  # a stack at a time
    for name, record in records.items():
        print(f"{name}: what the last norm reads: predicted {predicted.variance['ffn_norm'][-1]:.4f}, "
              f"measured {record.variance['ffn_norm'][-1]:.4f}")  # fmt: skip
    groups = spannorm.parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, roles=ROLES)
    optimizer = torch.optim.AdamW(groups)
    for step in range(10):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        if step in (0, 9):
            print(f"step {step}: loss {loss.item():.3f}")
    return predicted, records


if __name__ == "__main__":
    main()
