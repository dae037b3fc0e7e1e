"""Where a training step's time goes, by kind of operation; the device's time on a GPU, the CPU's elsewhere.

python benchmarks/step_profile.py [--placement span] [--width 64] [--depth 16] [--steps 10] [--threads 1] [--compile]
"""

from __future__ import annotations

import argparse

import torch
from step import step_of
from torch.profiler import ProfilerActivity, profile
from turns import DEVICE

from spannorm.models import SpanNormConfig, SpanNormForCausalLM

GPU = DEVICE == "cuda"
KINDS = {
    "matrix products": ("mm", "bmm", "linear", "gemm", "cutlass", "nvjet"),
    "add and norm": ("add_norm", "AddRMSNorm", "rms_norm", "vector_norm", "rsqrt"),
    "optimizer and clipping": ("adam", "foreach", "Optimizer", "lerp"),
    "loss": ("nll", "log_softmax", "cross_entropy"),
    "attention": ("attention", "flash", "softmax"),
}
"""Kind → what the names of its operations contain, the first that fits; the rest: elementwise, copies, Python."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--placement", default="span")
    parser.add_argument("--width", type=int, default=1024 if GPU else 64)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 2048) if GPU else (4, 128))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    sizes = {"hidden_size": o.width, "intermediate_size": 11 * o.width // 4, "num_attention_heads": o.width // 16}
    config = SpanNormConfig(vocab_size=257, num_hidden_layers=o.depth, placement=o.placement, **sizes)
    model = SpanNormForCausalLM(config).to(DEVICE).train()
    ids = torch.randint(0, 257, tuple(o.tokens), device=DEVICE)
    step = step_of(model, ids, compiled=o.compile, use_cache=False)
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]) as found:
        for _ in range(o.steps):
            step()
    times: dict[str, float] = {}
    for event in found.key_averages():
        spent = event.self_device_time_total if GPU else event.self_cpu_time_total
        kind = next((kind for kind, names in KINDS.items() if any(n in event.key for n in names)), "the rest")
        times[kind] = times.get(kind, 0.0) + spent / 1e3 / o.steps
    whole = sum(times.values())
    print(
        f"{o.placement}, width {o.width}, {o.depth} blocks, {o.tokens[0]} × {o.tokens[1]} tokens: {whole:.1f} ms a step"
    )
    for kind, spent in sorted(times.items(), key=lambda item: -item[1]):
        print(f"  {kind:24} {spent:8.2f} ms {100 * spent / whole:5.1f} %")


if __name__ == "__main__":
    main()
