"""Trains a small language model twice, once in peace and once while it is killed, and compares the two to the last bit.

The second run loses all its processes, later also everything that was in the node's memory. The training script is
`quickstart_train.py`: that one is the example to follow. This one only starts it, kills it and counts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from launch import RANKS, Job, Launch, QuickstartError, end_drainer, launched, lose_node

STEPS = 60
FIRST_KILL, SECOND_KILL = 13, 33
MEMORY_EVERY, DISK_EVERY = 5, 20
"""As in quickstart.yaml."""

console = Console(highlight=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """What one launch has to show."""

    event: str
    """What came before it."""
    restored: int | None
    tier: str
    lost: int | None
    """Steps that have to be done again."""
    restore_secs: float | None
    blocked_secs: list[float]
    """How long each save held up the training."""


# ---- the story


def demonstrate(steps: int, small: bool, root: Path, memory: Path) -> None:
    """Train, train again with two disasters, compare.

    Raises:
        QuickstartError: something is not as promised.
    """
    reference, crashed = (
        Job(name=name, steps=steps, small=small, root=root / name, memory=memory / name)
        for name in ("reference", "crashed")
    )
    try:
        console.print(f"[bold]1. A run of {steps} steps that nothing disturbs")
        undisturbed = train_to_end(reference)
        console.print("[bold]2. The same again: all ranks killed, then the node lost")
        legs, resumed = train_through_disasters(crashed)
    finally:
        for job in (reference, crashed):
            end_drainer(job)
    console.print(table(legs))
    check(legs)
    if differences := compare(undisturbed, resumed):
        raise QuickstartError(f"the two runs differ in {', '.join(differences)}")
    console.print(
        f"[bold green]bit-identical[/]: weights, optimizer, random state and all {steps} losses, on {RANKS} ranks"
    )


def train_through_disasters(job: Job) -> tuple[list[Leg], Launch]:
    """Run *job*, kill it, resume it, take its node away, resume it, let it finish; return the last launch too."""
    with launched(job) as launch:
        train_to_step(launch, FIRST_KILL)
        reached = launch.kill()
        legs = [leg(launch, "start", None)]
        say_disaster(job, f"all ranks killed at step {reached}")

    with launched(job) as launch:
        train_to_step(launch, SECOND_KILL, durable_step=DISK_EVERY)
        legs.append(leg(launch, f"killed at {reached}", reached))
        reached = lose_node(launch)
        say_disaster(job, f"node lost at step {reached}: no ranks, no drainer, no memory tier")

    launch = train_to_end(job)
    legs.append(leg(launch, f"node lost at {reached}", reached))
    return legs, launch


def train_to_step(launch: Launch, step: int, *, durable_step: int = 0) -> None:
    """Return in mid-run: *step* is done, *durable_step* is on disk, and nothing is just being saved."""
    for told in launch.follow():
        show(launch.job, told)
        between_saves = told.get("step", 0) % MEMORY_EVERY in (1, 2, 3)
        if between_saves and told["step"] >= step and max([0, *launch.job.steps_on_disk()]) >= durable_step:
            return
    raise QuickstartError(f"{launch.job.name} finished before step {durable_step} was on disk")


def train_to_end(job: Job) -> Launch:
    """Launch *job* and let it finish."""
    with launched(job) as launch:
        for told in launch.follow():
            show(job, told)
    return launch


# ---- what is shown


def show(job: Job, told: dict[str, Any]) -> None:
    """Print the little of what rank 0 tells that a person wants to see."""
    if "restored" in told:
        console.print(f"   {job.name}: restored step {told['restored']} from [bold]{told['tier']}[/]")
    elif "saved_to" in told:
        tiers, blocked = " + ".join(told["saved_to"]), told["blocked_secs"]
        step = f"step {told['step']:2d} of {job.steps}, loss {told['loss']:.3f}"
        console.print(f"   {job.name}: {step}; saved to {tiers}, blocked {blocked:.3f} s")


def say_disaster(job: Job, what: str) -> None:
    """Print what was done to *job*."""
    console.print(f"   {job.name}: [bold red]{what}[/]")


def leg(launch: Launch, event: str, reached: int | None) -> Leg:
    """Sum up what rank 0 told of *launch*, which came after *event* at step *reached*."""
    restored = next((told for told in launch.told if "restored" in told), None)
    return Leg(
        event=event,
        restored=restored["restored"] if restored else None,
        tier=restored["tier"] if restored else "",
        lost=reached - restored["restored"] if restored and reached is not None else None,
        restore_secs=restored["secs"] if restored else None,
        blocked_secs=[told["blocked_secs"] for told in launch.told if "saved_to" in told],
    )


def table(legs: list[Leg]) -> Table:
    """Draw what happened; no wider than a plain terminal."""
    drawn = Table(title="What happened")
    drawn.add_column("event", no_wrap=True)
    columns = ("restored\nstep", "tier", "steps\nlost", "restore\n(s)", "blocked\nmedian", "(s)\nlongest")
    for name in columns:
        drawn.add_column(name, justify="right", no_wrap=True)
    for row in legs:
        blocked = row.blocked_secs
        drawn.add_row(
            row.event,
            "-" if row.restored is None else str(row.restored),
            row.tier or "-",
            "-" if row.lost is None else str(row.lost),
            "-" if row.restore_secs is None else f"{row.restore_secs:.2f}",
            f"{median(blocked):.3f}" if blocked else "-",
            f"{max(blocked):.3f}" if blocked else "-",
        )
    return drawn


# ---- the verdict


def check(legs: list[Leg]) -> None:
    """Raise unless each launch resumed from the tier that it should, losing no more than that tier's interval."""
    _, after_kill, after_loss = legs
    for row, tier, every in ((after_kill, "memory", MEMORY_EVERY), (after_loss, "disk", DISK_EVERY)):
        whole = (
            row.restored is not None and row.restored % every == 0 and row.lost is not None and 0 <= row.lost <= every
        )
        if row.tier != tier or not whole:
            raise QuickstartError(f"{row.event}: restored step {row.restored} from {row.tier or 'nowhere'}")


def compare(reference: Launch, resumed: Launch) -> list[str]:
    """Return what differs at the ends of two launches; each rank has told its fingerprint last."""
    differences: list[str] = []
    for rank in range(RANKS):
        wanted, found = (launch.ranks[rank].lines[-1]["fingerprint"] for launch in (reference, resumed))
        differences += [f"{what} of rank {rank}" for what in wanted if wanted[what] != found[what]]
    return differences


def main() -> int:
    """Find the places, run, tidy up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    parser.add_argument("--small", action="store_true", help="a tiny model: quick, but its times mean nothing")
    parser.add_argument("--keep", action="store_true", help="leave everything where it is, and say where")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is below tidies up then, too
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="sm_tiered-quickstart-"))
    memory = Path(tempfile.mkdtemp(prefix=f"sm_tiered-quickstart-{os.getpid()}-", dir="/dev/shm"))
    try:
        demonstrate(options.steps, options.small, root, memory)
    except QuickstartError as error:
        console.print(f"[bold red]failed[/]: {error}")
        return 1
    else:
        console.print(f"{time.monotonic() - began:.0f} s in all")
        return 0
    finally:
        if options.keep:
            console.print(f"kept: {root} and {memory}")
        else:
            shutil.rmtree(root, ignore_errors=True)
            shutil.rmtree(memory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
