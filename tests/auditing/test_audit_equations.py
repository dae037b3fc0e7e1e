"""The equation of a block, read by running it: our own placements, and modules that hide what they do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spannorm.auditing.behaviour import Norms
from spannorm.auditing.inspection import audit
from spannorm.auditing.match import _Plain
from spannorm.auditing.stacks import find_stacks
from spannorm.auditing.trace import run
from spannorm.auditing.wiring import read_block, types_of
from spannorm.placements import PLACEMENTS, Stack

D, L = 16, 4
IDS = torch.arange(10).reshape(2, 5)

# From the placements' docstrings and papers, L = 4; block 1 of 0 … 3, and block 0 where it is another.
OURS = {
    "pre": ["h = x + A(N(x)); x' = h + F(N(h))"],
    "post": ["h = N(x + A(x)); x' = N(h + F(h))"],
    "span": ["h = N(x + A(x)); x' = N(x + F(h))", "h = N(x + A(N(x))); x' = N(x + F(h))"],
    "b2t": ["h = N(x + A(x)); x' = N(x + h + F(h))"],
    "deepnorm": ["h = N(1.682·x + A(x)); x' = N(1.682·h + F(h))"],  # (2·4)^¼
    "peri": ["h = x + N(A(N(x))); x' = h + N(F(N(h)))"],
    "olmo2": ["h = x + N(A(x)); x' = h + N(F(h))"],
    "hybrid": ["h = N(x + A(x)); x' = h + F(h)"],
    "hybrid_star": ["h = N(x + A(x)); x' = h + F(h)", "h = x + A(N(x)); x' = h + F(N(h))"],
    "mix": ["h = x + A(N(x)); x' = h + F(N(h))", "h = N(x + A(x)); x' = N(h + F(h))"],
    "lns": ["h = x + A(0.7071·N(x)); x' = h + F(0.7071·N(h))", "h = x + A(N(x)); x' = h + F(N(h))"],
    "subln": ["h = x + A(N(x)); x' = h + F(N(h))"],
    "normformer": ["h = x + N(A(N(x))); x' = h + F(N(h))"],
    "residual": ["h = N(x[0] + A(x[0])); x[0]' = N(h + F(h)); x[1]' = x[1] + A(x[0]) + F(h)",
                 "h = N(x + A(x)); x[0]' = N(h + F(h)); x[1]' = x + A(x) + F(h)"],
    "keel": ["h = N(8·x + A(N(x))); x' = N(8·h + F(N(h)))", "h = x + A(N(x)); x' = N(h + F(N(h)))"],
    "siamese": ["h1 = N(x[0] + N(x[1])); h2 = N(x[0] + 0.5774·A(h1)); h3 = x[1] + A(h1); h4 = N(h2 + N(h3)); "
                "x[0]' = N(h2 + 0.5·F(h4)); x[1]' = h3 + F(h4)"],
}  # fmt: skip


def test_every_placement_is_in_the_table():
    assert set(OURS) <= set(PLACEMENTS)  # others may have registered some of their own


@pytest.mark.parametrize("name", OURS)
def test_the_equation_of_each_of_our_placements_is_read_from_its_run(name):
    model = _Plain(Stack(name, L, "none"))
    trace = run(model, (IDS,))
    norms = Norms()
    read = [read_block(b, norms, types_of(model))[0] for b in find_stacks(model, trace)[0].blocks]
    assert read[1].text == OURS[name][0]
    assert read[0].text == OURS[name][-1] if len(OURS[name]) > 1 else True
    assert all(b.residual is not None and b.residual < 1e-5 for b in read)


@pytest.mark.parametrize("name", sorted(set(OURS) - {"subln", "hybrid", "hybrid_star", "normformer"}))
def test_our_placements_are_named_by_what_they_do(name):
    class Ends(_Plain):
        """With the final norm that the placement asks for."""

        def __init__(self, stack: Stack) -> None:
            super().__init__(stack)
            self.norm = nn.RMSNorm(D) if stack.final_norm else nn.Identity()

        def forward(self, ids: Tensor) -> Tensor:
            return self.norm(super().forward(ids))

    match = audit(Ends(Stack(name, L, "none")), IDS).main.match
    # with plain sublayers OLMo 2's norms on queries and keys are missing, and the page says so
    assert match.nearest == name
    assert match.placement == (name if name != "olmo2" else None)


# Modules that do by hand what a norm or a placement does --------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D))


class AddNorm(nn.Module):
    """BERT's: the sum is inside a module of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(D, D), nn.LayerNorm(D, eps=1e-3)

    def forward(self, f: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.dense(f) + x)


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.a, self.ffn, self.b = Attention(), AddNorm(), mlp(), AddNorm()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.attn(x), x)
        return self.b(self.ffn(h), h)


