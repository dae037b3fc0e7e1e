"""The live table: one row per run, from its records."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from spannorm.console import Grid, say, wide_console
from spannorm.models import SpanNormConfig
from spannorm.text import line
from spannorm.train.health import WINDOW, spike_steps
from spannorm.train.recipe import Recipe

_MOST_ROWS = 36
_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {"waiting": "dim", "running": "cyan", "ok": "green", "failed": "bold red", "crashed": "bold red",
           "stopped": "yellow"}  # fmt: skip


@dataclass
class Row:
    """One run in the table."""

    placement: str
    depth_rule: str
    learning_rate: float
    seed: int
    steps: int
    tokens_per_step: int
    status: str = "waiting"
    note: str = ""
    losses: list[float | None] = field(default_factory=list)
    grad_norms: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    spikes: int = 0
    violation: float | None = None
    dead: int | None = None
    """For a mixture of experts: the last step's largest violation of an even load, and experts without a token."""

    @classmethod
    def of(cls, recipe: Recipe, config: SpanNormConfig) -> Row:
        """The row of a run that has not begun."""
        t = recipe.train
        return cls(
            placement=config.placement,
            depth_rule=str(config.depth_rule),
            learning_rate=t.learning_rate,
            seed=t.seed,
            steps=t.steps,
            tokens_per_step=t.sequence_length * t.batch_size * t.accumulation,
        )

    @property
    def name(self) -> str:
        return f"{self.placement} {self.depth_rule} lr {self.learning_rate:g} seed {self.seed}"

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take in new records."""
        for record in records:
            loss, norm = record["loss"], record["grad_norm"]
            self.losses.append(loss if loss is not None and math.isfinite(loss) else None)
            self.grad_norms.append(norm if norm is not None and math.isfinite(norm) else None)
            self.seconds.append(record["seconds"])
            self.violation, self.dead = record.get("max_violation"), record.get("dead_experts")
        # A value is judged by the 128 before it, so the tail that holds the new ones and their window is enough.
        tail = WINDOW + len(records)
        self.spikes += len(spike_steps(self.losses[-tail:], self.grad_norms[-tail:])) if records else 0

    def restart(self) -> None:
        """Forget the records: the run went back to a checkpoint and writes them again."""
        self.losses, self.grad_norms, self.seconds, self.spikes = [], [], [], 0

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last 20 steps."""
        mean = _mean(self.seconds[-20:])
        return self.tokens_per_step / mean if mean else None

    def line(self) -> str:
        """The row in one plain line, for output that is not a terminal."""
        state = self.note or self.status
        return f"{self.name}: step {self.step}/{self.steps}, loss {_number(_last(self.losses))}, {state}"


class Board:
    """Shows rows live in a terminal. Elsewhere it prints a line when a run's status changes, and one per minute.

    Use as a context manager and call `refresh` after changing rows.
    """

    def __init__(self, title: str, rows: Sequence[Row], console: Console | None = None) -> None:
        self.title, self.rows = title, rows
        self.console = console or wide_console()
        self._live = Live(console=self.console, auto_refresh=False, transient=False)
        self._began = time.monotonic()
        self._told: dict[int, tuple[str, float]] = {}

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.refresh()
        self._live.stop()

    def refresh(self) -> None:
        if self.console.is_terminal:
            self._live.update(self.render(), refresh=True)
            return
        for row in self.rows:
            status, at = self._told.get(id(row), ("waiting", self._began))
            due = row.status == "running" and time.monotonic() - at > 60
            if row.status != status or due:
                say(self.console, row.line())
                self._told[id(row)] = (row.status, time.monotonic())

    def render(self) -> Group:
        """The current table."""
        grid = Grid(self.title)
        for heading in ("placement", "depth rule"):
            grid.column(heading)
        for heading in ("lr", "seed", "step"):
            grid.column(heading, "number")
        grid.column("", "spare", width=12)
        grid.column("loss", "number")
        grid.column("", "spare", width=16)
        for heading in ("grad norm", "spikes", "tokens/s"):
            grid.column(heading, "spare")
        sparse = any(row.violation is not None for row in self.rows)
        for heading in ("max violation", "dead experts") if sparse else ():
            grid.column(heading, "spare")
        grid.column("", "note")
        # A terminal holds some forty lines: of hundreds of runs, those begun last.
        begun = [row for row in self.rows if row.status != "waiting"]
        for row in self.rows if len(self.rows) <= _MOST_ROWS else begun[-_MOST_ROWS:]:
            speed = row.tokens_per_second
            grid.row(
                row.placement,
                row.depth_rule,
                f"{row.learning_rate:g}",
                str(row.seed),
                f"{row.step}/{row.steps}",
                ProgressBar(total=row.steps, completed=row.step, width=12),
                _number(_last(row.losses)),
                Text(sparkline(row.losses, 16), style="cyan"),
                _number(_last(row.grad_norms)),
                str(row.spikes) if row.spikes else "·",
                f"{speed:,.0f}" if speed else "",
                *((_number(row.violation), "–" if row.dead is None else str(row.dead)) if sparse else ()),
                Text(line(row.note or row.status), style=_STYLES.get(row.status, "")),
                style="dim" if row.status == "waiting" else "",
            )
        elapsed = time.monotonic() - self._began
        ended = sum(row.status in ("ok", "failed", "crashed") for row in self.rows)
        return Group(
            grid.fitted(self.console),
            Text(f"{ended} of {len(self.rows)} ended, {_clock(elapsed)} elapsed", style="dim"),
        )


def sparkline(values: Sequence[float | None], width: int) -> str:
    """A series in `width` block characters, each the mean of its share; a gap where nothing was finite."""
    if not values:
        return ""
    width = min(width, len(values))
    shares = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [_mean([v for v in share if v is not None]) for share in shares]
    known = [m for m in means if m is not None]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    return "".join(" " if m is None else _BARS[round((m - low) / span * (len(_BARS) - 1))] for m in means)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _last(values: Sequence[float | None]) -> float | None:
    return values[-1] if values else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.1e}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02d}"
