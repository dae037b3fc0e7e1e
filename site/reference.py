"""What the reference has: the public names by page, and the command line as its own parser describes it."""

from __future__ import annotations

from html import escape
from typing import Any

import typer

from spannorm.cli import app

PAGES: list[tuple[str, str, str, tuple[str, ...]]] = [
    (
        "Placements and blocks",
        "For a model in plain PyTorch. A placement says where the norms of a block stand.",
        "spannorm",
        (
            *("Placement", "SpanNorm", "PreNorm", "PostNorm", "Stack", "Block", "build_placement"),
            *("register_placement", "Projection", "PLACEMENTS", "RMSNorm", "LayerNorm", "InputError"),
        ),
    ),
    (
        "Depth rules and init",
        "How the weights are drawn, and what learning rate and weight decay each of them gets.",
        "spannorm",
        ("depth_rule", "depth_rule_names", "init_plan", "init_weights_", "init_receipt", "parameter_groups", "Fused"),
    ),
    (
        "Models of Transformers",
        "Our own models, and any placement in a model that you already have.",
        "spannorm",
        ("SpanNormConfig", "SpanNormModel", "SpanNormForCausalLM", "rewire", "load"),
    ),
    ("Rewiring", "What `spannorm.rewire` returns, and rows for families of your own.", "spannorm.rewiring",
     ("Rewiring", "Family", "redraw_")),
    ("Audit", "What is wired and drawn in a model.", "spannorm", ("audit",)),
    ("Audit results", "What `spannorm.audit` returns.", "spannorm.auditing", ("Audit", "StackAudit")),
    ("Theory", "Signal and gradient at initialization, computed from the equations.", "spannorm.theory", ()),
    ("Probes", "Signal, gradient and collapse by layer, measured in a model.", "spannorm.probes", ()),
]  # fmt: skip
"""Title, what the page is for, module, names; no names: all of the module's `__all__`."""


def command_line() -> str:
    """The page of the command line: each verb with its arguments and options, from the parser itself."""
    lines = ["# Command line", "", "Each verb of `spannorm`, with its arguments and options. `spannorm VERB --help` "
             "prints the same."]  # fmt: skip
    for name, verb in typer.main.get_command(app).commands.items():
        lines += verb_lines(f"spannorm {name}", verb)
    return "\n".join(lines) + "\n"


def verb_lines(name: str, verb: Any) -> list[str]:
    """A heading, the help text, the usage and a table of one verb; of a group, those of its verbs."""
    if hasattr(verb, "commands"):
        return [line for sub, inner in verb.commands.items() for line in verb_lines(f"{name} {sub}", inner)]
    context = typer.Context(verb, info_name=name)
    usage = f"{name} {' '.join(verb.collect_usage_pieces(context))}"
    rows = [record for parameter in verb.params if (record := parameter.get_help_record(context))]
    return [
        *("", f"## {name}", "", shown(verb.help or ""), "", f"    {usage}"),
        *("", "| | |", "|---|---|"),
        *(f"| <code>{shown(left)}</code> | {shown(right)} |" for left, right in rows),
    ]


def shown(text: str) -> str:
    """Plain text within a table of a page."""
    return escape(text).replace("|", "&#124;").replace("*", "&#42;").replace("\n", " ")
