"""A GPT in plain PyTorch with SpanNorm and GPT-2's names: init, receipt, optimizer, probe and theory.

python examples/plain_gpt.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import spannorm
from spannorm import probes, theory

WIDTH, HEADS, DEPTH, LENGTH, VOCAB = 64, 4, 8, 32, 257


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.c_fc, self.act, self.c_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)


class GPT(nn.Module):
    def __init__(self, placement):
        super().__init__()
        stack = spannorm.Stack(placement, DEPTH)
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList(spannorm.Block(Attention(), MLP(), stack.block(b, WIDTH)) for b in range(DEPTH))
        self.ln_f = spannorm.RMSNorm(WIDTH) if stack.final_norm else nn.Identity()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


ROLES = {
    "attn.c_attn": spannorm.Fused(("q", "k", "v")),
    "attn.c_proj": "attn_out",
    "ffn.c_fc": "ffn_up",
    "ffn.c_proj": "ffn_down",
}


def main(placement="span", steps=20):
    model = GPT(placement)
    plan = spannorm.init_plan(model, roles=ROLES)
    spannorm.init_weights_(model, plan)
    print(spannorm.init_receipt(model, plan))
    ids = torch.randint(VOCAB, (8, LENGTH), generator=torch.Generator().manual_seed(0))

    def loss_of():
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    # positions are learned, so the embedding has variance 2; the feed-forward has no gate; nothing is rotated
    body = theory.Body(WIDTH, 4 * WIDTH, HEADS, sequence_length=LENGTH, gated=False, hidden_act="gelu",
                       rope_theta=None, embedding_multiplier=2**0.5)  # fmt: skip
    predicted, paths = theory.predict(placement, DEPTH, body=body), probes.gradient_paths(model, loss_of)
    record = probes.measure(model, loss_of)
    print(f"what the last norm reads: predicted {predicted.variance['ffn_norm'][-1]:.4f}, "
          f"measured {record.variance['ffn_norm'][-1]:.4f}")  # fmt: skip
    print(f"gradient, output to input: predicted {theory.times(predicted.log_total_gain)}, "
          f"measured {theory.times(paths.log_gain['total'][0])}")  # fmt: skip
    groups = spannorm.parameter_groups(model, learning_rate=3e-3, weight_decay=0.1, roles=ROLES)
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(loss_of())
        losses[-1].backward()
        optimizer.step()
    print(f"loss {losses[0].item():.3f} → {losses[-1].item():.3f}")
    return predicted, paths, record


if __name__ == "__main__":
    main()
