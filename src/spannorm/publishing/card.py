"""The model card of a published model: what it is, how to load it, how it was made, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure

from spannorm.catalog import entry
from spannorm.lab.report.figures.panels import INK, STYLE, WIDTH, numbers, plain_log, smooth
from spannorm.lab.results.runs import Series
from spannorm.models import SpanNormConfig

CURVES, RECEIPT = "curves.png", "init_receipt.txt"
_TASKS = {
    "SpanNormForCausalLM": "text-generation",
    "SpanNormForSequenceClassification": "text-classification",
    "SpanNormForTokenClassification": "token-classification",
    "SpanNormModel": "feature-extraction",
}
"""Architecture → the Hub's name of its task."""
_SMALL = 100_000_000
"""Parameters below which a card says that the model is small."""


@dataclass(frozen=True)
class Facts:
    """The facts on a card."""

    name: str
    config: SpanNormConfig
    architecture: str
    parameters: int
    tokenizer: str
    """`bytes`, `own` (its files are in the folder) or nothing."""
    receipt: str
    """Last line of the init receipt."""
    run: dict[str, Any] | None
    """A run's `run.json` and `result.json`; None for a model without a run."""
    result: dict[str, Any] | None
    curves: bool
    version: str


def model_card(facts: Facts) -> str:
    """The text of README.md, with the front matter for the Hub."""
    parts = [_front(facts), _what(facts), _load(facts), _tokens(facts), _result(facts), _training(facts), _init(facts)]
    return "\n\n".join([*parts, _limits(facts)]) + "\n"


