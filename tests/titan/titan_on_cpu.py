"""torchtitan's own entry point, on a CPU: what `torchrun … -m torchtitan.train` runs, with gloo in place of NCCL.

torchtitan takes the accelerator that PyTorch finds and CUDA where there is none. Its language models take flex or
varlen attention, neither of which has a CPU backward: here they get its `ScaledDotProductAttention`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

torch._utils._get_available_device_type = lambda: "cpu"
torch.cpu.get_device_name = lambda *_: "cpu"
torch.cpu.current_device = lambda: 0
if not hasattr(torch.distributed, "set_timeout"):  # newer than PyTorch 2.13
    torch.distributed.set_timeout = lambda *_: None
for name in ("reset_peak_memory_stats", "empty_cache", "memory_stats"):
    setattr(torch.cpu, name, lambda *_: {})
torch.cpu.get_device_properties = lambda *_: type("Properties", (), {"total_memory": 1})()

from titan_tiny import tiny  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.pipelining import schedules  # noqa: E402

divide = FSDPModule.set_gradient_divide_factor


def divide_and_sum(self, factor):  # gloo cannot multiply while it reduces
    self.set_force_sum_reduction_for_comms(True)
    divide(self, factor)


FSDPModule.set_gradient_divide_factor = divide_and_sum


def step(self, *, arg_mbs=None, kwarg_mbs=None, target_mbs=None, losses=None, loss_kwargs=None, return_outputs=True):
    """What torchtitan 0.3.0 calls: a schedule's step on microbatches that are cut already, newer than PyTorch 2.13."""
    self._stage.has_backward = True
    self._stage.clear_runtime_states()
    self._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs=loss_kwargs)


if "arg_mbs" not in schedules.PipelineScheduleSingle.step.__code__.co_varnames:
    schedules.PipelineScheduleSingle.step = step

from torchtitan.components.checkpointer import CheckpointManager  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.metrics import MetricsProcessor  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402
from torchtitan.components.validate import Validator  # noqa: E402
from torchtitan.config import ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader  # noqa: E402
from torchtitan.trainer import Trainer as TitanTrainer  # noqa: E402

from spannorm.torchtitan import PlacementConfig, with_placement  # noqa: E402


def run_config(folder: Path, model: str, dtype: str = "float32") -> TitanTrainer.Config:
    """A short run of torchtitan's own, on text and with a tokenizer that lie in a folder."""
    return TitanTrainer.Config(
        loss=CrossEntropyLoss.Config(),
        hf_assets_path=str(folder / "assets"),
        dump_folder=str(folder),
        model_spec=tiny(model),
        optimizer=default_adamw(lr=1e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(
            local_batch_size=4, global_batch_size=4, seq_len=32, steps=3, disable_cuda_graphs=True,
            mixed_precision_param=dtype, mixed_precision_reduce="float32",
        ),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4_test", dataset_path=str(folder / "text")),
        metrics=MetricsProcessor.Config(log_freq=1, enable_tensorboard=False),
        parallelism=ParallelismConfig(),
        checkpoint=CheckpointManager.Config(interval=10, last_save_model_only=False),
        activation_checkpoint=None,
        validator=Validator.Config(enable=False),
    )  # fmt: skip


def titan_llama3_tiny():
    return run_config(Path.cwd(), "llama3")


def llama3_tiny():
    return with_placement(run_config(Path.cwd(), "llama3"), PlacementConfig(init_seed=0))


def qwen3_tiny():
    return with_placement(run_config(Path.cwd(), "qwen3"), PlacementConfig(init_seed=0))


def moe_tiny():
    return with_placement(run_config(Path.cwd(), "moe"), PlacementConfig(init_seed=0))


def main() -> None:
    """Train, and leave every step's loss and gradient norm in losses.json."""
    from torchtitan import train
    from torchtitan.components import metrics

    steps = []
    log = metrics.MetricsProcessor.log

    def record(self, step, global_avg_loss, global_max_loss, grad_norm, **rest):
        steps.append((step, float(global_avg_loss), float(grad_norm)))
        return log(self, step, global_avg_loss, global_max_loss, grad_norm, **rest)

    metrics.MetricsProcessor.log = record
    train.main()
    losses = max((loss for _, loss, _ in steps), default=0.0)
    if losses > 0:  # of a pipeline the last stage alone knows the loss; the others say -1
        Path(f"losses-{os.environ['RANK']}.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
