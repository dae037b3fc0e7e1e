"""Every kernel of the dispatch can be differentiated twice and works under torch.func, or refuses."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from spannorm import InputError, Stack, kernels
from spannorm.kernels import reference
from spannorm.norms import build_norm
from spannorm.placements import PLACEMENTS

fused = importlib.import_module("spannorm.kernels.triton")
F64, F32 = torch.float64, torch.float32
EPS = 1e-3


def formula(
    x: Tensor, f: Tensor | None, w: Tensor, b: Tensor | None, skip: float, branch: float
) -> tuple[Tensor, Tensor]:
    s = x if f is None else skip * x + branch * f
    c = s if b is None else s - s.mean(-1, keepdim=True)
    y = c / (c.square().mean(-1, keepdim=True) + EPS).sqrt() * w
    return (y if b is None else y + b), s


def leaves(dtype: torch.dtype, branch: bool, bias: bool) -> list[Tensor | None]:
    x, f = (torch.randn(2, 3, 8, dtype=F64) for _ in range(2))
    w, b = torch.rand(8, dtype=F64) + 0.5, torch.randn(8, dtype=F64)
    given = [x, f if branch else None, w, b if bias else None]
    return [None if t is None else t.to(dtype).requires_grad_() for t in given]


@pytest.mark.parametrize("return_sum", [False, True])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_first_and_second_derivatives_are_those_of_finite_differences(bias, branch, return_sum):
    given = leaves(F64, branch, bias)
    own = [t for t in given if t is not None]

    def norm(*own: Tensor):
        it = iter(own)
        x, f, w, b = (None if t is None else next(it) for t in given)
        return kernels.add_norm(x, f, w, b, eps=EPS, skip=1.5 if branch else 1.0, branch=0.5, return_sum=return_sum)

    assert torch.autograd.gradcheck(norm, own, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(norm, own)


@pytest.mark.parametrize("kernel", [reference, fused])
@pytest.mark.parametrize("return_sum", [False, True])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_second_derivatives_of_every_kernel_are_the_formulas(kernel, bias, branch, return_sum):
    given = leaves(F32, branch, bias)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given]
    upstream = [torch.randn(2, 3, 8) for _ in range(2)]
    directions = [None if t is None else torch.randn_like(t) for t in given]

    def twice(outputs: tuple[Tensor, ...], tensors: list[Tensor | None]) -> list[Tensor]:
        own = [t for t in tensors if t is not None]
        loss = sum((u.to(o) * o.tanh()).sum() for u, o in zip(upstream, outputs, strict=False))
        first = torch.autograd.grad(loss, own, create_graph=True)
        along = sum((g * d.to(g)).sum() for g, d in zip(first, (d for d in directions if d is not None), strict=True))
        return [*first, *torch.autograd.grad(along, own)]

    skip = 1.5 if branch else 1.0
    outputs = kernel.add_norm(*given, EPS, skip, 0.5, return_sum)
    ours = twice(outputs if return_sum else (outputs,), given)
    theirs = twice(formula(*exact, skip, 0.5)[: 1 + return_sum], exact)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("return_sum", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_batch_of_gradients_gives_the_fused_kernels_gradients_one_by_one(bias, return_sum):
    given = leaves(F32, True, bias)
    own = [t for t in given if t is not None]
    outputs = fused.add_norm(*given, EPS, 1.5, 0.5, return_sum)
    outputs = outputs if return_sum else (outputs,)
    batch = [torch.randn(5, *o.shape) for o in outputs]
    actual = torch.autograd.grad(outputs, own, batch, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(outputs, own, list(u), retain_graph=True) for u in zip(*batch, strict=True)]
    for a, b in zip(actual, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


def test_one_vector_is_normalized_and_differentiated_as_a_row_is():
    x, w = (torch.randn(8, dtype=F64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, w: kernels.add_norm(x, None, w, eps=EPS), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: kernels.add_norm(x, None, w, eps=EPS), (x, w))


class Model(nn.Module):
    """Two blocks around small sublayers."""

    def __init__(self, placement: str, norm: str) -> None:
        super().__init__()
        self.placements = nn.ModuleList(Stack(placement, 2, norm=norm).blocks(8))
        self.sublayers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def states(self, x: Tensor) -> Tensor:
        for b, placement in enumerate(self.placements):
            attn, ffn = self.sublayers[2 * b : 2 * b + 2]
            x = placement(x, lambda y, f=attn: torch.tanh(f(y)), lambda y, f=ffn: torch.tanh(f(y)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.states(x).tanh().sum()


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("placement", ["pre", "post", "span", "peri", "siamese", "hybrid"])
def test_a_hessian_vector_product_is_that_of_finite_differences(placement, norm):
    model = Model(placement, norm).double()
    x = torch.randn(2, 3, 8, dtype=F64)
    own = list(model.parameters())
    direction = [torch.randn_like(p) for p in own]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x), own, create_graph=True)

    products = torch.autograd.grad(sum((g * d).sum() for g, d in zip(gradients(), direction, strict=True)), own)
    step, moved = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(own, direction, strict=True):
                p.add_(sign * step * d)
        moved.append([g.detach() for g in gradients()])
        with torch.no_grad():
            for p, d in zip(own, direction, strict=True):
                p.sub_(sign * step * d)
    for product, plus, minus in zip(products, *moved, strict=True):
        torch.testing.assert_close(product, (plus - minus) / (2 * step), rtol=1e-5, atol=1e-6)
    assert max(p.abs().max() for p in products) > 0.1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_vectorized_jacobian_is_the_one_by_rows(placement):
    model = Model(placement, "rmsnorm").double()
    own = tuple(model.parameters())
    blocks = torch.randn(2, 3, 8, dtype=F64).requires_grad_()
    states = model.states(blocks)
    rows = torch.randn(4, *states.shape, dtype=F64)
    actual = torch.autograd.grad(states, (blocks, *own), rows, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(states, (blocks, *own), row, retain_graph=True) for row in rows]
    for a, b in zip(actual, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


# PyTorch's own forward mode is scripted, which it deprecates
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@forward_mode
def test_dual_numbers_give_what_functorchs_forward_mode_gives() -> None:
    x, along = torch.randn(2, 1, 3, 8, dtype=torch.float64).unbind(0)
    norm = build_norm("rmsnorm", 8).double()
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, along)))
    torch.testing.assert_close((y.primal, y.tangent), jvp(norm, (x,), (along,)))


@forward_mode
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("placement", ["pre", "span", "residual"])
def test_torch_func_gives_what_autograd_gives(placement, norm):
    model = Model(placement, norm).double()
    weights = dict(model.named_parameters())
    x = torch.randn(4, 2, 3, 8, dtype=F64)

    def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, w, (x,))

    by_sample = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for i in range(len(x)):
        own = torch.autograd.grad(model(x[i]), list(weights.values()))
        for (name, together), alone in zip(by_sample.items(), own, strict=True):
            torch.testing.assert_close(together[i], alone, msg=name)
    tangents = {name: torch.randn_like(p) for name, p in weights.items()}
    _, along = jvp(lambda w: loss(w, x[0]), (weights,), (tangents,))
    own = torch.autograd.grad(model(x[0]), list(weights.values()))
    torch.testing.assert_close(along, sum((g * t).sum() for g, t in zip(own, tangents.values(), strict=True)))


@forward_mode
def test_the_hessian_of_a_norm_alone():
    norm, x = build_norm("rmsnorm", 5).double(), torch.randn(5, dtype=F64)
    exact = torch.autograd.functional.hessian(lambda x: formula(x, None, norm.weight, None, 1, 1)[0].tanh().sum(), x)
    norm.eps = EPS
    for found in (
        hessian(lambda x: norm(x[None, None])[0, 0].tanh().sum())(x),
        torch.autograd.functional.hessian(lambda x: norm(x[None, None])[0, 0].tanh().sum(), x),
    ):
        torch.testing.assert_close(found, exact)


def test_integers_are_refused_and_an_input_that_is_a_subclass_is_left_as_it_is():
    norm = build_norm("rmsnorm", 8)
    with pytest.raises(InputError, match=r"floating-point tensors; got torch.int64"):
        kernels.add_norm(torch.ones(1, 2, 8, dtype=torch.int64), None, norm.weight, eps=EPS)

    class Sub(Tensor):
        pass

    x = torch.randn(1, 2, 8)
    given = x.clone().as_subclass(Sub)
    y = kernels.add_norm(given, None, norm.weight, eps=EPS)
    assert torch.equal(given.as_subclass(Tensor), x)
    torch.testing.assert_close(y.as_subclass(Tensor), formula(x, None, norm.weight, None, 1, 1)[0])
