"""The theory against real models at initialization: every placement, at depths to 512, means over seeds.

    python benchmarks/theory.py [--depths 8,32,128,512] [--arms span:none,pre] [--seeds 5] [--json FILE]

Width 256, 8 heads, 64 random tokens of 1,024 in a sequence. For each site the worst block is kept. Run again with the
same file, it goes on. The goals: variance within 5 %; of gains by their logarithm, |predicted − measured| at most
0.05·max(1, |measured|) for the skip path and 0.15 for the total.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spannorm import theory
from spannorm.files import read_json, write_json
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.probes import gradient_paths, measure
from spannorm.train.environment import machine, versions

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
LENGTH, VOCABULARY, BATCH = 64, 1024, 2
UNSCALED = ("pre:none", "span:none", "post:1/sqrt(L)", "deepnorm:none")
GOALS = {"variance": 0.05, "skip": 0.05, "total": 0.15}


def arm(name: str, depth: int, seeds: int, **more: Any) -> dict[str, Any]:
    """One placement under one rule at one depth: what is predicted, what `seeds` models do.

    Args:
        more: keys of both `Body` and `SpanNormConfig`.
    """
    placement, _, rule = name.partition(":")
    sizes = {**SIZES, **more}
    body = theory.Body(**sizes, sequence_length=LENGTH, repeat=1 / VOCABULARY)
    p = theory.predict(placement, depth, depth_rule=rule or None, body=body)
    records, gains = [], []
    for seed in range(seeds):
        config = SpanNormConfig(placement=placement, depth_rule=rule or None, num_hidden_layers=depth,
                                vocab_size=VOCABULARY, init_seed=seed, **sizes)  # fmt: skip
        model = SpanNormForCausalLM(config).eval()
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))

        def loss_of(model: Any = model, ids: torch.Tensor = ids) -> torch.Tensor:
            return model(ids, labels=ids, use_cache=False).loss

        records.append(measure(model, loss_of, similarity=False, rank=False))
        gains.append(gradient_paths(model, loss_of))
    sites = {}
    for site, predicted in p.variance.items():
        if site == "output":
            measured = [np.square(r.signal_rms[1:]) for r in records]
        else:
            measured = [np.asarray(r.variance[site], float) for r in records]
        values = np.array(measured)[:, list(p.blocks)]
        error = np.asarray(predicted) / values.mean(0) - 1
        worst = int(np.nanargmax(np.abs(error)))
        sites[site] = {
            "block": p.blocks[worst], "predicted": predicted[worst], "measured": values[:, worst].mean(),
            "standard_error": values[:, worst].std(ddof=1) / math.sqrt(seeds) if seeds > 1 else None,
            "relative_error": error[worst], "mean_relative_error": float(np.nanmean(error)),
        }  # fmt: skip

    def log_gain(path: str, predicted: float) -> dict[str, Any]:
        values = np.array([g.log_gain[path][0] for g in gains])
        return {
            "predicted": predicted, "measured": values.mean(),
            "standard_error": values.std(ddof=1) / math.sqrt(seeds) if seeds > 1 else None,
            "error": abs(predicted - values.mean()) / max(1.0, abs(values.mean())),
        }  # fmt: skip

    return {
        "placement": placement, "depth_rule": p.depth_rule, "depth": depth, "variance": sites,
        "skip": log_gain("skip", p.log_skip_gain), "total": log_gain("total", p.log_total_gain),
        "attention_share": [p.total_attention_share, float(np.mean([g.share("without_attention") for g in gains]))],
        "ffn_share": [p.total_ffn_share, float(np.mean([g.share("without_ffn") for g in gains]))],
        "correlation": [p.correlation[-1], float(np.mean([r.token_cosine[-1] for r in records]))],
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    site, worst = max(row["variance"].items(), key=lambda item: abs(item[1]["relative_error"]), default=("–", None))
    variance = f"{worst['relative_error']:+.3f} at {site} of block {worst['block']}" if worst else "–"
    gains = "  ".join(
        f"{path} {row[path]['predicted']:.3f} → {row[path]['measured']:.3f} (off {row[path]['error']:.3f})"
        for path in ("skip", "total")
    )
    return f"{row['placement']:11} {row['depth_rule']:11} {row['depth']:4}  variance {variance:34} {gains}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", default="8,32,128,512")
    parser.add_argument("--arms", default=",".join([*theory.PLACEMENTS, *UNSCALED]))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # pairs their authors discourage are among the arms
    known = read_json(options.json)["rows"] if options.json and options.json.exists() else []
    done = {(row["arm"], row["depth"]): row for row in known}
    for depth in map(int, options.depths.split(",")):
        for name in options.arms.split(","):
            if (name, depth) not in done:
                done[name, depth] = {"arm": name, **arm(name, depth, options.seeds)}
            print(line(done[name, depth]), flush=True)
            if options.json:
                about = {"seeds": options.seeds, "goals": GOALS, "machine": machine(), "versions": versions()}
                write_json(options.json, {"rows": list(done.values()), **about})


if __name__ == "__main__":
    main()
