"""An audit as a short page of text."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spannorm.auditing.match import ranges
from spannorm.console import wide_console

if TYPE_CHECKING:
    from spannorm.auditing.inspection import Audit, StackAudit


def show(found: Audit, console: Console | None = None) -> None:
    """Print the page. Names in the model are printed as text and never read as markup."""
    console = console or wide_console()

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    line(f"{found.target}  {found.model}" + (f", {found.depth} blocks" if found.depth else ""), "bold")
    if found.shrunk:
        line(f"built small: {_shrunk(found)}", "dim")
    for s in found.verdict:
        line(f"{'✗' if s.off else '·'} {s.text}", "red" if s.off else "")
    line("")
    for stack in found.stacks:
        _wiring(stack, line, several=len(found.stacks) > 1)
    table = Table(box=None, padding=(0, 2, 0, 0), title="norms", title_justify="left")
    for heading in ("name", "kind", "ε", "gain", "fp32"):
        table.add_column(heading, no_wrap=heading != "name")
    for n in found.norms:
        eps = "–" if n.epsilon is None else "≤1e-12" if n.epsilon == 0 else f"{n.epsilon:.1g}"
        fp32 = {True: "yes", False: "no", None: "–"}[n.fp32]
        count = f" ×{n.count}" if n.count > 1 else ""
        table.add_row(Text(f"{n.name}{count}"), f"{n.kind} {n.size}", eps, n.gain, fp32)
    console.print(table)
    _init(found, console, line)
    if found.signal and found.signal.signal_rms:
        line("stream RMS by block  " + _series(found.signal.signal_rms))
        if found.signal.gradient_rms:
            line("gradient RMS         " + _series(found.signal.gradient_rms))
    line(f"{found.seconds:.1f} s", "dim")


def _shrunk(found: Audit) -> str:
    wanted = ("hidden_size", "d_model", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "vocab_size")
    short = [f"{k} {a} → {b}" for k, (a, b) in found.shrunk.items() if k.rpartition(".")[2] in wanted]
    rest = len(found.shrunk) - len(short)
    return ", ".join(short) + (f" and {rest} more" if rest else "")


def _wiring(stack: StackAudit, line: object, several: bool) -> None:
    say: object = line
    assert callable(say)
    m = stack.match
    name = m.placement or f"none; nearest {m.nearest}, differs in: {'; '.join(m.differs)}"
    say(f"{stack.path + ': ' if several else ''}placement {name}", "bold")
    for text, positions in stack.kinds().items():
        block = next(b for b in stack.blocks if b.text == text)
        say(f"  blocks {ranges(positions)}: {text}")
        legend = []
        for s in block.sublayers:
            inner = f", norms inside on {', '.join(s.inner_norms)}" if s.inner_norms else ""
            legend.append(f"{s.letter} = {s.module or block.path}{inner}")
        say(f"    {'; '.join(legend)}", "dim")
        for factor in block.learned:
            say(f"    {factor}", "dim")
    e = stack.ends
    start = f"embedding × {e.embedding_factor:.4g}" if e.embedding_factor != 1 else "embedding"
    start += f", normalized by {e.embedding_norm}" if e.embedding_norm else ""
    end = f"final norm {e.final_norm}" if e.final_norm else "no final norm"
    head = ", head tied" if e.tied else ", head of its own" if e.head else ""
    head += f", logits × {e.logit_factor:.4g}" if e.logit_factor != 1 else ""
    head += ", logits through tanh" if e.soft_cap else ""
    say(f"  ends: {start}; {end}{head}")


def _init(found: Audit, console: Console, line: object) -> None:
    assert callable(line)
    if isinstance(found.init, str):
        line(found.init)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), title="init", title_justify="left")
    for heading in ("role", "name", "std", "rule", "with depth"):
        table.add_column(heading, no_wrap=heading in ("std", "role"))
    for r in found.init:
        if r.role in ("norm", "bias") or len(r.shape) < 2:
            continue
        value = f"= {r.mean:.4g}" if r.constant else f"{r.std:.4g}"
        depth = "–" if r.depth_exponent is None else "no" if r.depth_exponent == 0 else f"∝ L^{r.depth_exponent:.2f}"
        depth += f", ∝ (b+1)^{r.block_exponent:.2f}" if r.block_exponent is not None else ""
        rule = "constant" if r.constant else " or ".join(r.rules) or "none of the common ones"
        table.add_row(r.role, Text(r.name), value, rule, depth)
    console.print(table)
    odd = [f"{r.name} = {r.mean:.3g}" if r.constant else f"{r.name} std {r.std:.2g}" for r in found.init
           if r.role in ("norm", "bias") and not (r.constant and r.mean in (0.0, 1.0))]  # fmt: skip
    line("norms' gains and biases: " + ("; ".join(odd[:6]) if odd else "all 0 or 1"), "dim")


def _series(values: tuple[float, ...]) -> str:
    shown = values if len(values) <= 9 else (*values[:4], *values[-4:])
    words = [f"{v:.3g}" for v in shown]
    return "  ".join(words if len(values) <= 9 else [*words[:4], "…", *words[4:]])


def as_text(found: Audit) -> str:
    """The page as plain text."""
    out = StringIO()
    show(found, Console(file=out, width=140, no_color=True))
    return out.getvalue()
