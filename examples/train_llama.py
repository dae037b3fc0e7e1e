"""Train a Llama with SpanNorm, from Transformers' own class and Trainer: rewire, group, train, save, load, write.

python examples/train_llama.py [--steps 200] [--blocks 16] [--rule "1/sqrt(L):init+lr"] [--out runs/llama-span]
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import spannorm

LENGTH = 128


def corpus() -> list[dict[str, torch.Tensor]]:
    """Bytes of Python's own `argparse`, `typing` and friends, in rows of 128."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    data = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    rows = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--rule", default="1/sqrt(L):init+lr")
    parser.add_argument("--out", default="runs/llama-span")
    options = parser.parse_args()

    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
    config = LlamaConfig(num_hidden_layers=options.blocks, bos_token_id=None, eos_token_id=None, **sizes)
    model = LlamaForCausalLM(config)
    print(spannorm.rewire(model, "span", depth_rule=options.rule, init="redraw"))

    groups = spannorm.parameter_groups(model, learning_rate=6e-3, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    arguments = TrainingArguments(
        options.out, max_steps=options.steps, per_device_train_batch_size=8, logging_steps=20, report_to=[]
    )
    Trainer(model, arguments, train_dataset=corpus(), optimizers=(optimizer, schedule)).train()

    model.save_pretrained(options.out)
    model = spannorm.load(options.out)
    prompt = torch.tensor([list(b"def ")])
    print(bytes(model.generate(prompt, max_new_tokens=60)[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
