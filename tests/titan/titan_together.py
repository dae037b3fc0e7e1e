"""Under torchrun: placed models on several processes against one process, loss and every gradient.

    torchrun --nproc_per_node 2 titan_together.py OUT KIND MODEL PLACEMENT …

KIND is a comma-separated list of fsdp=N, tp=N, pp=N, replicate=N, ep=N, and no_sp. A placement may bring options after
a colon.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import titan_on_cpu  # noqa: F401  # first: it makes torchtitan run on a CPU
import torch
import torch.distributed as dist
from titan_tiny import in_fp32, tiny
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims, utils
from torchtitan.models.common.moe import GroupedExperts

from spannorm.torchtitan import PlacementConfig, place

BATCH, LENGTH = 4, 32


def sum_loss(output, labels, **_):
    """Of torchtitan's kind: the sum over this process's tokens, over the number of all tokens."""
    output = output.full_tensor() if isinstance(output, DTensor) else output
    loss = F.cross_entropy(output.flatten(0, 1).float(), labels.flatten(), reduction="sum") / (BATCH * LENGTH)
    return loss, {}


def configured(model: str, placement: str, parallelism: ParallelismConfig):
    spec = tiny(model)
    name, _, options = placement.partition(":")
    config = place(spec.model, PlacementConfig(name=name, init_seed=1, options=options or "{}"))
    for layer in config.layers:
        layer.attention.rope = replace(layer.attention.rope, max_seq_len=LENGTH)
    config.update_from_config(config=SimpleNamespace(parallelism=parallelism))
    return spec, config


def gradients(part) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in part.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def one_process(model: str, placement: str, tokens, labels):
    _, config = configured(model, placement, ParallelismConfig(spmd_backend="partial_dtensor"))
    whole = config.build()
    with torch.no_grad():
        whole.init_weights()
    loss, _ = sum_loss(whole(tokens), labels)
    loss.backward()
    return loss.item(), gradients(whole)


def together(model: str, placement: str, kind: dict[str, int], sequence: bool, tokens, labels):
    parallelism = ParallelismConfig(
        spmd_backend="partial_dtensor", enable_sequence_parallel=sequence,
        data_parallel_shard_degree=kind.get("fsdp", 1), data_parallel_replicate_degree=kind.get("replicate", 1),
        tensor_parallel_degree=kind.get("tp", 1), pipeline_parallel_degree=kind.get("pp", 1),
        expert_parallel_degree=kind.get("ep", 1), pipeline_parallel_schedule="1F1B",
    )  # fmt: skip
    dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    utils.set_spmd_backend("partial_dtensor")
    spec, config = configured(model, placement, parallelism)
    with torch.device("meta"):
        built = config.build()
    built.verify_module_protocol()
    shares = kind.get("fsdp", 1) * kind.get("replicate", 1)
    how = {
        "parallel_dims": dims, "parallelism": parallelism, "ac_config": None, "dump_folder": ".",
        "training": TrainingConfig(local_batch_size=BATCH // shares, mixed_precision_param="float32"),
        "compile_config": CompileConfig(enable=False),
    }  # fmt: skip
    if dims.dp_enabled:
        rank = dims.get_mesh("batch").get_local_rank()
        tokens, labels = (t.chunk(shares)[rank] for t in (tokens, labels))
    if dims.pp_enabled:
        schedule, parts, first, last = spec.pipelining_fn(
            built, **how, device=torch.device("cpu"), model_config=config, parallelize_fn=spec.parallelize_fn,
            loss_fn=sum_loss,
        )  # fmt: skip
    else:
        parts = [spec.parallelize_fn(built, **how)]
    for part in parts:
        part.to_empty(device="cpu")
        with torch.no_grad():
            part.init_weights()
    if dims.pp_enabled:
        cut, losses = BATCH // shares, []
        schedule.step(
            arg_mbs=[(t,) for t in tokens.chunk(cut)] if first else None, kwarg_mbs=[{}] * cut,
            target_mbs=list(labels.chunk(cut)) if last else None, losses=losses if last else None, return_outputs=False,
        )  # fmt: skip
        loss = torch.stack(losses).sum() if last else torch.zeros(())
        dist.all_reduce(loss)
        loss = loss / kind.get("tp", 1)
    else:
        loss, _ = sum_loss(parts[0](tokens), labels)
        loss.backward()
        loss = loss.detach()
        dist.all_reduce(loss)
        loss = loss / kind.get("tp", 1)
    found = {}
    for part in parts:
        found |= gradients(part)
    return loss.item(), found


def main() -> None:
    out, kinds, model, *placements = sys.argv[1:]
    words = kinds.split(",")
    kind = {name: int(n) for name, _, n in (word.partition("=") for word in words) if n}
    dist.init_process_group("gloo")
    GroupedExperts.forward = in_fp32
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, 2048, (BATCH, LENGTH), generator=generator) for _ in range(2))
    rows = {}
    for placement in placements:
        their_loss, theirs = one_process(model, placement, tokens, labels)
        our_loss, ours = together(model, placement, kind, "no_sp" not in words, tokens, labels)
        worst = max((((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-3)).item(), n) for n in ours)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (worst, sorted(ours)))
        names = set().union(*(set(names) for _, names in everyone))
        rows[placement] = {
            "loss": abs(our_loss - their_loss) / their_loss, "gradient": max(w for w, _ in everyone)[0],
            "of": max(w for w, _ in everyone)[1], "all": names == theirs.keys(),
        }  # fmt: skip
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
