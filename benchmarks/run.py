"""Every benchmark: ours and its rivals in turns, a table and JSON.

    python benchmarks/run.py [--rows 1,2,3,4,5,6,7,8,9] [--placements mhc] [--pairs 20] [--threads 1] [--json FILE]

`make bench` runs all of it. Sizes are small on a CPU and real on a GPU. Rivals that are not installed are named.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from step import HALF, loss_of, step_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from turns import DEVICE, Result, as_dicts, in_turns, kept_mib, table, timed

from spannorm import kernels
from spannorm.files import write_json
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.placements import PLACEMENTS
from spannorm.probes import measure
from spannorm.train.engine import Engine, arguments
from spannorm.train.environment import machine, versions
from spannorm.train.recipe import TrainRecipe

GPU = DEVICE == "cuda"
SIZES: dict[str, int] = (
    {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
    if GPU
    else {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
)
NARROW = SIZES | {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8} if GPU else SIZES
DEPTH, BATCH, LENGTH, SHORT = (24, 4, 2048, 2048) if GPU else (8, 4, 128, 64)
ROWS, WIDTHS = (16384, (1024, 4096, 8192)) if GPU else (512, (64, 1024))
EPS = 1e-6


def missing(name: str) -> bool:
    """Whether an optional rival is not there; then it is named."""
    if find_spec(name) is None:
        print(f"rival missing: {name} (pip install {name})")
        return True
    return False


# ---------------------------------------------------------------------------------------------------- contestants


def ours(placement: str, depth: int = DEPTH, length: int = LENGTH, sizes: dict[str, int] = SIZES) -> nn.Module:
    config = SpanNormConfig(
        placement=placement, num_hidden_layers=depth, max_position_embeddings=length, pad_token_id=None, **sizes
    )
    return SpanNormForCausalLM(config).to(DEVICE)


def llama(depth: int = DEPTH, length: int = LENGTH, sizes: dict[str, int] = SIZES, liger: bool = False) -> nn.Module:
    config = LlamaConfig(num_hidden_layers=depth, max_position_embeddings=length, **sizes)
    model = LlamaForCausalLM(config).to(DEVICE)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model, rope=False)  # its RoPE would replace everybody's
    return model


def litgpt(depth: int = DEPTH, length: int = LENGTH) -> nn.Module:
    from litgpt import GPT, Config

    config = Config(
        block_size=length, vocab_size=SIZES["vocab_size"], padded_vocab_size=SIZES["vocab_size"],
        n_layer=depth, n_head=SIZES["num_attention_heads"], n_embd=SIZES["hidden_size"],
        intermediate_size=SIZES["intermediate_size"], rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    )  # fmt: skip

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = GPT(config)

        def forward(self, ids: Tensor, labels: Tensor) -> Any:
            logits = self.gpt(ids)
            return argparse.Namespace(
                loss=F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
            )

    return WithLoss().to(DEVICE)


def tokens(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    ids = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))
    return ids.to(DEVICE)


# ----------------------------------------------------------------------------------------------------------- rows


def add_norm(pairs: int) -> Iterator[list[Result]]:
    """(1) forward and backward of add + RMSNorm against PyTorch's, Liger's and a copy of the same bytes."""
    liger = GPU and not missing("liger_kernel")
    for width in WIDTHS:
        for outputs in (1, 2):
            yield add_norm_once(pairs, width, outputs, liger)
            if GPU:
                yield add_norm_once(pairs, width, outputs, liger, graph=True)


def replayed(work: Callable[[], Any]) -> Callable[[], None]:
    """The same kernels as one CUDA graph: what the GPU does, without the time that Python takes to launch it."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def add_norm_once(pairs: int, width: int, outputs: int, liger: bool, graph: bool = False) -> list[Result]:
    """At one width, with the normed value alone (SpanNorm's shape) or with the sum too (PreNorm's)."""
    dtype = HALF if GPU else torch.float32
    above = [torch.randn(1, ROWS, width, device=DEVICE, dtype=dtype) for _ in range(outputs)]
    x, f = (torch.randn_like(above[0]).requires_grad_() for _ in range(2))
    w = torch.ones(width, device=DEVICE, dtype=dtype, requires_grad=True)

    def eager(x: Tensor, f: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = x + f
        return (F.rms_norm(total, w.shape, w, EPS), total)[:outputs]

    def fused(x: Tensor, f: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = kernels.add_norm(x, f, w, eps=EPS, return_sum=outputs == 2)
        return y if outputs == 2 else (y,)

    def ligers(x: Tensor, f: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        # input, residual, gain, eps, offset, casting mode, in place
        return LigerFusedAddRMSNormFunction.apply(f, x, w, EPS, 0.0, "llama", False)[:outputs]

    forward: dict[str, Callable[..., Any]] = {"ours": fused, "rms_norm": eager, **({"Liger": ligers} if liger else {})}
    kept = {name: kept_mib(partial(run, x, f, w)) for name, run in forward.items()}
    forward["rms_norm compiled"] = torch.compile(eager)
    # forward reads 2 tensors and writes as many as it has outputs, backward reads y and their gradients and writes 1
    moved = (4 + 2 * outputs) * x.numel() * x.element_size()
    source, target = (torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE) for _ in range(2))

    def both_ways(run: Callable[..., Any]) -> Callable[[], float]:
        def work() -> Any:
            leaves = [t.detach().requires_grad_() for t in (x, f, w)]  # a graph takes none that another stream has met
            return torch.autograd.grad(run(*leaves), leaves, above)

        return timed(replayed(work) if graph else work, 20 if GPU else 5)

    turns = {name: both_ways(run) for name, run in forward.items()}
    turns["copy of the same bytes"] = timed(lambda: target.copy_(source), 20 if GPU else 5)
    shape = ("one output" if outputs == 1 else "two outputs") + (", as one CUDA graph" if graph else "")
    return in_turns(f"(1) add-norm, forward + backward, {ROWS} × {width}, {shape}", turns, pairs, kept)


def placements(pairs: int) -> Iterator[list[Result]]:
    """(2) the training step of SpanNorm against PreNorm's in our model, both with the lean backward."""
    yield training(f"(2) step, {DEPTH} blocks", pairs, {"span": ours("span"), "pre": ours("pre")})
    if not GPU:
        yield training("(2) step, 32 blocks", pairs, {"span": ours("span", 32), "pre": ours("pre", 32)})


def training(row: str, pairs: int, models: dict[str, nn.Module], ids: Tensor | None = None) -> list[Result]:
    ids = tokens() if ids is None else ids
    kept = {name: kept_mib(partial(loss_of, model, ids), model) for name, model in models.items()}
    return in_turns(row, {name: timed(step_of(model, ids)) for name, model in models.items()}, pairs, kept)


def rivals(pairs: int) -> Iterator[list[Result]]:
    """(3) our model against Transformers' Llama and litgpt's GPT."""
    models = {"span": ours("span"), "pre": ours("pre"), "Transformers' Llama": llama()}
    if GPU and not missing("liger_kernel"):
        models["Llama + Liger"] = llama(liger=True)
    if not missing("litgpt"):
        models["litgpt"] = litgpt()
    yield training(f"(3) step, {DEPTH} blocks", pairs, models)
    if GPU:
        compiled = {"span": ours("span"), "Transformers' Llama": llama()}
        turns = {name: timed(step_of(model, tokens(), compiled=True)) for name, model in compiled.items()}
        yield in_turns(f"(3) compiled step, {DEPTH} blocks", turns, pairs)


class Stopwatch(TrainerCallback):
    """Seconds from a step's begin to the next one's, the first step of a turn left out."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())


def trainer(pairs: int) -> Iterator[list[Result]]:
    """(4) the Trainer against a bare loop."""
    steps, model, bare = 6, ours("span"), timed(step_of(ours("span"), tokens()))
    data = [{"input_ids": row, "labels": row} for row in tokens(steps * BATCH).cpu()]
    recipe = TrainRecipe(steps=steps, batch_size=BATCH, warmup_steps=1)

    def turn() -> float:
        with tempfile.TemporaryDirectory() as folder:
            args = arguments(recipe, Path(folder))
            args.save_strategy = "no"
            watch = Stopwatch()
            engine = Engine(model, args, recipe=recipe, train_dataset=data, callbacks=[watch])
            engine.remove_callback(PrinterCallback)
            engine.train()
        return (watch.marks[-1] - watch.marks[1]) / (len(watch.marks) - 2)

    yield in_turns("(4) a step under the Trainer", {"Trainer": turn, "bare loop": bare}, pairs)


def decoding(pairs: int) -> Iterator[list[Result]]:
    """(5) greedy decoding with the cache."""
    new, prompt = (64, 64) if GPU else (24, 16)

    def turn(model: Any) -> Callable[[], float]:
        ids = tokens(1, prompt)
        return timed(
            lambda: model.eval().generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False,
                pad_token_id=0,
            )
        )  # fmt: skip

    models = {"span": ours("span"), "pre": ours("pre"), "Transformers' Llama": llama()}
    yield in_turns(f"(5) decoding {new} tokens", {name: turn(model) for name, model in models.items()}, pairs)


def probing(pairs: int) -> Iterator[list[Result]]:
    """(6) what a probe costs: a step, and a step with the share of the probe that falls on it."""
    model, ids, every = ours("span"), tokens(), TrainRecipe().probe_every
    step = timed(step_of(model, ids))
    probe = timed(lambda: measure(model, lambda: loss_of(model, ids)))
    turns = {"step with probes": lambda: step() + probe() / every, "step without": step}
    yield in_turns(f"(6) a probe every {every} steps", turns, pairs)


def growth(pairs: int) -> Iterator[list[Result]]:
    """(7) with depth and with sequence length; on a GPU at half the width, so that three models of 256 blocks fit."""
    for depth, length in ((8, SHORT), (32, SHORT), (128, SHORT), (256, SHORT), (4, 256), (4, 1024), (4, 8192)):
        shape = (depth, length, NARROW)
        models = {"span": ours("span", *shape), "pre": ours("pre", *shape), "Transformers' Llama": llama(*shape)}
        yield training(f"(7) step, {depth} blocks, 1 × {length} tokens", pairs, models, tokens(1, length))
        del models  # before the next ones are made


def share_of_peak(pairs: int) -> Iterator[list[Result]]:
    """(8) a step, compiled on a GPU, against bare matrix products of as many operations: 1 / ratio is the share."""
    model, ids = ours("span"), tokens()
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name)
    attention = DEPTH * LENGTH * SIZES["hidden_size"]  # causal: half of all pairs
    operations = 6 * (matrices + attention) * ids.numel()
    n = 8192 if GPU else 1024
    a, b = (torch.randn(n, n, device=DEVICE, dtype=HALF if GPU else torch.float32) for _ in range(2))
    product = timed(lambda: a @ b, 10 if GPU else 1)
    bare = {"bare products": lambda: product() * operations / (2 * n**3)}
    yield in_turns(
        f"(8) {matrices / 1e6:.1f} M in matrices", {"span": timed(step_of(model, ids, compiled=GPU))} | bare, pairs
    )


def price(pairs: int, names: Iterable[str] = PLACEMENTS) -> Iterator[list[Result]]:
    """(9) every placement's step and memory over PreNorm's; one sequence at a time where the batch does not fit."""
    for depth in (8, 32):
        pre = ours("pre", depth)
        for name in [name for name in names if name != "pre"]:
            yield price_of(name, depth, pre, pairs, BATCH) or price_of(name, depth, pre, pairs, 1)


def price_of(name: str, depth: int, pre: nn.Module, pairs: int, batch: int) -> list[Result]:
    """Nothing where the memory is too small."""
    row = f"(9) {name}, {depth} blocks, {batch} × {LENGTH} tokens"
    try:
        return training(row, pairs, {name: ours(name, depth), "pre": pre}, tokens(batch))
    except torch.OutOfMemoryError:
        print(f"{row}: out of memory", flush=True)
    torch.cuda.empty_cache()
    return []


ROWS_OF = (add_norm, placements, rivals, trainer, decoding, probing, growth, share_of_peak, price)
ROW = dict(enumerate(ROWS_OF, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(map(str, ROW)))
    parser.add_argument("--placements", help="of row 9; all by default")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: list[Result] = []
    about = {"pairs": options.pairs, "threads": options.threads, "machine": machine(), "versions": versions()}
    print(json.dumps(about["machine"]))
    rows = ROW | ({9: partial(price, names=options.placements.split(","))} if options.placements else {})
    for number in map(int, options.rows.split(",")):
        for new in rows[number](options.pairs):
            print(table(new), flush=True)
            results += new
            if options.json:  # a run that is cut off keeps what it measured
                write_json(options.json, {"results": as_dicts(results), **about})


if __name__ == "__main__":
    main()
