"""The benchmark: what saves, restores and drains cost here, against one copy of the same bytes and against torch's own.

``python tests/bench/run.py [--quick] [--only NAME …] [--out bench.json]``: prints one table, writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import room
from cluster_rows import cluster
from rich.console import Console
from rivals import KINDS
from rows import FEW, MANY, Scale, goal, in_memory, joined, ms, timed
from table import Row, show
from timing import MIB

_console = Console(stderr=True, highlight=False)
_LIGHTNING = {"torch": "TorchCheckpointIO on a disk", "async": "AsyncCheckpointIO on a disk", "ours": "ours"}
_ACCELERATE = {"disk": "stock on a disk", "tmpfs": "stock on tmpfs", "ours": "ours"}


# ---- sections


def save(scale: Scale) -> list[Row]:
    """What the training waits for."""
    rows: list[Row] = []
    for tensors, world, must, stretch in (
        (FEW, 1, (1.25, 0), (1.05, 0)),
        (FEW, 2, (1.4, 0), (1.15, 0)),
        (MANY, 2, (1.5, 40), (1.2, 15)),
        (MANY, 1, None, None),
    ):
        found = in_memory("save_bench.steady", world=world, tensors=tensors, size=scale.size, runs=scale.runs)
        what = f"{tensors:,} tensors, world {world}"
        rows.append(timed(f"blocked by save: {what}", found, "blocked", must, stretch))
        goals = ((2.2, 0), (1.6, 0)) if (tensors, world) == (FEW, 1) else (None, None)
        rows.append(timed(f"acknowledged in memory: {what}", found, "acknowledged", *goals))
        if world == 1:
            share = found["stored_bytes"] / found["state_bytes"]
            asked = (goal(1.02, "≤ 1.02"), goal(1.01, "≤ 1.01")) if tensors == FEW else (None, None)
            rows.append(
                Row(
                    figure=f"bytes stored / bytes in the state: {what}",
                    value=f"{share:.4f}",
                    measured=share,
                    must=asked[0],
                    stretch=asked[1],
                )
            )
    return rows


def first(scale: Scale) -> list[Row]:
    """The first save of a process."""
    runs = [in_memory("save_bench.first", tensors=FEW, size=scale.size) for _ in range(scale.runs)]
    return [timed("blocked by the first save after prefault", joined(runs), "blocked", (2, 0), (1.3, 0))]


def state_dict(scale: Scale) -> list[Row]:
    """What is the user's own, and the same on every system."""
    found = room.call("save_bench.state_dict", params=1600, runs=scale.runs)
    names = (
        ("ours", "inside TrainState.state_dict(): 1,600 parameters"),
        ("get_state_dict", "torch's get_state_dict()"),
    )
    return [
        Row(figure=figure, value=ms(statistics.median(found[name])), measured=0, samples={name: found[name]})
        for name, figure in names
    ]


def memory(scale: Scale) -> list[Row]:
    """What the trainer pays in RAM of its own."""
    rows: list[Row] = []
    for tensors, remote in ((FEW, False), (FEW, True), (MANY, False)):
        with room.sink() as address:
            s3 = address if remote else None
            found = in_memory("save_bench.memory", tensors=tensors, size=scale.size, runs=3, s3=s3)
        peak = found["peak_bytes"] / MIB
        rows.append(
            Row(
                figure=f"private memory added to the trainer, peak: {tensors:,} tensors{', with an S3 tier' * remote}",
                value=f"{peak:.0f} MiB",
                measured=peak,
                must=goal(64, "≤ 64 MiB"),
                stretch=goal(16, "≤ 16 MiB"),
                samples=found,
            )
        )
    return rows


def restore(scale: Scale) -> list[Row]:
    """How soon the training goes on."""
    rows: list[Row] = []
    default = len(os.sched_getaffinity(0))
    for tensors, threads, runs in (
        (FEW, 1, scale.runs),
        (FEW, default, scale.rival_runs),
        (MANY, 1, scale.rival_runs),
    ):
        with room.directory() as path:
            room.call("restore_bench.leave", path=path, tensors=tensors, size=scale.size)
            settings = {"path": path, "tensors": tensors, "size": scale.size, "threads": threads}
            found = joined([room.call("restore_bench.restore", **settings) for _ in range(runs)])
        goals = ((3.5, 0), (2, 0)) if (tensors, threads) == (FEW, 1) else (None, None)
        what = f"{tensors:,} tensors, intra-op threads {threads}"
        rows.append(timed(f"restore from memory, new process: {what}", found, "restored", *goals))
    return rows


