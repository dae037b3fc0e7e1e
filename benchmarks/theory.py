"""The theory against real models at initialization: every placement, at depths to 512, means over seeds.

    python benchmarks/theory.py [--depths 8,32,128,512] [--arms span:none,pre] [--seeds 5] [--json FILE] [--plot FILE]

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

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spannorm import theory
from spannorm.files import read_json, write_json
from spannorm.lab.report.figures.panels import STYLE, WIDTH
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.placements import PLACEMENTS
from spannorm.probes import gradient_paths, measure
from spannorm.train.environment import machine, versions

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
LENGTH, VOCABULARY, BATCH = 64, 1024, 2
UNSCALED = ("pre:none", "span:none", "post:1/sqrt(L)", "deepnorm:none")
GOALS = {"variance": 0.05, "skip": 0.05, "total": 0.15}


def followed() -> list[str]:
    """The placements that the theory can follow."""
    names = []
    for name in PLACEMENTS:
        try:
            theory.predict(name, 2)
        except theory.NoRule as reason:
            print(f"left out: {reason}")
        else:
            names.append(name)
    return names


def arm(name: str, depth: int, seeds: int, options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """One placement under one rule at one depth: what is predicted, what `seeds` models do.

    Args:
        options: the placement's own.
        more: keys of both `Body` and `SpanNormConfig`.
    """
    placement, _, rule = name.partition(":")
    sizes = {**SIZES, **more}
    body = theory.Body(**sizes, sequence_length=LENGTH, repeat=1 / VOCABULARY)
    p = theory.predict(placement, depth, depth_rule=rule or None, body=body, **(options or {}))
    records, gains = [], []
    for seed in range(seeds):
        config = SpanNormConfig(placement=placement, depth_rule=rule or None, num_hidden_layers=depth,
                                vocab_size=VOCABULARY, init_seed=seed, placement_options=options, **sizes)  # fmt: skip
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


def summary(rows: list[dict[str, Any]]) -> str:
    """The worst error of each arm over all depths, as Markdown."""
    lines = [
        "| placement | depth rule | depths | variance, mean of blocks | variance, worst block | skip path | gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    arms: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault((row["placement"], row["depth_rule"]), []).append(row)
    for arm, found in arms.items():
        sites = [(row["depth"], name, site) for row in found for name, site in row["variance"].items()]
        mean = max((abs(site["mean_relative_error"]), name, depth) for depth, name, site in sites)
        depth, name, worst = max(sites, key=lambda item: abs(item[2]["relative_error"]))
        luck = 100 * (worst["standard_error"] or 0) / worst["measured"]
        gains = (max((row[path]["error"], row["depth"]) for row in found) for path in ("skip", "total"))
        depths = [row["depth"] for row in found]
        cells = [
            f"{min(depths)} … {max(depths)}",
            f"{100 * mean[0]:.1f} % ({mean[1]}, {mean[2]} blocks)",
            f"{100 * worst['relative_error']:+.1f} ± {luck:.1f} % ({name}, {depth} blocks)",
            *(f"{error:.3f} ({depth} blocks)" for error, depth in gains),
        ]
        lines.append(f"| {' | '.join([*arm, *cells])} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each placement: the skip path's gain and the whole gradient's, predicted and measured, by depth."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault(f"{row['placement']} {row['depth_rule']}", []).append(row)
    columns = 5
    lines = -(-len(arms) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.25 * WIDTH, 1.55 * lines + 0.4))
        axes = figure.subplots(lines, columns, sharex=True, squeeze=False).flatten()
        for ax in axes[len(arms) :]:
            ax.remove()
        for ax, (title, found) in zip(axes, sorted(arms.items()), strict=False):
            found.sort(key=lambda row: row["depth"])
            depths = [row["depth"] for row in found]
            ends: list[float] = [-2.0, 2.0]
            for path_name, color in (("skip", "#8a8a8a"), ("total", "#d55e00")):
                predicted, measured = ([row[path_name][k] / math.log(10) for row in found]
                                       for k in ("predicted", "measured"))  # fmt: skip
                ax.plot(depths, predicted, color=color, linewidth=1.2)
                ax.plot(depths, measured, "o", color=color, markersize=3.5)
                ends += [*predicted, *measured]
            ax.set(xscale="log", ylim=(1.1 * min(ends), 1.1 * max(ends)))
            ax.set_title(title, fontsize=7.5)
            ax.set_xticks(depths, [str(depth) for depth in depths])
            ax.minorticks_off()
            ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            ax.yaxis.set_major_formatter(lambda v, _: f"$10^{{{v:g}}}$")
        text = "gain of the gradient from output to input against blocks; lines predicted, dots measured: "
        figure.text(0.01, 0.985, text + "the skip path alone (grey), the whole (orange)", fontsize=8, va="top")
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()), h_pad=0.6, w_pad=0.4)
        figure.savefig(path, dpi=200, metadata={})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", default="8,32,128,512")
    parser.add_argument("--arms", default=",".join([*followed(), *UNSCALED]))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
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
    print(summary(list(done.values())))
    if options.plot:
        draw(list(done.values()), options.plot)


if __name__ == "__main__":
    main()
