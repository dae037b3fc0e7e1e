"""An audit's result as the fields of a row of `spannorm.rewiring.FAMILIES`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from spannorm.auditing.calls import Recording, layer_calls, recording
from spannorm.auditing.draws import Row, pattern
from spannorm.auditing.inspection import Audit, StackAudit
from spannorm.auditing.match import norm_roles
from spannorm.auditing.steps import LayerCalls, Step
from spannorm.auditing.targets import made_up_inputs
from spannorm.auditing.trace import undisturbed
from spannorm.auditing.wiring import BlockWiring
from spannorm.errors import InputError
from spannorm.roles import GATE_UP, Fused
from spannorm.scaling import Role

_FUSED = re.compile(r"qkv|query_key_value|c_attn|q_k_v|in_proj", re.IGNORECASE)
"""Matrices that make q, k and v, in an order that is not known."""
_OUTPUTS: dict[str, Role] = {"attention-out": "attn_out", "mixer-out": "attn_out", "FFN-down": "ffn_down"}


def family_fields(found: Audit, model: Any, example_inputs: Any = None) -> dict[str, Any]:
    """The fields of a `spannorm.rewiring.Family` for an audited model of Transformers: `Family(**family_fields(a, m))`.

    Paths of the layers, the final norm and the embedding start at the base model, the others at a layer. Running the
    model shows the place of each matrix; its name tells whether it is q, k, v, gate or up. The model runs once more, in
    training mode, and is as before afterwards.

    Args:
        found: its audit.
        model: the model.
        example_inputs: a dictionary; None makes up tokens.

    Raises:
        InputError: the wiring equals none of our placements, or a sublayer is not a sequence of modules.
    """
    main, name = found.main, found.model
    if len(found.stacks) > 1:
        raise InputError(f"{name} has {len(found.stacks)} stacks of blocks, and rewire takes one.")
    placement, options, multiplier = _placement(found, model)
    base: nn.Module = model.base_model
    prefix = next((n for n, m in model.named_modules() if m is base), "")

    def from_base(path: str) -> str:
        return path.removeprefix(f"{prefix}.") if prefix else path

    if len({b.path for b in main.blocks}) < len(main.blocks):
        raise InputError(f"{name} runs its blocks more than once.")
    roles = norm_roles(placement, len(main.blocks), options)
    rows = _layer_rows(found, model, roles, _calls(main, model, example_inputs, name))
    ends = main.ends
    gains = {n.gain for b in main.blocks for n in found.norms if n.name in {pattern(p) for p in b.norms}}
    width = model.get_input_embeddings().weight.shape[1]
    common = {
        "layers": from_base(main.path),
        "final_norm": from_base(ends.final_norm or ""),
        "embedding": tuple(from_base(name).removesuffix(".weight") for name in ends.embeddings),
        "placement": placement,
        "options": options,
        "multiplier": multiplier,
        "unit_gain": 0.0 if gains == {"1 + w"} else 1.0,
        "scaled_embedding": math.isclose(ends.embedding_factor, math.sqrt(width), rel_tol=1e-3),
        "found": True,
    }
    return {**rows[0], **common, "others": tuple({**row, **common} for row in rows[1:])}


def _layer_rows(
    found: Audit, model: nn.Module, roles: Sequence[str], calls: Mapping[str, LayerCalls]
) -> list[dict[str, Any]]:
    """The fields that describe a layer, once for each kind of layer in the stack."""
    kinds: dict[tuple[tuple[str, ...], str], tuple[BlockWiring, LayerCalls]] = {}
    for block in found.main.blocks:
        paths = tuple(n.removeprefix(f"{block.path}.") for n in block.norms)
        if len(roles) != len(paths):
            raise InputError(f"{found.model}: the norms {list(paths)} do not play the roles {roles} one for one.")
        call = calls[block.path]
        kinds.setdefault((paths, repr(call)), (block, call))
    rows = []
    for (paths, _), (block, call) in kinds.items():
        attn, ffn = (_module(call.steps[branch]) for branch in ("attn", "ffn"))
        matrices = _matrices(found, model, block)
        names = [n for n, what in matrices.items() if what == "q" or (isinstance(what, Fused) and what.roles == ("q",))]
        rows.append(
            {
                "attention": attn,
                "ffn": ffn,
                "norms": dict(zip(roles, paths, strict=True)),
                "matrices": matrices,
                "unsplit": tuple(n for n in names if _FUSED.search(n)),
                "own_norms": _own_norms(found, block),
                "steps": call.steps,
                "returns": call.returns,
                "unread": call.unread,
                "classes": call.classes,
            }
        )
    return rows


def _placement(found: Audit, model: nn.Module) -> tuple[str, dict[str, Any], str | None]:
    """The placement that a stack equals, its options, and the layers' factor on their branches where they have one."""
    m = found.main.match
    if m.placement is not None or m.differs == ("the embedding is normalized",):  # by the model, and it stays there
        return m.nearest, dict(m.options), None
    layers = [model.get_submodule(b.path) for b in found.main.blocks]
    factors = {f for b in found.main.blocks for f in re.findall(r"([\d.]+)·[AMF]\(", b.text)}
    plain = {re.sub(r"[\d.]+·([AMF]\()", r"\1", b.text).replace("M(", "A(") for b in found.main.blocks}
    if len(factors) == 1 and plain == {"h = x + A(N(x)); x' = h + F(N(h))"}:
        value = float(factors.pop())
        names = [k for k, v in vars(layers[0]).items() if isinstance(v, float) and math.isclose(v, value, rel_tol=1e-3)]
        names = [k for k in names if all(getattr(layer, k, None) == getattr(layers[0], k) for layer in layers)]
        if len(names) == 1:
            return "pre", {}, names[0]
    raise InputError(f"{found.model} equals no placement: nearest {m.nearest}, differs in: {'; '.join(m.differs)}.")


