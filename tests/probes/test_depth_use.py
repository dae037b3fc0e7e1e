"""Use of depth: against matrix products written out, and of every placement against its equation."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from equation_stack import BATCH, DEPTH, LENGTH, EquationStack
from facts import FACTS, WIDTH
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from spannorm import SpanNormConfig, SpanNormForCausalLM, rewire
from spannorm.errors import InputError
from spannorm.placements import PLACEMENTS
from spannorm.probes import block_skip_costs, depth_use

close = {"rel": 1e-9, "abs": 1e-11}


class Maps(nn.Module):
    """A decoder like Transformers': blocks in a list, each a matrix here, which return tuples; a readout behind."""

    class Block(nn.Module):
        def __init__(self, matrix: Tensor, bent: bool) -> None:
            super().__init__()
            self.weight, self.bent = nn.Parameter(matrix), bent

        def forward(self, hidden_states: Tensor, mask: None = None) -> tuple[Tensor, None]:
            y = hidden_states @ self.weight.T
            return y.tanh() if self.bent else y, mask

    def __init__(self, matrices: list[Tensor], bent: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Block(m.clone(), bent == i) for i, m in enumerate(matrices))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(hidden_states=x)[0]
        return x


def loss_at(y: Tensor) -> Tensor:
    return 2 + y.tanh().mean()


@pytest.fixture
def matrices() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def product(x: Tensor, matrices: list[Tensor]) -> Tensor:
    for m in matrices:
        x = x @ m.T
    return x


def test_linear_blocks_against_matrix_products(matrices: list[Tensor], x: Tensor) -> None:
    model = Maps(matrices)
    found = depth_use(model, lambda batch: loss_at(model(batch)), [x], draws=4000)
    a, b, c = matrices
    whole = loss_at(product(x, matrices)).item()
    assert found.loss == whole
    assert found.usefulness == pytest.approx([0.0] * 3, abs=1e-10)  # a linear block loses nothing
    assert found.skip_cost == pytest.approx([loss_at(product(x, m)).item() - whole for m in ([b, c], [a, c], [a, b])])
    assert found.logit_lens == pytest.approx([loss_at(product(x, matrices[:point])).item() for point in range(4)])

    def score(path: list[Tensor], other: list[Tensor], m: Tensor) -> float:
        one, two = product(x, path), product(x, other)
        step, changed = product(one, [m]) - one, product(two, [m]) - two
        return ((changed - step).norm() / step.norm()).item()

    expected = [[0, score([a], [], b), score([a, b], [b], c)], [0, 0, score([a, b], [a], c)], [0, 0, 0]]
    assert np.array(found.causal) == pytest.approx(np.array(expected))
    swapped = {(0, 1): [b, a, c], (0, 2): [c, b, a], (1, 2): [a, c, b]}
    for (i, j), order in swapped.items():
        change = abs(loss_at(product(x, order)).item() - whole) / whole
        assert found.permutation[i][j] == found.permutation[j][i] == pytest.approx(change), (i, j)
    assert [found.permutation[i][i] for i in range(3)] == [0, 0, 0]
    jacobians = [c @ b @ a, c @ b, c, torch.eye(3, dtype=torch.float64)]
    assert found.jacobian == pytest.approx([(j.norm() / 3**0.5).item() for j in jacobians], rel=0.02)
    assert found.jacobian[-1] == 1
    assert [layer.weight.tolist() for layer in model.layers] == [m.tolist() for m in matrices]


def test_a_block_that_turns_by_an_angle_has_that_angle_over_pi(x: Tensor) -> None:
    def turn(angle: float) -> Tensor:
        return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()

    model = Maps([turn(1e-6), turn(math.pi / 3), 5 * turn(math.pi)])
    found = depth_use(model, lambda batch: loss_at(model(batch)), [x[..., :2]])
    assert found.angular_distance == pytest.approx([1e-6 / math.pi, 1 / 3, 1], rel=1e-7)
    assert found.token_cosine == pytest.approx([found.token_cosine[0]] * 4)


def test_blocks_that_do_nothing_or_the_same(matrices: list[Tensor], x: Tensor) -> None:
    a, b, _ = matrices
    model = Maps([a, torch.eye(3).double(), b, b])
    found = depth_use(model, lambda batch: loss_at(model(batch)), [x], reach=2)
    assert found.causal[1] == [0, 0, 0, 0] and min(found.causal[0][2:]) > 0
    assert found.skip_cost[1] == found.angular_distance[1] == found.permutation[2][3] == 0 != found.permutation[0][2]
    assert math.isnan(found.permutation[0][3]) and math.isnan(found.permutation[3][0]), "beyond reach"