def drain(scale: Scale) -> list[Row]:
    """How fast a checkpoint becomes durable."""
    with room.sink() as address:
        found = in_memory("drain_bench.drain", s3=address, tensors=FEW, size=scale.size, runs=scale.runs)
    ours, alone = statistics.median(found["drained"]), statistics.median(found["alone"])
    rate, peak = found["bytes"] / ours / 1e9, found["peak_bytes"] / MIB
    return [
        Row(
            figure=f"drain to S3, against the client alone ({found['bytes'] / alone / 1e9:.2f} GB/s)",
            value=f"{rate:.2f} GB/s: {alone / ours:.2f}",
            measured=alone / ours,
            must=goal(0.9, "≥ 0.9"),
            stretch=goal(1.0, "≥ 1.0"),
            at_least=True,
            samples=found,
        ),
        Row(
            figure="drainer's private memory, peak",
            value=f"{peak:.0f} MiB",
            measured=peak,
            must=goal(450, "≤ 450 MiB"),
            stretch=goal(300, "≤ 300 MiB"),
        ),
    ]


def verify(scale: Scale) -> list[Row]:
    """How fast what is stored can be looked at again."""
    with room.directory() as path:
        room.call("verify_bench.leave", path=path, tensors=FEW, size=scale.size)
        found = room.call("verify_bench.verify", path=path, size=scale.size, runs=scale.runs)
    hashed = found["size"] / statistics.median(found["hashed"])
    rate, whole = (found["bytes"] / statistics.median(found[name]) for name in ("verified", "command"))
    return [
        Row(
            figure=f"verify in memory, against one core that hashes ({hashed / 1e9:.2f} GB/s)",
            value=f"{rate / 1e9:.2f} GB/s: {rate / hashed:.2f}",
            measured=rate / hashed,
            must=goal(0.8, "≥ 0.8"),
            at_least=True,
            samples=found,
        ),
        Row(
            figure="the command, with its start",
            value=f"{whole / 1e9:.2f} GB/s: {whole / hashed:.2f}",
            measured=whole / hashed,
        ),
    ]


def loop(scale: Scale) -> list[Row]:
    """What the training feels of the drain."""
    with room.sink() as address:
        found = in_memory("loop_bench.loop", s3=address, tensors=FEW, size=scale.size, runs=scale.runs)
    slower = statistics.median(found["beside"]) / statistics.median(found["alone"])
    return [
        Row(
            figure="training loop while the drainer works, against alone",
            value=f"{slower:.2f}",
            measured=slower,
            must=goal(1.15, "≤ 1.15"),
            stretch=goal(1.03, "≤ 1.03"),
            samples=found,
        )
    ]


def lightning(scale: Scale) -> list[Row]:
    """What a Lightning training waits for, with its own plugins on a disk and with ours."""
    rows: list[Row] = []
    for world in (1, 2):
        what = f"Lightning, {'DDP 2' if world > 1 else 'single device'}"
        blocked: dict[str, float] = {}
        for kind, name in _LIGHTNING.items():
            runs = scale.runs if kind == "ours" else scale.rival_runs
            settings = {"kind": kind, "tensors": FEW, "size": scale.size, "runs": runs}
            found = in_memory("lightning_bench.saves", world=world, **settings)
            rows += _lightning_rows(f"{what}, {name}", kind, found)
            blocked[kind] = statistics.median(found["blocked"])
        for kind, times in (("torch", 5), ("async", 3)):
            less, must = blocked[kind] / blocked["ours"], goal(times, f"≥ {times}")
            figure = f"{what}: blocked by {_LIGHTNING[kind]}, against ours"
            rows.append(Row(figure=figure, value=f"{less:.1f}", measured=less, must=must, at_least=True))
    return rows


