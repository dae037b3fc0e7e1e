"""What a laptop's cores give, and which defaults follow: threads, arms at once, compile, optimizer, batch shape.

    python benchmarks/cpu.py [--rows threads,arms,compile,optimizer,shape] [--pairs 20] [--json FILE]

Every row's first line is what the defaults do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from step import step_of
from turns import Result, as_dicts, in_turns, table, timed

from spannorm.files import write_json
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.train.environment import cores, machine, versions

Step = Callable[[], None]
BODIES = {"16 × 64": (16, 64), "8 × 256": (8, 256)}
"""Blocks × width."""


def stepper(body: str, batch: int = 4, length: int = 128, compiled: bool = False, **adamw: bool) -> Step:
    """One optimizer step of a SpanNorm model."""
    depth, width = BODIES[body]
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_attention_heads": width // 16}
    model = SpanNormForCausalLM(SpanNormConfig(vocab_size=257, num_hidden_layers=depth, placement="span", **sizes))
    ids = torch.randint(0, 257, (batch, length))
    return step_of(model, ids, compiled=compiled, adamw=adamw, use_cache=False)


def with_threads(threads: int, turn: Callable[[], float]) -> Callable[[], float]:
    def within() -> float:
        torch.set_num_threads(threads)
        seconds = turn()
        torch.set_num_threads(1)
        return seconds

    return within


def threads(pairs: int) -> Iterator[Result]:
    """One arm alone: all cores, or one."""
    for body in BODIES:
        step = timed(stepper(body), 3)
        turns = {f"{n} threads": with_threads(n, step) for n in (cores(), 1)}
        yield from in_turns(f"one arm, {body}: a step", turns, pairs)


def worker(body: str, wire: Connection) -> None:
    """An arm in a process of its own: takes as many steps as it is told."""
    torch.set_num_threads(1)
    step = stepper(body)
    while (steps := wire.recv()) > 0:
        for _ in range(steps):
            step()
        wire.send(None)


def arms(pairs: int, steps: int = 3) -> Iterator[Result]:
    """As many arms as cores: at once with a thread each, or one after the other with all threads."""
    for body in BODIES:
        with ExitStack() as stack:
            wires = []
            for _ in range(cores()):
                wire, far = multiprocessing.get_context("spawn").Pipe()
                process = multiprocessing.get_context("spawn").Process(target=worker, args=(body, far))
                process.start()
                stack.callback(process.join)
                stack.callback(wire.send, 0)
                wires.append(wire)

            def at_once(wires: list[Connection] = wires) -> float:
                began = time.perf_counter()
                for wire in wires:
                    wire.send(steps)
                for wire in wires:
                    wire.recv()
                return (time.perf_counter() - began) / (steps * len(wires))

            alone = with_threads(cores(), timed(stepper(body), steps))
            turns = {"at once, a thread each": at_once, f"in turn, {cores()} threads": alone}
            yield from in_turns(f"{cores()} arms, {body}: seconds per step of any arm", turns, pairs)


def compile(pairs: int) -> Iterator[Result]:
    """`train.compile`; its first steps are not in the times."""
    for body in BODIES:
        turns = {"eager": timed(stepper(body), 3), "compiled": timed(stepper(body, compiled=True), 3)}
        yield from in_turns(f"train.compile, {body}: a step", turns, pairs)


def optimizer(pairs: int) -> Iterator[Result]:
    """AdamW fused, for each tensor, in a loop: with clipping, as part of a step."""
    kinds: dict[str, dict[str, bool]] = {
        "fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False},
    }  # fmt: skip
    for body in BODIES:
        turns = {name: timed(stepper(body, **kind), 3) for name, kind in kinds.items()}
        yield from in_turns(f"AdamW, {body}: a step", turns, pairs)


def shape(pairs: int) -> Iterator[Result]:
    """The same number of tokens a step in other shapes, and twice as many (time per 512 tokens)."""
    for body in BODIES:
        turns = {
            f"{b} × {n} tokens": per(b * n // 512, timed(stepper(body, b, n), 3))
            for b, n in ((4, 128), (8, 64), (2, 256), (1, 512), (8, 128), (32, 128))
        }
        yield from in_turns(f"batch shape, {body}: per 512 tokens", turns, pairs)


def per(times: int, turn: Callable[[], float]) -> Callable[[], float]:
    return lambda: turn() / times


ROWS = {f.__name__: f for f in (threads, arms, compile, optimizer, shape)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Result] = []
    for name in options.rows.split(","):
        new = list(ROWS[name](options.pairs))
        print(table(new), flush=True)
        results += new
    print(json.dumps(machine()))
    if options.json:
        about = {"pairs": options.pairs, "machine": machine(), "versions": versions()}
        write_json(options.json, {"results": as_dicts(results), **about})


if __name__ == "__main__":
    main()
