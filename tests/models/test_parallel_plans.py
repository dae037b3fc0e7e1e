"""Tensor parallelism by our plans in two real processes, against one process: logits and every gradient."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, warnings, torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.placements import PLACEMENTS
warnings.simplefilter("ignore")
dist.init_process_group("gloo")
x = torch.arange(18).reshape(2, 9)
sizes = dict(vocab_size=36, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, tie_word_embeddings=True)
experts = dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
arms = [(name, {"placement": name}) for name in PLACEMENTS] + [("qk_norm", {"placement": "pre", "qk_norm": True})]
for name, how in arms:
    for kind, more in (("dense", {}), ("experts", experts)):
        whole = SpanNormForCausalLM(SpanNormConfig(**sizes, **how, **more)).eval()
        torch.manual_seed(0)
        for parameter in whole.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 1.0, 0.3)
        folder = f"{sys.argv[1]}/{name}-{kind}"
        if dist.get_rank() == 0:
            whole.save_pretrained(folder)
        dist.barrier()
        parts = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
        for model in (whole, parts):
            model.out = model(x, labels=x)
            model.out.loss.backward()
        torch.testing.assert_close(parts.out.logits, whole.out.logits, rtol=1e-4, atol=2e-5)
        for key, parameter in parts.named_parameters():
            found, expected = parameter.grad, whole.get_parameter(key).grad
            if expected is None or found is None:
                assert expected is found is None or not (expected if found is None else found).any(), key
                continue
            found = found.full_tensor() if hasattr(found, "full_tensor") else found
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-5, msg=lambda m: f"{name} {kind} {key} {m}")
        if dist.get_rank() == 0:
            print(name, kind, flush=True)
"""


@pytest.mark.slow
def test_tensor_parallel_models_compute_what_one_process_computes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541"]
    run = subprocess.run(
        [sys.executable, *command, str(tmp_path / "script.py"), str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
