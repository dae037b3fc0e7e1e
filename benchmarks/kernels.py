"""The add-norm kernels alone on a GPU: their share of the bandwidth of a copy, by layout. What `tiling` rests on.

    python benchmarks/kernels.py [--json FILE]

One output is SpanNorm's shape, two are PreNorm's. Tensors of 2^27 values in bf16. A share of 1.0 is a copy's rate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

from spannorm.files import write_json
from spannorm.kernels import triton as fused
from spannorm.train.environment import machine, versions

HALF = torch.bfloat16


def milliseconds(work: Callable[[], object]) -> float:
    return do_bench(work, warmup=5, rep=20, return_mode="median")


def shares(width: int) -> list[dict[str, Any]]:
    rows, per_sm = 2**27 // width, torch.cuda.get_device_properties(0).multi_processor_count
    x, f, dy, ds = (torch.randn(rows, width, device="cuda", dtype=HALF) for _ in range(4))
    y, total, dx = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    w, rstd = torch.ones(width, device="cuda"), torch.empty(rows, device="cuda")
    sums = torch.empty(per_sm * 16, width, device="cuda")
    copy = milliseconds(lambda: y.copy_(x)) / 2  # of one tensor, one way

    def forward(tile: int, warps: int, _: int, two: bool) -> None:
        constants = fused.constants(HALF, width) | {"TILE": tile, "num_warps": warps}
        fused.forward_kernel[(triton.cdiv(rows, tile),)](
            x, f, w, None, y, total, rstd, width, width, rows, 1e-6, 1.0, 1.0,
            **constants, ADD=True, CENTRE=False, KEEP_SUM=two,
        )  # fmt: skip

    def backward(tile: int, warps: int, programs: int, two: bool) -> None:
        constants = fused.constants(HALF, width, backward=True) | {"TILE": tile, "num_warps": warps}
        fused.backward_kernel[(min(triton.cdiv(rows, tile), per_sm * programs),)](
            dy, ds if two else None, y, w, None, rstd, dx, dx, sums, sums, width, width, rows, 1.0, 1.0,
            **constants, SPLIT=False, CENTRE=False, HAS_DS=two,
        )  # fmt: skip

    found = []
    for two in (False, True):
        for kernel in (forward, backward):
            ours = fused.constants(HALF, width, kernel is backward)
            own = (ours["TILE"], ours["num_warps"], max(1, fused.WARPS_PER_SM // ours["num_warps"]))
            layouts = {own} | {
                (1, warps, programs)
                for warps in {max(1, ours["BLOCK"] // 32 // values) for values in (8, 16, 32)} - {64}
                for programs in ((1, 2, 4, 8) if kernel is backward else (own[2],))
            }
            for tile, warps, programs in layouts:
                ms = milliseconds(partial(kernel, tile, warps, programs, two))
                found.append({
                    "width": width, "kernel": kernel.__name__, "outputs": 1 + two, "share": (3 + two) * copy / ms,
                    "rows, warps, programs": (tile, warps, programs), "chosen": (tile, warps, programs) == own,
                })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for width in (1024, 2048, 4096, 8192):
        results += shares(width)
        for key in [("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2)]:
            some = [r for r in results if (r["width"], r["kernel"], r["outputs"]) == (width, *key)]
            chosen, best = next(r for r in some if r["chosen"]), max(some, key=lambda r: r["share"])
            print(f"{width:5} {key[0]:8} {key[1]} outputs: ours {chosen['share']:.2f}, best {best['share']:.2f} with "
                  f"{best['rows, warps, programs']}", flush=True)  # fmt: skip
    if options.json:
        write_json(options.json, {"results": results, "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
