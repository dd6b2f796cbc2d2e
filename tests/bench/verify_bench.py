"""How fast ``sm-tiered verify`` reads a checkpoint in memory, against hashing the same bytes where they lie."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from restore_bench import leave
from save_bench import recipe
from timing import secs_of

from sm_tiered import checksum
from sm_tiered.cli.common import open_for_looking
from sm_tiered.cli.verify import threads_for_reading
from sm_tiered.inventory import list_checkpoints
from sm_tiered.recipe import Recipe
from sm_tiered.verify import Report, State, verify_checkpoint

__all__ = ["leave", "verify"]


def verify(path: str, size: int, runs: int) -> dict[str, Any]:
    """Verify what stands in memory, hash as many bytes on one core, and run the command, in turn."""
    written = Path(path) / "recipe.yaml"
    written.write_text(json.dumps(recipe(path)))
    settings = Recipe.load(written).settings()
    tier = open_for_looking(settings.tiers[0], settings.namespace)
    (checkpoint,) = list_checkpoints(tier)
    reports: list[Report] = []

    def look() -> None:
        reports.append(
            verify_checkpoint(tier, checkpoint, durable=False, threads=threads_for_reading(settings.tiers[0]))
        )

    data = memoryview(bytearray(size))
    hashed, verified = list[float](), list[float]()
    for _ in range(runs):
        hashed.append(secs_of(lambda: [checksum.digest(chunk) for chunk in checksum.chunks_of(data)]))
        verified.append(secs_of(look))
    command = [sys.executable, "-m", "sm_tiered.cli.app", "verify", str(written), "--json"]
    whole = [secs_of(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(runs)]
    if {report.state for report in reports} != {State.WHOLE}:
        raise RuntimeError(f"what was saved is not whole: {reports[0]}")
    return {"bytes": reports[0].bytes_read, "size": size, "hashed": hashed, "verified": verified, "command": whole}
