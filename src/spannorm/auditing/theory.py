"""The theory's prediction for the real model, from its placement, its depth rule and its sizes, without building it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from spannorm.auditing.draws import Row, initializer_range
from spannorm.auditing.ends import Ends
from spannorm.auditing.match import Match
from spannorm.auditing.shrink import WIDTH, depth_of
from spannorm.auditing.wiring import BlockWiring
from spannorm.errors import InputError
from spannorm.theory import Body, NoRule, Prediction, advised_rule, predict, verdict

RULES = {"1/√(2L)": "1/sqrt(2L)", "1/√L": "1/sqrt(L)", "1/L": "1/L", "√10/L": "wang"}


@dataclass(frozen=True)
class Outlook:
    """The theory's prediction, or why there is none."""

    placement: str
    depth_rule: str
    depth: int
    base_init: str
    gradient: float
    """Gain from the stack's output to its input."""
    gradient_in_block_0: float
    """The part of it from block 0, which reads the embedding."""
    growth: float | None
    """RMS of the stack's output, divided by that of its input."""
    words: str
    advised: str | None
    """The depth rule that keeps the gradient within a factor 2; None if the present rule does, or if no rule does."""


def outlook(
    match: Match, ends: Ends, init: Sequence[Row], config: Any, blocks: Sequence[BlockWiring]
) -> Outlook | None:
    """The theory of the real model; None where the wiring, the draw or the sizes are not the theory's."""
    placement = match.placement or (
        match.nearest if all(d == "the embedding is normalized" for d in match.differs) else None
    )
    depth = depth_of(config) if config is not None else None
    if not ends.embeddings:  # of images: how large what enters is, the draw of a table does not say
        return None
    if placement is None or depth is None or not any(s.letter == "A" for b in blocks for s in b.sublayers):
        return None
    rule, base = _rule(init), _base(init, config)
    if rule is None or base is None:
        return None
    try:
        gated = any("gate" in r.name for r in init if r.role == "FFN-in")
        qk_norm = any("q" in s.inner_norms for b in blocks for s in b.sublayers if s.letter == "A")
        body = Body(**_sizes(config, ends, gated), qk_norm=qk_norm, **base)
        if ends.embedding_norm is not None:  # whatever it is drawn with, what enters has the size 1
            size = math.sqrt(float(body.embedding()[0].max()))
            body = replace(body, embedding_multiplier=body.embedding_multiplier / size)
        found = predict(placement, depth, depth_rule=rule, body=body)
        said = verdict(found, body)
        advised = advised_rule(placement, depth, body) if said.kind != "keeps" else None
    except (InputError, NoRule, ValueError, ZeroDivisionError):
        return None
    last = found.variance["output"][-1] if "output" in found.variance else math.nan
    first = body.embedding()[0].max()
    growth = math.sqrt(last / float(first)) if last > 0 and float(first) > 0 else None
    return Outlook(
        placement, rule, depth, base["base_init"], math.exp(found.log_total_gain), _first_block(found), growth,
        said.words, advised,
    )  # fmt: skip


def _first_block(found: Prediction) -> float:
    gradient = found.log_gradient
    return math.exp(gradient[0] - gradient[1]) if len(gradient) > 1 and found.blocks[:2] == (0, 1) else 1.0


def _rule(init: Sequence[Row]) -> str | None:
    """The depth rule of the output matrices; None if they do not all follow the same rule."""
    outputs = [r for r in init if r.role in ("attention-out", "FFN-down") and len(r.shape) > 1]
    rules = set()
    for row in outputs:
        if row.std == 0 or row.block_exponent is not None:
            return None
        if not row.depth_exponent:
            rules.add("none" if row.depth_exponent == 0 else "unknown")
        else:
            words = next((r.partition(" × ")[2] for r in row.rules if " × " in r), "")
            rules.add(RULES.get(words, "unknown"))
    return rules.pop() if len(rules) == 1 and rules != {"unknown"} else None


def _base(init: Sequence[Row], config: Any) -> dict[str, Any] | None:
    """The base init of the matrices that read the stream."""
    names = {r.partition(" × ")[0] for row in init if row.role in ("attention-in", "FFN-in") for r in row.rules[:1]}
    given = initializer_range(config)
    if names and all(n.startswith("normal") for n in names):
        return {"base_init": "normal", "initializer_range": given or 0.02}
    if names == {"1/√fan_in"}:
        return {"base_init": "fan_in"}
    return None


def _value(config: Any, name: str) -> Any:
    """A configuration's value; None if it has none, or one per block."""
    try:
        return getattr(config, name, None)
    except Exception:  # Transformers raises an error of its own for what differs by block
        return None


def _sizes(config: Any, ends: Ends, gated: bool) -> dict[str, Any]:
    def first(*names: str) -> Any:
        return next((v for n in names if isinstance(v := _value(config, n), (int, float)) and v), None)

    own = ends.embedding_factor
    width, heads = first("hidden_size", "d_model", "n_embd"), first("num_attention_heads", "n_head", "n_heads")
    inner = first("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim") or 4 * width
    act = str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", "gelu"))
    word = next((a for a in ("silu", "gelu", "relu") if a in act.replace("swish", "silu")), "gelu")
    experts = first("num_experts", "num_local_experts", "n_routed_experts")
    if experts:
        raise ValueError("experts differ too much from family to family")
    return {
        "hidden_size": width, "num_attention_heads": heads, "head_dim": first("head_dim") or width // heads,
        "intermediate_size": inner, "hidden_act": word, "gated": gated, "tied": bool(ends.tied),
        "embedding_multiplier": math.sqrt(width) if own == math.sqrt(WIDTH) else own,
    }  # fmt: skip