def _calls(main: StackAudit, model: Any, example_inputs: Any, name: str) -> dict[str, LayerCalls]:
    """Block path → how it runs its sublayers."""
    inputs = dict(example_inputs or made_up_inputs(model, model.config))
    layers = {b.path: model.get_submodule(b.path) for b in main.blocks}
    recorded = _record(model, layers, inputs)
    found = {}
    for block in main.blocks:
        weights: dict[str, list[str]] = {"attn": [], "ffn": []}
        for s in block.sublayers:
            branch = "ffn" if s.letter == "F" else "attn"
            weights[branch] += [w.removeprefix(f"{block.path}.") for w in s.weights if w.startswith(f"{block.path}.")]
        if block.path not in recorded or not all(weights.values()):
            raise InputError(f"{name}: a placement takes two sublayers, and {block.path} is `{block.text}`.")
        norms = [n.removeprefix(f"{block.path}.") for n in block.norms]
        norm_weights = tuple(f"{n}." for n in norms)
        own = {k: [w for w in v if not w.startswith(norm_weights)] for k, v in weights.items()}
        width = model.get_input_embeddings().weight.shape[1]
        try:
            found[block.path] = layer_calls(recorded[block.path], norms, own, width)
        except InputError as error:
            raise InputError(f"{name}: {type(layers[block.path]).__name__} cannot be taken apart: {error}.") from error
    return found


def _record(model: Any, layers: Mapping[str, nn.Module], inputs: dict[str, Any]) -> dict[str, Recording]:
    """A call of each layer, with a cache if the model can use one, so that the arguments can be told apart."""
    for cached in (True, False):
        with undisturbed(model), torch.no_grad(), recording(layers) as recorded:
            model.train()
            try:
                model(**{k: cached if k == "use_cache" else v for k, v in inputs.items()})
            except Exception as error:  # whatever a stranger's code raises
                if not cached or "use_cache" not in inputs:
                    raise InputError(f"{type(model).__name__} does not run in training mode: {error}.") from error
            else:
                break
    return recorded


def _module(steps: Sequence[Step]) -> str:
    """The first module of a sublayer, which stands for it."""
    return next(s.path for s in steps if s.path)


def _own_norms(found: Audit, block: BlockWiring) -> dict[str, str]:
    """The family's own norms inside a sublayer, by what they normalize."""
    own: dict[str, str] = {}
    inside = [n.name.removeprefix(f"{pattern(block.path)}.") for n in found.norms]
    for sublayer in block.sublayers:
        for path in inside:
            letter = re.match(r"([qkv])(?:uery|ey|alue)?_?(?:layer)?_?norm", path.rpartition(".")[2])
            if not path.startswith(f"{sublayer.module}."):
                continue
            if letter and letter[1] in sublayer.inner_norms:
                own[letter[1]] = path
            elif "out" in sublayer.inner_norms and not letter:
                own["ffn_down" if sublayer.letter == "F" else "attn_out"] = path
    return own


def _matrices(found: Audit, model: nn.Module, block: BlockWiring) -> dict[str, Role | Fused]:
    """What each matrix of a layer does, and its biases that are not called so. The rest keeps what its module draws."""
    if isinstance(found.init, str):
        raise InputError(f"{found.model}: {found.init}, and so what each matrix does is not known.")
    layer, prefix = model.get_submodule(block.path), f"{pattern(block.path)}."
    here = {n for n, _ in layer.named_parameters()}
    transposed = {pattern(n) for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    matrices: dict[str, Role | Fused] = {}
    for row in found.init:
        name = row.name.removeprefix(prefix)
        owner = name.removesuffix(".weight")
        if name == row.name or name not in here:
            continue
        if row.role == "bias":
            matrices |= {} if name.endswith("bias") else {owner: "bias"}
        elif len(row.shape) > 1 and (what := _role(row)) is not None:
            turned = row.fan_in is not None and row.shape[-1] != row.fan_in == row.shape[-2]
            if turned or prefix + owner in transposed:
                what = Fused(what.roles if isinstance(what, Fused) else (what,), transposed=True)
            matrices[owner] = what
    return matrices


def _role(row: Row) -> Role | Fused | None:
    """A matrix's role. The audit knows whether it reads or writes; its name tells which of several readers it is."""
    if row.role in _OUTPUTS:
        return _OUTPUTS[row.role]
    name = row.name.removesuffix(".weight").rpartition(".")[2].lower()
    if row.role in ("attention-in", "mixer-in", "inner"):
        if _FUSED.search(name):
            return "q"  # all three: see `unsplit`
        letter = re.match(r"(?:w|c_)?([qkv])(?:uery|ey|alue|_|$)|(query|key|value)", name)
        if letter:
            return "q" if "q" in letter[0] else "k" if "k" in letter[0] else "v"
        return None
    if row.role == "FFN-in":
        if re.search(r"router", row.name.lower()) or (name == "gate" and row.shape[0] <= 16):
            return "router"
        if "gate_up" in name:
            return GATE_UP
        return "ffn_gate" if re.search(r"gate|^w1$", name) else "ffn_up"
    return None
