"""TRL's trainers on our models, from a folder: the loss of each against its equation, and some steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import spannorm
from spannorm.models import SpanNormForCausalLM, SpanNormForSequenceClassification

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

# TRL and PEFT ask for what Transformers 5.24 calls by other names
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

WORDS = ["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz ().,"]
COMMON: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
    "save_strategy": "no", "logging_steps": 1, "bf16": False, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="."))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def folder(model: Any, tokenizer: Any, path: Path) -> str:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Of each token but the first, (batch, seq - 1)."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def finite_losses(trainer: Any) -> list[float]:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and torch.isfinite(torch.tensor(losses)).all()
    return losses


@pytest.mark.parametrize("placement", ["span", "siamese"])
def test_sft_of_a_mixture_adds_the_load_balancing_loss(
    tiny_config: Any, tokenizer: Any, tmp_path: Path, placement: str
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.7}
    model = SpanNormForCausalLM(tiny_config(placement=placement, pad_token_id=0, **experts))
    texts = [{"text": text} for text in ("a fox (and a hen)", "see, it runs.", "why", "so be it, then") * 3]
    arguments = trl.SFTConfig(str(tmp_path / "out"), max_length=16, dataset_text_field="text", **COMMON)
    trainer = trl.SFTTrainer(
        folder(model, tokenizer, tmp_path / "in"), arguments, train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer,
    )  # fmt: skip
    trained: Any = trainer.model
    assert isinstance(trained, SpanNormForCausalLM)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trained, dict(batch))

    with torch.no_grad():
        out = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    nll = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    real = batch["attention_mask"].flatten().bool()
    p = torch.cat([logits.softmax(-1)[real] for logits in out.router_logits])  # TRL balances all layers at once
    chosen = torch.zeros_like(p).scatter_(1, p.topk(2).indices, 1.0)
    balance = 4 * (chosen.mean(0) * p.mean(0)).sum()
    assert not real.all() and balance > 2.0
    torch.testing.assert_close(loss, nll + 0.7 * balance, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in trained.named_parameters() if "gate.weight" in n
    )
    trained.zero_grad()
    finite_losses(trainer)


PAIRS = [
    {"prompt": "is it so", "chosen": " it is.", "rejected": " no, it (is) not."},
    {"prompt": "why", "chosen": " so.", "rejected": " why not."},
] * 6  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("placement", ["span", "hybrid", "siamese", "rewired"])
def test_dpo_from_a_folder(tiny_config: Any, tokenizer: Any, tmp_path: Path, placement: str, lora: bool) -> None:
    from peft import LoraConfig

    model: Any
    if placement == "rewired":
        model = LlamaForCausalLM(LlamaConfig(**TINY, pad_token_id=0))
        spannorm.rewire(model, "siamese")
    else:
        model = SpanNormForCausalLM(tiny_config(placement=placement, pad_token_id=0))
    arguments = trl.DPOConfig(str(tmp_path / "out"), max_length=32, beta=0.5, **COMMON)
    path = folder(model, tokenizer, tmp_path / "in")
    # of a rewired model TRL would open the folder as the family's, which is refused: it is handed over loaded
    trainer = trl.DPOTrainer(
        path if placement != "rewired" else spannorm.load(path), args=arguments,
        ref_model=spannorm.load(path) if placement == "rewired" and not lora else None,
        train_dataset=datasets.Dataset.from_list(PAIRS), processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear") if lora else None,
    )  # fmt: skip
    losses = finite_losses(trainer)
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] < 0.68  # ln 2 where policy and reference agree

    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch))
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        mask = batch["completion_mask"][:, 1:]
        of = [
            (log_probs(m(**given).logits, batch["input_ids"]) * mask).sum(1) for m in (trainer.model, model)
        ]  # the reference is the model in the folder
    chosen, rejected = (of[0] - of[1]).chunk(2)
    torch.testing.assert_close(found, -F.logsigmoid(0.5 * (chosen - rejected)).mean(), rtol=1e-4, atol=1e-5)
    trainer.save_model(str(tmp_path / "trained"))
    if lora:
        from peft import PeftModel

        again: Any = PeftModel.from_pretrained(model, str(tmp_path / "trained"))
    else:
        again = spannorm.load(tmp_path / "trained")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**given).logits, trainer.model.eval()(**given).logits)


def test_a_reward_model(tiny_config: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = SpanNormForSequenceClassification(tiny_config(placement="span", pad_token_id=0, num_labels=1))
    arguments = trl.RewardConfig(str(tmp_path / "out"), max_length=32, **COMMON)
    trainer = trl.RewardTrainer(
        folder(model, tokenizer, tmp_path / "in"), args=arguments, train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )  # fmt: skip
    trained: Any = trainer.model
    assert isinstance(trained, SpanNormForSequenceClassification)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        found = trainer.compute_loss(trained, dict(batch))
        hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        last = batch["attention_mask"].sum(1) - 1
        chosen, rejected = model.score(hidden[torch.arange(len(last)), last])[:, 0].chunk(2)
    torch.testing.assert_close(found, -F.logsigmoid(chosen - rejected).mean(), rtol=1e-4, atol=1e-5)
    losses = finite_losses(trainer)
    assert losses[-1] < losses[0]
