"""The versions and the machine that produced a result."""

from __future__ import annotations

import math
import os
import platform
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import spannorm

RUNS_SINCE = "0.1.0"
"""The first version of spannorm whose runs end as this version's do: the same recipe and tokens give the same result.
Raise it to the coming version when a change moves the outcome of a run: then finished runs of older versions are not
taken over (`spannorm.lab.jobs.handover`)."""


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that compute."""
    packages = ["transformers", "accelerate", "tokenizers", "numpy"]
    ours = {"python": platform.python_version(), "spannorm": spannorm.__version__, "torch": torch.__version__}
    return ours | {name: version(name) for name in packages}


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB, and the device that trains."""
    cuda = torch.cuda.is_available()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": torch.cuda.device_count() if cuda else 0,
    }


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Floating-point operations per second of a product of two square matrices: the best of a few, on all threads.

    This is an upper limit for a training step. Other work on the machine makes it smaller.
    """
    draw = torch.Generator(device).manual_seed(0)  # leaves later random numbers unchanged
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=draw) for _ in range(2))
    best = math.inf
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def memory() -> int:
    """Memory in bytes: of the GPU, or else of this machine, as far as this process may use it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # another system, or `max`
            there = min(there, int(Path(limit).read_text(encoding="ascii")))
    return there


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