def test_usefulness_is_what_the_best_map_loses_and_is_fitted_on_other_text(matrices: list[Tensor], x: Tensor) -> None:
    model, other = Maps(matrices, bent=1), x.flip(1) * 0.7 + 0.1
    found = depth_use(model, lambda batch: loss_at(model(batch)), [x], fit=[other[:1], other[1:]])
    a, b, c = matrices
    read = product(other, [a]).reshape(-1, 3).numpy()
    best = torch.from_numpy(np.linalg.lstsq(read, np.tanh(read @ b.numpy().T), rcond=None)[0])
    with torch.no_grad():
        expected = loss_at(product(product(x, [a]) @ best, [c])) - loss_at(model(x))
    assert found.usefulness == pytest.approx([0, expected.item(), 0], abs=1e-10)
    assert abs(found.usefulness[1]) > 1e-3
    few = depth_use(model, lambda batch: loss_at(model(batch)), [x], fit=[x[:1]])  # 5 tokens, 3 channels
    assert all(map(math.isnan, few.usefulness))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_against_its_equation(name: str) -> None:
    stack = EquationStack(name)
    fact = FACTS[name]

    def opened(x: Tensor) -> Tensor:
        """Several streams, where block 0 is skipped."""
        n = fact.opens or fact.state(1)[0]
        return x.unsqueeze(2).expand(BATCH, LENGTH, n, WIDTH)

    def readout(state: Tensor) -> Tensor:
        return fact.readout(stack.cases[-1], state) if state.ndim == 4 else state

    def points(skipped: set[int]) -> list[Tensor]:
        """What would be handed on at each point: the equations of the last block read out by themselves."""
        x, found = stack.x, [readout(opened(stack.x)) if fact.several else stack.x]
        for b in range(DEPTH):
            if b not in skipped:
                x = stack.equation(b, x)
            elif fact.several and b == 0:
                x = opened(x)
            found.append(readout(x))
        return found

    found = depth_use(stack.blocks, lambda batch: stack.loss(), [None], reach=1)
    true = points(set())
    cosines = [torch.cosine_similarity(a, b, dim=-1) for a, b in pairwise(true)]
    assert found.angular_distance == pytest.approx([(c.acos() / math.pi).mean().item() for c in cosines], rel=1e-6)
    lens = [stack.loss_at(points(set(range(point, DEPTH)))[-1]).item() for point in range(DEPTH + 1)]
    assert found.logit_lens == pytest.approx(lens, **close)
    assert found.skip_cost == pytest.approx(block_skip_costs(stack.blocks, stack.loss), **close)
    steps = [b - a for a, b in pairwise(true)]
    for skipped in range(DEPTH):
        others = points({skipped})
        for k in range(skipped + 1, DEPTH):
            change = (others[k + 1] - others[k] - steps[k]).norm() / steps[k].norm()
            assert found.causal[skipped][k] == pytest.approx(change.item(), **close), (skipped, k)


def test_static_hyper_connections_use_their_depth_as_prenorm_does() -> None:
    """They start as the same function on equal streams; a push on all n of them is n pushes."""
    ids = torch.randint(0, 257, (2, 48))

    def found(**options: object) -> dict[str, object]:
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        model = SpanNormForCausalLM(SpanNormConfig(vocab_size=257, eos_token_id=256, **sizes, **options)).eval()
        assert options["placement"] == "pre" or model.model.layers[0].placement.options["streams"] == 2
        return depth_use(model, lambda batch: model(batch, labels=batch, use_cache=False).loss, [ids]).to_dict()

    one = found(placement="pre")
    many = found(placement="hc", placement_options={"streams": 2, "dynamic": False})
    assert np.array(many.pop("jacobian")) == pytest.approx(2 * np.array(one.pop("jacobian")), rel=1e-4)
    for measure, values in one.items():
        assert np.array(many[measure]) == pytest.approx(np.array(values), rel=1e-3, abs=2e-5), measure


def test_a_decoder_of_transformers_and_the_same_rewired_to_prenorm_agree() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(0, 64, (2, 32))

    def found() -> dict[str, object]:
        return depth_use(model, lambda batch: model(batch, labels=batch).loss, [ids]).to_dict()

    plain = found()
    rewire(model, "pre", init=False)
    for measure, values in found().items():
        assert np.array(values) == pytest.approx(np.array(plain[measure]), rel=1e-4, abs=1e-6), measure


def test_no_stack_or_several_are_refused_in_words() -> None:
    with pytest.raises(InputError, match="no list of blocks"):
        depth_use(nn.Linear(2, 2), lambda batch: batch, [])
    two = nn.ModuleDict({part: nn.ModuleList([nn.Linear(2, 2)]) for part in ("encoder", "decoder")})
    with pytest.raises(InputError, match=r"several lists .*, encoder \(1 blocks\), decoder \(1 blocks\)"):
        depth_use(two, lambda batch: batch, [])
