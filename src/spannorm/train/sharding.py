"""A model in shards: FSDP2 over all processes, with NCCL on GPUs and gloo on CPUs.

Trainer leaves FSDP to Accelerate, which silently ignores it on a CPU. So this module calls `fully_shard` itself, and
Trainer does not change the model. Tests on CPUs then run the same code as GPUs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from spannorm.files import read_json, write_json
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.train.engine import Engine
from spannorm.train.processes import is_first

SHARDS = "shards"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def sharded_model(config: SpanNormConfig, bf16: bool) -> SpanNormForCausalLM:
    """The model, split over the processes. Each block is one unit, and the rest is one unit.

    It is built on meta device and drawn shard by shard, with the same values as the whole model. With bf16 the blocks
    are gathered in bf16, and their gradients are reduced in fp32. The residual stream stays fp32, as under autocast.
    """
    if not distributed.is_initialized():  # one process: all shards are here
        distributed.init_process_group(store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    # a build of PyTorch for CUDA names CUDA even where there is no GPU, unless it is told to look
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    with torch.device("meta"):
        model = SpanNormForCausalLM(config)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy if bf16 else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    model.init_weights_()
    return model


class ShardedEngine(Engine):
    """`Engine` for a model in shards. Its checkpoints are sharded safetensors, for any number of processes."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        accelerator = self.accelerator
        clip = accelerator.clip_grad_norm_
        accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)  # else it adds DDP
        accelerator.clip_grad_norm_ = lambda *args, **kwargs: clip(*args, **kwargs).full_tensor()

    def whole_weights(self) -> dict[str, Tensor]:
        """The state dict of the whole model, in the first process."""
        return get_model_state_dict(  # type: ignore[return-value]
            self._whole, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if is_first():
            self.model.config.save_pretrained(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        tensors, rest = self._state()
        shards = Path(output_dir) / SHARDS
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(shards), save_distributed=True))
        if is_first():
            write_json(shards / "optimizer.json", rest)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        pass  # with the optimizer's state, when there is an optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        shards = Path(checkpoint) / SHARDS
        tensors, _ = self._state()
        load(tensors, storage_reader=HuggingFaceStorageReader(str(shards)))
        set_model_state_dict(self._whole, _under("model:", tensors), options=StateDictOptions(strict=False))
        optimizer = _under("optimizer:", tensors) | read_json(shards / "optimizer.json")
        set_optimizer_state_dict(self._whole, self._adam, optimizer, options=_FLAT)
        scheduler = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and optimizer state: what is a tensor, and the rest, which JSON can hold."""
        model: dict[str, Any] = get_model_state_dict(self._whole)
        state: dict[str, Any] = get_optimizer_state_dict(self._whole, self._adam, options=_FLAT)
        tensors = {f"optimizer:{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        tensors |= {f"model:{k}": model[k] for k, _ in self._whole.named_parameters()}  # a tied one once
        return tensors, {k: v for k, v in state.items() if not isinstance(v, Tensor)}

    @property
    def _adam(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer  # in Accelerate's wrapper
        return optimizer.optimizer  # type: ignore[no-any-return]

    @property
    def _whole(self) -> torch.nn.Module:
        """The model without a compiled one's wrapper, which would change the names."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)  # type: ignore[no-any-return]


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