def _lightning_rows(figure: str, kind: str, found: dict[str, Any]) -> list[Row]:
    copied, dump, alone, beside = (statistics.median(found[name]) for name in ("copy", "dump", "alone", "beside"))
    slower, peak = beside / alone, found["peak_bytes"] / MIB
    blocked = timed(f"{figure}: blocked", found, "blocked")
    steps = Row(figure=f"{figure}: steps after a save, against before", value=f"{slower:.2f}", measured=slower)
    memory = Row(figure=f"{figure}: private memory, peak", value=f"{peak:.0f} MiB", measured=peak)
    if kind != "ours":
        return [blocked, steps, memory]
    # Lightning's own dump is part of what blocks, and not the plugin's.
    bound = 1000 * (1.3 * copied + 30e-6 * FEW + dump)
    return [
        replace(blocked, must=goal(bound, "≤ 1.3× + 30 µs a tensor + dump")),
        Row(figure=f"{figure}: of that, Lightning's dump_checkpoint", value=ms(dump), measured=dump),
        steps,
        replace(memory, must=goal(64, "≤ 64 MiB")),
    ]


def accelerate(scale: Scale) -> list[Row]:
    """What `Accelerator.save_state` costs, its own and through the tiers."""
    rows: list[Row] = []
    blocked: dict[str, float] = {}
    for kind, name in _ACCELERATE.items():
        runs = scale.runs if kind == "ours" else scale.rival_runs
        found = in_memory("accelerate_bench.saves", kind=kind, tensors=FEW, size=scale.size, runs=runs)
        copied, stock, waited = (statistics.median(found[part]) for part in ("copy", "stock", "blocked"))
        blocked[kind] = waited / copied  # each against a copy beside it: the machine is not the same an hour later
        row = timed(f"save_state, {name}: blocked", found, "blocked")
        if kind != "ours":
            rows.append(row)
            continue
        rows.append(replace(row, must=goal(1000 * (1.5 * copied + stock), "≤ 1.5× + Accelerate's own")))
        rows.append(Row(figure="save_state, ours: of that, Accelerate's own code", value=ms(stock), measured=stock))
    for kind, must in (("disk", goal(4, "≥ 4")), ("tmpfs", None)):
        less = blocked[kind] / blocked["ours"]
        figure = f"save_state, {_ACCELERATE[kind]}: blocked, against ours"
        rows.append(Row(figure=figure, value=f"{less:.1f}", measured=less, must=must, at_least=True))
    return rows


def rivals(scale: Scale) -> list[Row]:
    """Torch's own ways with the same state."""
    rows: list[Row] = []
    for kind, name in KINDS.items():
        found = in_memory("rivals.rival", kind=kind, tensors=FEW, size=scale.size, runs=scale.rival_runs)
        rows.append(timed(f"{name}: blocked", found, "blocked"))
        if kind in ("thread", "process"):
            rows.append(timed(f"{name}: until its files are there", found, "complete"))
    return rows


_SECTIONS: dict[str, Callable[[Scale], list[Row]]] = {
    function.__name__: function
    for function in (
        *(save, first, state_dict, memory, restore, verify, drain, loop),
        *(cluster, rivals, lightning, accelerate),
    )
}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="What saves, restores and drains cost here.")
    parser.add_argument("--quick", action="store_true", help="a quarter of the bytes and medians of 3")
    parser.add_argument("--only", nargs="+", choices=sorted(_SECTIONS), help="only these sections")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="where the JSON goes")
    arguments = parser.parse_args()
    quick = arguments.quick
    scale = Scale(size=(256 if quick else 1024) * MIB, runs=3 if quick else 7, rival_runs=1 if quick else 3)
    # The sink takes any credentials; where a person's own are, they stay.
    os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}
    facts, rows, begun = machine.facts(), list[Row](), time.monotonic()
    for name in arguments.only or _SECTIONS:
        _console.print(f"[dim]{time.monotonic() - begun:4.0f} s  {name}")
        rows += _SECTIONS[name](scale)
    show(rows, f"{scale.state} of fp32 model and Adam; medians of {scale.runs}")
    sys.stdout.write("  ".join(f"{name}: {value}" for name, value in facts.items()) + "\n")
    arguments.out.write_text(
        json.dumps(
            {
                "machine": facts,
                "state_bytes": scale.size,
                "runs": scale.runs,
                "secs": time.monotonic() - begun,
                "rows": [row.to_json() for row in rows],
            },
            indent=1,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
