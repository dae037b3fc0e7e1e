"""The page of all causal-LM families: how each is wired and drawn, and whether its audit is enough to rewire it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping

import torch
import transformers
from transformers.utils import logging

from spannorm.auditing.families import Surveyed, default_configuration, survey
from spannorm.auditing.inspection import Audit
from spannorm.auditing.match import ranges
from spannorm.auditing.targets import class_for
from spannorm.rewiring.found import audited, rehearse

ORIGINAL: Mapping[str, str] = {
    "gpt2": "both outputs ×1/√(2L): GPT-2's paper, section 2.3",
    "gpt_neox": "`small_init` for what reads, `wang_init`, 2/(L√d), for both outputs: EleutherAI/gpt-neox, configs of "
    "GPT-NeoX-20B and Pythia",
    "gptj": "outputs drawn with a scale 2/L: kingoflolz/mesh-transformer-jax, `transformer_shard.py`, `init_scale`",
    "mpt": "outputs divided by √(2L): `init_div_is_residual: True`, MPT's own configuration",
    "olmo": "outputs divided by √(2L) under `normal`, drawn by block under `mitchell`: allenai/OLMo, "
    "`olmo/initialization.py`",
    "opt": "Megatron's scaled outputs, ×1/√(2L): OPT's paper, arXiv 2205.01068, section 2.2",
    "bloom": "Megatron's scaled outputs: `scaled_init_method_normal`, bigscience-workshop/Megatron-DeepSpeed",
    "mamba": "`out_proj` divided by √L: `rescale_prenorm_residual=True`, state-spaces/mamba",
    "mamba2": "as mamba",
    "nanochat": "both outputs start at zero: karpathy/nanochat, `nanochat/gpt.py`, `init_weights`",
    "recurrent_gemma": "variance 2/L for the outputs of both sublayers: google-deepmind/recurrentgemma, "
    "`final_w_init_variance_scale`",
}
"""What a family's original code is known to do where it differs, with the source."""


BITS, ROUNDED = "to the bit", "to rounding"


def rewired(model_type: str) -> str:
    """Whether a family of default configuration can be rewired by its audit: `BITS`, `ROUNDED`, or why not."""
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = class_for(default_configuration(model_type))(default_configuration(model_type))
        row = audited(model)
        rehearse(model, row, "span", "1/sqrt(L)", "rescale", {})
    except Exception as error:  # whatever a stranger's code raises
        return " ".join(str(error).split()).replace("|", "/")
    return ROUNDED if row.off else BITS


def markdown(found: Iterable[Surveyed]) -> str:
    """The page of all families."""
    rows = list(found)
    rewires = {r.model_type: rewired(r.model_type) for r in rows}
    bits, rounded = (sum(why.startswith(how) for why in rewires.values()) for how in (BITS, ROUNDED))
    read = [r for r in rows if r.audit is not None]
    named = [r for r in read if r.audit and r.audit.main.match.placement]
    lines = [
        "# Families",
        "",
        "This page is for looking up a model family: where its norms stand, whether its init depends on the depth, and "
        "whether `spannorm.rewire` can change it. It covers every causal-LM family of Transformers "
        f"{transformers.__version__} in its default configuration. `make families` generates it: `spannorm audit "
        "FAMILY` runs a small model of each. [audit.md](audit.md) explains how to read the columns.",
        "",
        f"{len(rows)} families, {len(read)} audited, {len(rows) - len(read)} not (the reasons are at the end); "
        f"{len(named)} equal one of our placements. Both output matrices depth-scaled: "
        f"{sum(_scaled(r.audit) == 'both' for r in read if r.audit)}; one of two: "
        f"{sum(_scaled(r.audit).startswith('only') for r in read if r.audit)}.",
        "",
        f"{bits + rounded} families can be rewired from the audit alone, without a row of the table "
        "([rewire.md](rewire.md#by-audit)). Each was rewired to its own wiring at its own depth: "
        f"{bits} then compute the same bits and {rounded} the same up to rounding, in eval mode, in training mode with "
        "the gradient, and with a cache where they have one. Each also takes `span`." + _rowless(rows, rewires),
        "",
        "| family | equation of a block | placement | rewires | depth-scaled | its original code |",
        "|---|---|---|---|---|---|",
    ]
    for r in read:
        assert r.audit is not None
        main = r.audit.main
        kinds = list(main.kinds().items())
        words = "<br>".join(f"{'' if len(kinds) == 1 else f'blocks {_short(at)}: '}`{text}`" for text, at in kinds[:4])
        words += f"<br>and {len(kinds) - 4} more kinds" if len(kinds) > 4 else ""
        name = main.match.placement or f"none, near {main.match.nearest}"
        can = rewires[r.model_type] if rewires[r.model_type] in (BITS, ROUNDED) else "no"
        original = ORIGINAL.get(r.model_type, "")
        lines.append(f"| {r.model_type} | {words} | {name} | {can} | {_scaled(r.audit)} | {original} |")
    lines += ["", "## Not rewired by audit", ""]
    lines += [f"- `{name}`: {why}" for name, why in rewires.items() if why not in (BITS, ROUNDED)]
    lines += ["", "## Not audited", ""]
    lines += [f"- `{r.model_type}`: {r.error}" for r in rows if r.audit is None]
    return "\n".join(lines) + "\n"


def _rowless(rows: Iterable[Surveyed], rewires: Mapping[str, str]) -> str:
    """A sentence on the families that can be rewired although the table has no row of them."""
    names = [f"`{r.model_type}`" for r in rows if r.audit is None and rewires[r.model_type] in (BITS, ROUNDED)]
    return f" Among them, without a row in the table (see the end): {', '.join(names)}." if names else ""


def _short(positions: list[int]) -> str:
    return ranges(sorted(set(positions)))


def _scaled(audit: Audit) -> str:
    """Which output matrices are drawn smaller with depth."""
    if isinstance(audit.init, str):
        return "?"
    outputs = [r for r in audit.init if r.role in ("attention-out", "mixer-out", "FFN-down") and len(r.shape) > 1]
    tried = [r for r in outputs if r.depth_exponent is not None]
    scaled = dict.fromkeys(r.role for r in tried if r.depth_exponent)
    if not tried:
        return "?"
    if not scaled:
        return "no"
    return "both" if all(r.depth_exponent for r in tried) and len(scaled) > 1 else f"only {', '.join(scaled)}"


if __name__ == "__main__":
    sys.stdout.write(markdown(survey(sys.argv[1:] or None)))
