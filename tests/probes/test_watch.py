"""Watching a run: numbers against ones worked out by hand, and training bit for bit as without."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import spannorm
from spannorm import InputError
from spannorm.probes import Watch
from spannorm.train.watching import WatchCallback

IDS = torch.randint(0, 37, (8, 6), generator=torch.Generator().manual_seed(3))


def llama(placement: str | None = None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        attention_dropout=0.1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if placement:
        spannorm.rewire(model, placement)
    return model


class Row(nn.Module):
    """Two linear blocks whose every number can be worked out."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
        self.reentrant = reentrant
        with torch.no_grad():
            for block, value in zip(self.blocks, (2.0, 3.0), strict=True):
                block.weight.copy_(torch.eye(2) * value)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_numbers_are_those_worked_out_by_hand(reentrant):
    model = Row(reentrant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Watch(model, optimizer)
    with watch:
        for sign in (1.0, -1.0):  # two micro-batches, x = ±(1, 1): y = 6x, loss = Σy²/4, dy = y/2 = ±3
            y = model(torch.full((1, 1, 2), sign, requires_grad=True))
            (y.square().sum() / 4).backward()
        optimizer.step()
    n = watch.numbers()
    assert n["activation_rms/block_000"] == pytest.approx(2.0) and n["activation_rms/block_001"] == pytest.approx(6.0)
    assert n["activation_gradient_rms/block_001"] == pytest.approx(3.0)
    assert n["activation_gradient_rms/block_000"] == pytest.approx(9.0)
    # dW1 = Σ over both of dy ⊗ h = 2 · 3 · 2 in all four places, dW0 = 2 · 9 · 1
    assert n["gradient_norm/block_001"] == pytest.approx(24.0) and n["gradient_norm/block_000"] == pytest.approx(36.0)
    assert n["update_rms/block_001"] == pytest.approx(1.2)
    assert n["update_ratio/block_000"] == pytest.approx(1.8 / math.sqrt(2.0))  # RMS of (2 0; 0 2) is √2
    assert not any(len(b._forward_hooks) for b in model.blocks) and not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("placement", [None, "span", "siamese"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_is_the_same_bits_with_and_without(placement, checkpointed):
    weights, numbers = [], {}
    for watched in (False, True):
        model = llama(placement).train()
        if checkpointed:
            on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            on({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        watch = Watch(model, optimizer)
        torch.manual_seed(1)
        for _ in range(2):
            with watch if watched else nullcontext():
                for part in IDS.chunk(2):
                    (model(part, labels=part, use_cache=False).loss / 2).backward()
                optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach().clone() for p in model.parameters()])
        numbers = watch.numbers() if watched else {}
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    kinds = ("activation_rms", "activation_gradient_rms", "gradient_norm", "update_rms", "update_ratio")
    assert set(numbers) == {f"{k}/block_00{b}" for k in kinds for b in range(3)} | {f"{k}/rest" for k in kinds[2:]}
    assert all(math.isfinite(v) and v > 0 for v in numbers.values())


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[i], "labels": IDS[i]}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_callback_logs_through_the_trainer_and_leaves_it_as_it_is(tmp_path: Path, checkpointed):
    seen: list[Any] = []
    names = TrainingArguments.__dataclass_fields__  # Transformers 5.24 calls it otherwise than 5.17
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    for watched in (False, True):
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            logging_steps=1, report_to=["tensorboard"], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=7,
            max_grad_norm=1.0, learning_rate=1e-2, dataloader_pin_memory=False,
            **({name: True} if checkpointed else {}),
        )  # fmt: skip
        trainer = Trainer(llama(), args, train_dataset=Data())
        if watched:
            trainer.add_callback(WatchCallback(trainer, every=2))
        trainer.train()
        seen.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    logged = [(e["step"], e) for e in trainer.state.log_history if "watch/update_rms/block_000" in e]
    assert [step for step, _ in logged] == [2, 4]
    total = math.sqrt(sum(v**2 for k, v in logged[0][1].items() if "/gradient_norm/" in k))
    assert total == pytest.approx(min(1.0, next(e["grad_norm"] for e in trainer.state.log_history)), rel=1e-3)


def test_what_it_cannot_watch_is_said():
    with pytest.raises(InputError, match="no list of blocks"):
        Watch(nn.Linear(2, 2), torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    model = llama()
    with pytest.raises(InputError, match=r"no list of blocks at 'model\.nothing'"):
        Watch(model, None, blocks="model.nothing")
    tower = nn.ModuleDict({"sight": nn.ModuleList(nn.Linear(2, 2) for _ in range(4)), "text": model})
    optimizer = torch.optim.SGD(tower.parameters())
    with pytest.raises(InputError, match=r"several lists .*, sight \(4 blocks\), text\.model\.layers \(3 blocks\)"):
        Watch(tower, optimizer)
    assert Watch(tower, optimizer, blocks="sight").blocks == [f"sight.{b}" for b in range(4)]
    watch = Watch(model, torch.optim.SGD(model.parameters()), blocks="model.layers")
    with watch:
        pass
    with pytest.raises(InputError, match="nothing was measured"):
        watch.numbers()