def draw_curves(records: list[dict[str, Any]], path: Path) -> bool:
    """Loss and gradient norm by step, as a PNG. False if there is nothing to draw."""
    if not records:
        return False
    steps = np.array([r["step"] for r in records], dtype=np.float64)
    with rc_context(STYLE):
        fig = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        loss_panel, norm_panel = fig.subplots(1, 2)
        for ax, key, title in ((loss_panel, "loss", "training loss (nats per token)"),
                               (norm_panel, "grad_norm", "gradient norm before clipping")):  # fmt: skip
            values = numbers([r.get(key) for r in records])
            there = np.isfinite(values)
            series = Series(steps[there], values[there])
            ax.plot(series.steps, series.values, color="#b9c6d3", linewidth=0.7)
            ax.plot(steps, smooth(series, max(1, len(steps) // 20), steps), color=INK)
            ax.set(title=title, xlabel="step")
        if (norms := numbers([r.get("grad_norm") for r in records])).size and np.nanmin(norms) > 0:
            norm_panel.set_yscale("log")
            plain_log(norm_panel.yaxis)
        fig.savefig(path, dpi=150, metadata={"Software": None})
    return True


def _front(f: Facts) -> str:
    front = {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": _TASKS[f.architecture],
        "tags": ["spannorm", "custom_code"],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _what(f: Facts) -> str:
    c, about = f.config, entry(f.config.placement)
    experts = ""
    if c.num_experts:
        experts = f", {c.num_experts} experts in sparse layers of which a token goes to {c.num_experts_per_tok}"
    equation, source = (f" {key}: {about.fields[key]}" if key in about.fields else "" for key in ("Equation", "Source"))
    lines = [
        f"# {f.name}",
        f"A decoder for {_TASKS[f.architecture]} with {f.parameters:,} parameters: {c.num_hidden_layers} blocks of "
        f"width {c.hidden_size}, {c.num_attention_heads} heads, {c.vocab_size} tokens, context "
        f"{c.max_position_embeddings}{experts}.",
        f"Its norms go where `{c.placement}` puts them, with depth rule `{c.depth_rule}`, base init `{c.base_init}` "
        f"and {c.norm}. {about.summary}{equation}{source}",
    ]
    return "\n\n".join(lines)


def _load(f: Facts) -> str:
    auto = "AutoModel" + f.architecture.removeprefix("SpanNorm").removeprefix("Model")
    code = f"""from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("FOLDER_OR_NAME", trust_remote_code=True)"""
    if f.tokenizer:
        code += '\ntokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_NAME", trust_remote_code=True)'
        if auto == "AutoModelForCausalLM":
            code += '\nids = tokenizer("def ", return_tensors="pt").input_ids\n'
            code += "print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))"
    return (
        f"## Load it\n\n```python\n{code}\n```\n\n`modeling_spannorm.py` in this folder is the whole model and what "
        "`trust_remote_code=True` runs: read it first. It needs PyTorch and Transformers alone, and was generated from "
        f"spannorm {f.version}. With `import spannorm.models` before, spannorm's own classes open the same folder."
    )


def _tokens(f: Facts) -> str:
    words = {
        "bytes": "Text becomes ids byte by byte: the id of a token is the value of its UTF-8 byte, and 256 ends a "
        "document. `AutoTokenizer` does so too; its files are in this folder.",
        "own": "The tokenizer's files are in this folder; `AutoTokenizer` loads them.",
        "": "No tokenizer was saved beside the model: this folder takes token ids.",
    }
    return f"## Tokens\n\n{words[f.tokenizer]}"


def _result(f: Facts) -> str:
    if f.result is None:
        return "## Result\n\nNot known: the model was saved without a run."
    r = f.result
    rows = {
        "validation loss (nats per token)": r.get("val_loss"),
        "test loss (nats per token)": r.get("test_loss"),
        "bits per byte, validation": r.get("bits_per_byte"),
        "a unigram model's validation loss": r.get("unigram_loss"),
        "largest gradient norm after warmup": r.get("max_grad_norm"),
        "tokens seen": r.get("tokens"),
    }
    table = [f"| {name} | {value:,.4f} |" if isinstance(value, float) else f"| {name} | {value:,} |"
             for name, value in rows.items() if value is not None]  # fmt: skip
    scores = [
        f"| {task}: {metric} | {v['value']:.4f} ± {1.96 * v['stderr']:.4f} (chance {score['chance']:.4f}) |"
        for task, score in (r.get("evaluation") or {}).items()
        for metric, v in score["metrics"].items()
        if score.get("chance") is not None and v.get("stderr") is not None
    ]
    text = "\n".join(["## Result", "", "| | |", "|---|---|", *table, *scores])
    if r.get("status") == "failed":
        text += f"\n\n**This run failed by its own criteria: {r.get('reason')}.**"
    return text + f"\n\n![Loss and gradient norm by step]({CURVES})" * f.curves


def _training(f: Facts) -> str:
    if f.run is None:
        return "## How it was trained\n\nNot known: the model was saved without a run."
    data, versions, machine = f.run["data"], f.run["versions"], f.run["machine"]
    recipe = yaml.safe_dump(without_paths(f.run["recipe"]), sort_keys=False, allow_unicode=True)
    return "\n\n".join([
        "## How it was trained",
        f"On {data['training_tokens']:,} tokens of {data['documents']:,} documents, sha256 `{data['sha256']}`. "
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}. "
        f"Machine: {machine['processor']}, threads: {machine['threads']}, device {machine['device']}.",
        f"The recipe, for `spannorm train` (of a path on the author's machine the last part):\n\n```yaml\n{recipe}```",
    ])  # fmt: skip


def _init(f: Facts) -> str:
    began = "These weights began there." if f.run else "Whether these weights began there is not recorded."
    return (
        f"## Init\n\nA model of this configuration, drawn anew from seed {f.config.init_seed}: {f.receipt}. Expected "
        f"and actual std of every tensor: [{RECEIPT}]({RECEIPT}). {began}"
    )


def _limits(f: Facts) -> str:
    trained = f"Its context is {f.config.max_position_embeddings} tokens."
    if f.run is not None:
        trained = f"It was trained on sequences of {f.run['recipe']['train']['sequence_length']} tokens."
    lines = [
        f"{trained} Beyond that nothing is known.",
        "It was not tuned to follow instructions, and nothing was done about bias, private data or "
        "falsehoods in what it was trained on.",
        "What is held by tests: that `modeling_spannorm.py` computes what spannorm computes, on a CPU in fp32. "
        "Flash attention, bf16 and inference engines were not tested with this folder.",
        "The code is under Apache-2.0. Of the weights' and the text's licence the author has to judge: `license` above "
        "is a proposal.",
    ]
    if f.parameters < _SMALL:
        lines.insert(0, f"It is small ({f.parameters:,} parameters): made to study training, not to be useful.")
    if f.tokenizer == "bytes":
        lines.insert(1, "A token is a byte: a context of so many tokens is as many bytes, not words.")
    if f.run is not None:
        lines.insert(0, "One run of one seed: no interval.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def without_paths(value: Any) -> Any:
    """The value, with every absolute path in it replaced by its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
