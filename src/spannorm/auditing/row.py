"""What an audit found, as the fields of a row of `spannorm.rewiring.FAMILIES`."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from spannorm.auditing.draws import Row, pattern
from spannorm.auditing.inspection import Audit
from spannorm.auditing.match import norm_roles
from spannorm.auditing.wiring import Sublayer
from spannorm.errors import InputError
from spannorm.roles import GATE_UP, Fused
from spannorm.scaling import Role

_OUTPUTS: dict[str, Role] = {"attention-out": "attn_out", "mixer-out": "attn_out", "FFN-down": "ffn_down"}


def family_fields(found: Audit, model: Any) -> dict[str, Any]:
    """The fields of a `spannorm.rewiring.Family` for an audited model of Transformers: `Family(**family_fields(a, m))`.

    Paths of the layers, the final norm and the embedding are from the base model, the others from a layer. Where a
    matrix stands is found by running; which of q, k, v, gate and up it is, by its name.

    Raises:
        InputError: the wiring equals no placement of ours, a sublayer is not one module of the layer, or the blocks
            keep their parts in different places.
    """
    main = found.main
    placement = main.match.placement
    if main.match.differs == ("the embedding is normalized",):  # by the model, before block 0, and it stays there
        placement = main.match.nearest
    if placement is None:
        raise InputError(f"{found.model} equals no placement: nearest {main.match.nearest}, {main.match.differs}.")
    base: nn.Module = model.base_model
    prefix = next((n for n, m in model.named_modules() if m is base), "")

    def from_base(path: str) -> str:
        return path.removeprefix(f"{prefix}.") if prefix else path

    shapes = {tuple(s.module for s in b.sublayers) for b in main.blocks}
    if len(shapes) != 1 or len(main.blocks[0].sublayers) != 2:
        raise InputError(f"{found.model}: a placement takes two sublayers, the same in every block; found {shapes}.")
    block = main.blocks[-1]
    layer = model.get_submodule(block.path)
    mixer, ffn = block.sublayers
    for s in block.sublayers:
        part = getattr(layer, s.module, None) if s.module else None
        if not isinstance(part, nn.Module) or isinstance(part, nn.Linear):
            raise InputError(f"{found.model}: the sublayer {s.letter} is not one module of {type(layer).__name__}.")
    roles = norm_roles(placement, len(main.blocks))
    paths = [n.removeprefix(f"{block.path}.") for n in block.norms]
    if any("." in path for path in paths):
        raise InputError(f"{found.model}: the norms {paths} sit inside other modules of the layer.")
    if len(roles) != len(paths):
        raise InputError(f"{found.model}: the norms {paths} do not play the roles {roles} one for one.")
    gains = {n.gain for n in found.norms if pattern(block.path) in n.name and n.name.rpartition(".")[2] in paths}
    ends = main.ends
    width = model.get_input_embeddings().weight.shape[1]
    return {
        "layers": from_base(main.path),
        "final_norm": from_base(ends.final_norm or ""),
        "embedding": tuple(from_base(name).removesuffix(".weight") for name in ends.embeddings),
        "attention": mixer.module,
        "ffn": ffn.module,
        "placement": placement,
        "norms": dict(zip(roles, paths, strict=True)),
        "matrices": _matrices(found, model, pattern(block.path), paths),
        "own_norms": {**_own_norms(found, layer, mixer, block.path), **_own_norms(found, layer, ffn, block.path)},
        "unit_gain": 0.0 if gains == {"1 + w"} else 1.0,
        "scaled_embedding": math.isclose(ends.embedding_factor, math.sqrt(width), rel_tol=1e-3),
    }


def _own_norms(found: Audit, layer: nn.Module, sublayer: Sublayer, block: str) -> dict[str, str]:
    """The family's own norms inside a sublayer, by what they normalize."""
    inside = [n.name.removeprefix(f"{pattern(block)}.") for n in found.norms]
    inside = [n for n in inside if n.startswith(f"{sublayer.module}.") and hasattr(layer, sublayer.module)]
    own: dict[str, str] = {}
    for path in inside:
        letter = re.match(r"([qkv])(?:uery|ey|alue)?_?(?:layer)?_?norm", path.rpartition(".")[2])
        if letter and letter[1] in sublayer.inner_norms:
            own[letter[1]] = path
        elif "out" in sublayer.inner_norms and not letter:
            own["ffn_down" if sublayer.letter == "F" else "attn_out"] = path
    return own


def _matrices(found: Audit, model: nn.Module, block: str, norms: list[str]) -> dict[str, Role | Fused]:
    """What each parameter of a layer does, but for biases and the norms in its equation."""
    if isinstance(found.init, str):
        raise InputError(f"{found.model}: {found.init}, and so what each matrix does is not known.")
    transposed = {pattern(n) for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    matrices: dict[str, Role | Fused] = {}
    for row in found.init:
        owner = row.name.removesuffix(".weight")
        path = owner.removeprefix(f"{block}.")
        if not row.name.startswith(f"{block}.") or row.role == "bias" or path in norms:
            continue
        what: Role | Fused = "norm" if row.role == "norm" else "gain" if len(row.shape) < 2 else _role(row)
        if owner in transposed:
            what = Fused(what.roles if isinstance(what, Fused) else (what,), transposed=True)
        matrices[path] = what
    return matrices


def _role(row: Row) -> Role | Fused:
    """A matrix's role: whether it reads or writes is known, which of several that read it is by its name."""
    if row.role in _OUTPUTS:
        return _OUTPUTS[row.role]
    name = row.name.removesuffix(".weight").rpartition(".")[2].lower()
    if row.role in ("attention-in", "mixer-in", "inner"):
        if re.search(r"qkv|query_key_value|c_attn", name):
            return Fused(("q", "k", "v"))
        letter = re.match(r"(?:w|c_)?([qkv])(?:uery|ey|alue|_|$)|(query|key|value)", name)
        if letter:
            return "q" if "q" in letter[0] else "k" if "k" in letter[0] else "v"
        return "projection"
    if row.role == "FFN-in":
        if re.search(r"router", row.name.lower()) or (name == "gate" and row.shape[0] <= 16):
            return "router"
        if "gate_up" in name:
            return GATE_UP
        return "ffn_gate" if re.search(r"gate|^w1$", name) else "ffn_up"
    return "projection"
