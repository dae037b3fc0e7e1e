"""Placed models of torchtitan's on several gloo processes: equal to one process, and its own trainer runs them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pytest.importorskip("torchtitan")

import spannorm
from spannorm import SpanNormForCausalLM
from spannorm.placements import PLACEMENTS

HERE = Path(__file__).parent
SOME = ("span", "pre", "hybrid", "siamese", "attnres")


def torchrun(processes: int, folder: Path, script: str, *arguments: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(HERE / script), *arguments]
    path = os.pathsep.join([str(HERE), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "kind", "model", "placements"),
    [
        (2, "fsdp=2", "llama3", tuple(PLACEMENTS)),
        (2, "tp=2", "llama3", tuple(p for p in PLACEMENTS if p != "mixed_input")),  # refused in words
        (2, "pp=2", "llama3", tuple(PLACEMENTS)),
        (2, "tp=2,no_sp", "qwen3", SOME),
        (2, "fsdp=2", "moe", ("span", "siamese")),
        (2, "fsdp=2,ep=2", "moe", ("span", "siamese")),
        (4, "fsdp=2,tp=2", "llama3", SOME),
        (4, "pp=2,tp=2", "llama3", SOME),
        (4, "pp=2,fsdp=2", "llama3", SOME),
    ],
)
def test_loss_and_gradients_are_one_processs(processes, kind, model, placements, tmp_path: Path) -> None:
    torchrun(processes, tmp_path, "titan_together.py", "rows.json", kind, model, *placements)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows.keys() == set(placements)
    for placement, row in rows.items():
        print(f"{processes} {kind:12} {model:7} {placement:14} loss {row['loss']:.0e}  gradient {row['gradient']:.0e}")
        assert row["all"], "every parameter lies in some process"
        assert row["loss"] < 1e-6, placement
        assert row["gradient"] < 1e-4, (placement, row["of"])  # of gains whose gradient nearly cancels; others 2e-6


def text_and_tokenizer(folder: Path) -> None:
    """What a run of torchtitan's reads: a byte-level tokenizer, and JSON lines of Python's own source."""
    (folder / "assets").mkdir()
    (folder / "text").mkdir()
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "assets" / "tokenizer.json"))
    (folder / "assets" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    source = Path(random.__file__).read_text(encoding="utf-8")
    pieces = [json.dumps({"text": source[i : i + 400]}) for i in range(0, len(source), 400)]
    (folder / "text" / "data.json").write_text("\n".join(pieces))


def losses(folder: Path) -> list[float]:
    """By step, from a process that knows them: of a pipeline the last stage's alone does."""
    return [loss for _, loss, _ in json.loads(min(folder.glob("losses-*.json")).read_text())]


RECIPE = """
model: {{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 3, num_attention_heads: 4, qk_norm: true,
        placement: span, depth_rule: "1/sqrt(L):init+lr"}}
data: {{corpus: {corpus}}}
train: {{steps: 5, sequence_length: 32, batch_size: 4, learning_rate: 1e-3, warmup_steps: 1, precision: fp32,
        final_learning_rate: 1.0, checkpoint_every: 5}}
"""
ON_CPU = """
import tiny_titan
from torchtitan.models.common.attention import ScaledDotProductAttention


def tiny():
    config = tiny_titan.tiny()
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.training.disable_cuda_graphs = True
    return config
"""


@pytest.mark.slow
def test_a_recipe_is_one_run_in_both_engines(tmp_path: Path) -> None:
    """`--print-torchtitan`: same init, same sequences, same optimizer groups, hence the same losses; one constant rate,
    because the two warm up otherwise."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(corpus=Path(spannorm.__file__).parent / "placements"))
    train = [sys.executable, "-m", "spannorm", "train", str(recipe), "--data", str(tmp_path / "data")]
    printed = subprocess.run([*train, "--print-torchtitan"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "tiny_titan.py").write_text(printed)
    (tmp_path / "on_cpu.py").write_text(ON_CPU)
    subprocess.run([*train, "--out", str(tmp_path / "ours")], capture_output=True, check=False)  # 5 steps: "unigram"
    torchrun(1, tmp_path, "titan_on_cpu.py", "--module", "on_cpu", "--config", "tiny")
    rows = [json.loads(line) for line in (tmp_path / "ours" / "records.jsonl").read_text().splitlines()]
    theirs = json.loads((tmp_path / "losses-0.json").read_text())
    assert [r["step"] for r in rows] == [step for step, _, _ in theirs] == [1, 2, 3, 4, 5]
    for row, (_, loss, norm) in zip(rows, theirs, strict=True):
        assert loss == pytest.approx(row["loss"], rel=1e-6) and norm == pytest.approx(row["grad_norm"], rel=1e-5)
    ours = SpanNormForCausalLM.from_pretrained(tmp_path / "ours" / "model")
    theirs = SpanNormForCausalLM.from_pretrained(tmp_path / "outputs" / "checkpoint" / "step-5")
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (weight - other).abs().max() < 1e-4, name


@pytest.mark.slow
def test_torchtitans_trainer_runs_a_placement_and_ends_in_from_pretrained(tmp_path: Path) -> None:
    """The command line of docs/torchtitan.md, on a CPU; the folder it leaves computes what the last weights compute."""
    run = {}
    parts = {"one": [], "tp": ["--parallelism.tensor_parallel_degree", "2"], "pp": [
        "--parallelism.pipeline_parallel_degree", "2", "--parallelism.pipeline_parallel_schedule", "1F1B"]}  # fmt: skip
    for name, how in parts.items():
        folder = tmp_path / name
        folder.mkdir()
        text_and_tokenizer(folder)
        arguments = ["--module", "titan_on_cpu", "--config", "llama3_tiny", "--placement.name", "siamese"]
        arguments += [
            "--placement.depth_rule",
            "1/sqrt(2L)",
            "--checkpoint.enable",
            "--checkpoint.last_save_model_only",
        ]
        arguments += ["--checkpoint.last_save_in_hf", "--parallelism.spmd_backend", "partial_dtensor", *how]
        torchrun(2 if how else 1, folder, "titan_on_cpu.py", *arguments)
        run[name] = losses(folder)
        assert len(run[name]) == 3 and run[name][-1] < run[name][0]
        assert run[name] == pytest.approx(run["one"], rel=1e-5)
    first, other = (SpanNormForCausalLM.from_pretrained(tmp_path / n / "checkpoint" / "step-3") for n in ("one", "tp"))
    assert first.config.placement == "siamese" and first.config.depth_rule == "1/sqrt(2L)"
    tokens = torch.randint(0, 257, (1, 16), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(first(tokens).logits).all()
    assert (first(tokens).logits - other(tokens).logits).abs().max() < 1e-3, "the same run in two processes"