class Functional(nn.Module):
    """Norms that are no modules: RMS by hand with weight 1 + w, and a unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ffn = Attention(), mlp()
        self.w = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-4) * (1 + self.w)
        x = x + self.attn(n)
        return x + self.ffn(F.normalize(x, dim=-1))


class LayerScale(nn.Module):
    """A gain per channel that is 1 at first, in place; a constant factor; a learned number on the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ffn = Attention(), mlp()
        self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.gamma, self.alpha = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        f = self.attn(self.n1(x))
        f *= self.gamma
        f += self.alpha * x
        return f + 0.25 * self.ffn(self.n2(f))


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ffn, self.norm = Attention(), mlp(), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.attn(n) + self.ffn(n)


class Flow(nn.Module):
    """Two streams side by side on an axis of their own, mixed by a matrix that depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm, self.mix = Attention(), nn.LayerNorm(D), nn.Linear(2 * D, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.mix(x.flatten(-2)).unflatten(-1, (2, 2)).softmax(-1)
        return weights @ x + self.attn(self.norm(x.sum(-2))).unsqueeze(-2)


class Model(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.streams = 2 if kind is Flow else 0
        self.embed, self.blocks = nn.Embedding(11, D), nn.ModuleList(kind() for _ in range(3))
        self.final, self.head = nn.LayerNorm(D), nn.Linear(D, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * math.sqrt(D)
        x = torch.stack([x] * self.streams, -2) if self.streams else x
        for block in self.blocks:
            x = block(x)
        return self.head(self.final(x.sum(-2) if self.streams else x))


WRITTEN = {
    Bert: "h = N(x + A(x)); x' = N(h + F(h))",
    Functional: "h = x + A(N(x)); x' = h + F(N(h))",
    LayerScale: "h = alpha⊙x + gamma⊙A(N(x)); x' = h + 0.25·F(N(h))",
    Parallel: "x' = x + A(N(x)) + F(N(x))",
    Flow: "x' = G·x + A(N(x))",
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_is_written_out_by_hand_is_read_too(kind):
    found = audit(Model(kind), IDS)
    assert list(found.main.kinds()) == [WRITTEN[kind]]
    assert found.main.ends.embedding_factor == pytest.approx(4.0)
    assert found.main.ends.final_norm == "final" and not found.main.ends.tied


def test_a_norm_is_known_by_its_kind_epsilon_and_gain():
    rms, unit, final = audit(Model(Functional), IDS).norms
    assert (rms.kind, rms.gain) == ("RMSNorm", "1 + w") and rms.epsilon == pytest.approx(1e-4, rel=0.05)
    assert unit.kind == "L2" and unit.gain == "none"
    assert final.name == "final" and final.kind == "LayerNorm" and final.epsilon == pytest.approx(1e-5, rel=0.05)
    bert = {n.name: n.epsilon for n in audit(Model(Bert), IDS).norms}
    assert bert["blocks.*.a.norm"] == pytest.approx(1e-3, rel=0.05)


def test_different_epsilons_in_one_stack_are_a_fault():
    found = audit(Model(Bert), IDS)  # 1e-3 in the blocks, 1e-5 at the end
    assert not found.ok and any("different ε" in s.text for s in found.verdict if s.off)


@pytest.mark.parametrize("norm_first", [False, True])
def test_pytorchs_own_encoder(norm_first):
    layer = nn.TransformerEncoderLayer(D, 2, 24, norm_first=norm_first, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(D) if norm_first else None, enable_nested_tensor=False)
    found = audit(model, torch.randn(2, 5, D))
    assert found.main.match.placement == ("pre" if norm_first else "post")


def hooks(model: nn.Module) -> list[dict[str, int]]:
    """Entries of everything that is about hooks, in PyTorch and in each module."""
    owners = [vars(nn.modules.module), *map(vars, model.modules())]
    return [{key: len(v) for key, v in owner.items() if "hooks" in key and isinstance(v, dict)} for owner in owners]


def test_the_live_model_is_as_before():
    model = Model(LayerScale).train()
    model.blocks[1].eval()
    model.register_buffer("counter", torch.zeros(1))
    model.register_forward_pre_hook(lambda m, a: m.counter.add_(1) and None)
    model(IDS).sum().backward()
    before = {n: (t.clone(), t.data_ptr()) for n, t in model.state_dict().items()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    hooked = hooks(model)
    assert "_global_forward_hooks_with_kwargs" in hooked[0] and "_forward_hooks_with_kwargs" in hooked[-1]
    random = torch.get_rng_state()
    audit(model, IDS)
    assert all(torch.equal(t, before[n][0]) and t.data_ptr() == before[n][1] for n, t in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())
    assert modes == [m.training for m in model.modules()]
    assert hooks(model) == hooked
    assert torch.equal(torch.get_rng_state(), random)
