"""The kernels on machines that are not at hand, and inside what PyTorch wraps around a model. In fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import sys, torch
import spannorm.kernels.triton as fused
import spannorm.kernels.triton_sinkhorn as sinkhorn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

POINTERS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

def build(kernel, architecture, kind, width, absent, **flags):
    known = fused.constants(POINTERS[kind], width, kernel is fused.backward_kernel)
    constants = {**known, **flags, **dict.fromkeys(absent)}
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    def type_of(name):
        if name in constants:
            return "constexpr"
        if name in ("W", "B", "RSTD", "DW", "DB"):
            return "*fp32"
        return f"*{kind}" if name.isupper() else "fp32" if name in ("eps", "skip", "branch") else "i32"
    source = ASTSource(kernel, {name: type_of(name) for name in kernel.arg_names}, constants)
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["cubin"]

for architecture in [int(word) for word in sys.argv[1].split()]:
    for kind in sys.argv[2:]:
        for width in (96, 4096):
            for centre in (False, True):
                bias = () if centre else ("B",)
                for two in (False, True):
                    sizes = [
                        len(build(fused.forward_kernel, architecture, kind, width, bias,
                                  ADD=True, CENTRE=centre, KEEP_SUM=two)),
                        len(build(fused.backward_kernel, architecture, kind, width, (*bias, *(() if two else ("DS",))),
                                  SPLIT=two, CENTRE=centre, HAS_DS=two)),
                    ]
                    assert all(sizes)
                    print(architecture, kind, width, centre, two)
    for n in (2, 4, 5):
        for kernel in (sinkhorn.forward_kernel, sinkhorn.backward_kernel):
            constants = sinkhorn.constants(n, 20)
            options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
            types = {"tokens": "i32", "eps": "fp32", **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(kernel, {name: types.get(name, "*fp32") for name in kernel.arg_names}, constants)
            built = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            # of four streams a thread holds whole matrices: no sum goes through other threads
            assert built.asm["cubin"] and (n == 5 or built.metadata.shared == built.asm["ptx"].count("shfl") == 0)
    print(architecture, "sinkhorn")
"""

WRAPPED = """
import os, sys, tempfile, torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from spannorm import kernels
from spannorm.models import SpanNormConfig, SpanNormForCausalLM

torch.set_num_threads(1)
x = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))

def new(norm, placement):
    rule = "1/sqrt(L):forward"
    return SpanNormForCausalLM(SpanNormConfig(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, norm=norm, placement=placement, depth_rule=rule))

def step(model, run=None):
    loss = (model if run is None else run)(x, labels=x).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    return [loss.detach()] + [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]

def checkpointed(model):
    model.gradient_checkpointing_enable()
    return model.train()

def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)

dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
for kind in (("rmsnorm", "span"), ("layernorm", "span"), ("rmsnorm", "mhc")):
    kernels.use("reference")
    reference = step(new(*kind))
    kernels.use("triton")
    plain = step(new(*kind))
    torch.testing.assert_close(plain, reference, rtol=1e-4, atol=1e-6)
    print("reference", *kind)
    for name, wrap in {"checkpointed": checkpointed, "ddp": DistributedDataParallel, "fsdp2": sharded}.items():
        torch.testing.assert_close(step(wrap(new(*kind))), plain, rtol=0, atol=0)
        print(name, *kind)
    model = new(*kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=sys.argv[1])
    torch.testing.assert_close(step(model, compiled), plain, rtol=1e-4, atol=1e-6)
    print("compiled", *kind)
dist.destroy_process_group()
"""


def run(code: str, *arguments: str, interpret: bool) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("architectures", "kinds"),
    [("90", ["bf16"]), pytest.param("80 90", ["fp32", "bf16", "fp16"], marks=pytest.mark.slow)],
)
def test_the_kernels_compile_for_ampere_and_hopper(architectures, kinds, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing from an earlier run
    built = run(COMPILE, architectures, *kinds, interpret=False)
    assert len(built) == len(architectures.split()) * (len(kinds) * 2 * 2 * 2 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_checkpointing_ddp_fsdp2_and_compile_see_through_the_kernels(backend):
    names = ["reference", "checkpointed", "ddp", "fsdp2", "compiled"]
    kinds = ("rmsnorm span", "layernorm span", "rmsnorm mhc")
    expected = [f"{name} {kind}" for kind in kinds for name in names]
    assert run(WRAPPED, backend, interpret=True) == expected
