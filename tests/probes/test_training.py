"""A probe leaves training as it is: bit for bit, under checkpointing, in bf16, on two processes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from spannorm.placements import PLACEMENTS, build_placement
from spannorm.probes import Probe, Record, block_skip_costs, gradient_paths, measure, update_sizes

WIDTH, DEPTH, STEPS = 8, 3, 3


class Block(nn.Module):
    def __init__(self, placement: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.placement, self.reentrant = placement, reentrant
        self.attn, self.ffn = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.placement(x, self.attn, self.ffn)
        return checkpoint(self.placement, x, self.attn, self.ffn, use_reentrant=self.reentrant)


class Model(nn.Sequential):
    """Embedding, blocks and head of plain PyTorch, with dropout: a pass too many would show."""

    def __init__(self, name: str, reentrant: bool | None = None) -> None:
        torch.manual_seed(1)
        sizes = {"hidden_size": WIDTH, "num_layers": DEPTH, "depth_rule": "none"}
        placements = [build_placement(name, layer_idx=b, **sizes) for b in range(DEPTH)]
        super().__init__(nn.Linear(WIDTH, WIDTH), *(Block(p, reentrant) for p in placements), nn.Linear(WIDTH, WIDTH))

    def loss(self, seed: int) -> Tensor:
        x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
        return self(x).float().square().mean()


def train(model: Model, probed: bool, bf16: bool = False) -> tuple[list[Tensor], list[Record]]:
    """Losses and weights after a few steps; the records, one a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(2)
    seen, records = [], []
    for step in range(STEPS):
        with Probe(model, spectrum=True) if probed else nullcontext() as probe:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model.loss(step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seen.append(loss.detach())
        records += [probe.record()] if probe else []
    return [*seen, *(p.detach() for p in model.parameters())], records


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_training_is_bit_identical_and_checkpointing_changes_no_record(
    name: str, reentrant: bool | None, bf16: bool
) -> None:
    bare, _ = train(Model(name, reentrant), False, bf16)
    probed, records = train(Model(name, reentrant), True, bf16)
    assert all(map(torch.equal, bare, probed))
    _, plain = train(Model(name), True, bf16)
    assert [r.to_dict() for r in records] == [r.to_dict() for r in plain]
    assert not any(map(math.isnan, records[0].gradient_rms))


def test_under_autocast_the_probe_itself_computes_in_fp32() -> None:
    """What it says of the bf16 streams is what fp32 arithmetic says of them."""
    model = Model("pre").eval()
    points: list[Tensor] = []
    for block in list(model)[1:-1]:
        block.register_forward_hook(lambda _, args, out: points.extend([*args, out] if not points else [out]))
    with torch.autocast("cpu", torch.bfloat16):
        record = measure(model, lambda: model.loss(0))
    assert points[0].dtype == torch.bfloat16
    units = torch.stack([nn.functional.normalize(p.detach().double(), dim=-1) for p in points])
    expected = torch.einsum("ibtd,jbtd->ij", units, units) / 10
    torch.testing.assert_close(torch.tensor(record.similarity).double(), expected, atol=6e-5, rtol=0)
    sigma = torch.linalg.svdvals(points[-1].detach().double().flatten(0, 1))
    share = sigma / sigma.sum()
    assert record.effective_rank[-1] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-5)


def checkpointed(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def test_every_experiment_between_the_steps_leaves_training_as_it_is(tiny_config: Any) -> None:
    """The whole language model, its key–value cache and its checkpointing included."""
    from spannorm.models import SpanNormForCausalLM

    ids = torch.randint(0, 37, (2, 12))

    def run(probed: bool, checkpointing: bool) -> list[Tensor]:
        model = SpanNormForCausalLM(tiny_config(placement="siamese")).train()
        if checkpointing:
            checkpointed(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

        def loss_of() -> Tensor:
            return model(ids, labels=ids, use_cache=False).loss

        losses = []
        for _ in range(STEPS):
            loss = loss_of()
            loss.backward()
            if probed:
                before = [p.grad.clone() for p in model.parameters()]
                measure(model, loss_of)
                gradient_paths(model, loss_of)
                block_skip_costs(model, loss_of)
                assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
            with update_sizes(model) if probed else nullcontext():
                optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return [*losses, *(p.detach() for p in model.parameters())]

    bare = run(False, False)
    for checkpointing in (False, True):
        assert all(map(torch.equal, bare, run(True, checkpointing)))


@pytest.mark.parametrize("name", ["span", "siamese"])
def test_experiments_measure_the_same_under_checkpointing(name: str, tiny_config: Any) -> None:
    from spannorm.models import SpanNormForCausalLM

    model = SpanNormForCausalLM(tiny_config(placement=name)).train()
    ids = torch.randint(0, 37, (2, 12))

    def all_of_it() -> list[Any]:
        def loss_of() -> Tensor:
            return model(ids, labels=ids, use_cache=False).loss

        return [
            measure(model, loss_of).to_dict(),
            gradient_paths(model, loss_of),
            block_skip_costs(model, loss_of),
        ]

    plain = all_of_it()
    checkpointed(model)
    assert all_of_it() == plain


def one_rank(rank: int, folder: str) -> None:
    """A worker: two steps of DDP on its own shard, with and without a probe."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    weights = []
    for probed in (False, True):
        model = Model("span")
        wrapped = DistributedDataParallel(model.eval())  # no dropout
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for step in range(2):
            with Probe(wrapped) if probed else nullcontext() as probe:
                x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(rank))
                wrapped(x).square().mean().backward()
            if probe and step == 0:
                torch.save(probe.record().to_dict(), f"{folder}/record{rank}.pt")
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *weights)), "DDP trains the same with a probe"
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_of_ddp_are_averaged_and_their_training_untouched(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"record{rank}.pt") for rank in (0, 1))
    assert first == second, "every rank has the mean of both"
    model = Model("span").eval()
    with Probe(model) as probe:  # the same two shards one after the other
        for rank in (0, 1):
            model.loss(rank).backward()
    for key, value in probe.record().to_dict().items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6, msg=key) if value is not None else None
