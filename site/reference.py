"""What the reference has: the public names by page, and the command line as its own parser describes it."""

from __future__ import annotations

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
    root = typer.main.get_command(app)
    lines = ["# Command line", "", "Each verb of `spannorm`, with its arguments and options. `spannorm VERB --help`",
             "prints the same."]  # fmt: skip
    for name, verb in root.commands.items():
        if verb.hidden:
            continue
        context = typer.Context(verb, info_name=f"spannorm {name}")
        usage = " ".join(verb.collect_usage_pieces(context))
        lines += ["", f"## spannorm {name}", "", verb.help or "", "", f"    spannorm {name} {usage}", ""]
        lines += ["| | |", "|---|---|"]
        for parameter in verb.params:
            record = parameter.get_help_record(context)
            if record:
                left, right = (text.replace("|", "\\|").replace("\n", " ") for text in record)
                lines.append(f"| `{left}` | {right} |")
    return "\n".join(lines) + "\n"
