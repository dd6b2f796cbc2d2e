"""Log lines of a real job: two ranks and the drainer, as the recipe asks."""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from sm_tiered_dcp import TieredCheckpointer
from tests.distributed.dcp_jobs import recipe, run
from tests.waiting import wait_until

LINE = re.compile(
    r"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\] \[run-1\] \[sm_tiered\] \[(?P<level>[A-Z]+)\] "
    r"\[(?P<file>\w+\.py):(?P<line>\d+)\] \[Rank (?P<rank>\d|-)\] (?P<message>.+)",
    re.ASCII,
)
ROOT = Path(__file__).parents[2]


def _train(rank: int, which: dict[str, Any], folder: str) -> list[str]:
    """Save twice with stderr in a file of the rank's; return what handlers there were, and are in the end."""
    import torch

    # A drainer that lingers would log its end after the test.
    os.environ["SM_TIERED_DRAINER_IDLE_SECS"] = "0.2"
    with open(os.path.join(folder, f"stderr-{rank}"), "w") as sys.stderr:
        with TieredCheckpointer.from_recipe(which) as checkpointer:
            during = [type(handler).__name__ for handler in logging.getLogger("sm_tiered").handlers]
            for step in (10, 20):
                state = {"w": torch.zeros(50), "per_rank": {"rank": rank}}
                checkpointer.save(step, state, tiers=["memory", "disk"]).wait("disk")
            if rank:  # which rank starts the drainer, and has that to tell, is chance
                logging.getLogger("sm_tiered").info("two saves")
        after = [type(handler).__name__ for handler in logging.getLogger("sm_tiered").handlers]
        sys.stderr = sys.__stderr__
    return [*during, "then", *after]


def _lines(path: Path) -> list[dict[str, str]]:
    found = [LINE.fullmatch(line) for line in path.read_text().splitlines()]
    assert all(found), path.read_text()
    return [match.groupdict() for match in found if match]


def _told_in(line: dict[str, str]) -> str:
    """The source line that a log line names, and those around it."""
    [path] = [*ROOT.glob(f"sm_tiered/**/{line['file']}"), *ROOT.glob(f"integrations/*/{line['file']}")]
    number = int(line["line"])
    return "\n".join(path.read_text().splitlines()[number - 1 : number + 8])


@pytest.mark.xdist_group("ranks")
def test_each_rank_and_the_drainer_write_files_of_their_own(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir) | {"log": {"console": True, "path": str(tmp_path / "logs")}}
    handlers = run(2, _train, which, str(tmp_path))
    assert handlers == [["_Console", "LogFile", "then"]] * 2
    folder = tmp_path / "logs" / "run-1"
    [drainer] = folder.glob("drainer-*.log")
    files = {str(rank): folder / f"rank-{rank:05d}.log" for rank in (0, 1)} | {"-": drainer}
    assert sorted(folder.iterdir()) == sorted(files.values())
    for rank, path in files.items():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert {line["rank"] for line in _lines(path)} == {rank}

    first = _lines(files["0"])
    messages = [line["message"] for line in first]
    for step in (10, 20):
        pattern = rf"Step {step}: (staged \d+ bytes for .*|acknowledged in memory .*|durable on disk after .*)"
        assert len([text for text in messages if re.fullmatch(pattern, text)]) == 3
    for line in first:
        assert "emit(" in _told_in(line), line
    # What all ranks know alike is loud on rank 0 alone; both have it on the console as in the file.
    assert not [line for line in _lines(files["1"]) if "staged" in line["message"]]
    for rank in ("0", "1"):
        console = (tmp_path / f"stderr-{rank}").read_text().splitlines()
        assert console == files[rank].read_text().splitlines()

    def committed() -> list[str]:
        return [line["message"] for line in _lines(drainer)]

    wait_until(lambda: len([text for text in committed() if "committed on disk" in text]) == 2, "no commits are logged")
    assert committed()[0] == "Step 10: promoting to disk"


@pytest.mark.xdist_group("ranks")
def test_a_recipe_that_asks_for_no_log_adds_nothing(tmp_path: Path, memory_dir: Path) -> None:
    assert run(0, _train, recipe(tmp_path, memory_dir), str(tmp_path)) == [["then"]]
    assert not (tmp_path / "logs").exists()
    assert "[run-1]" not in (tmp_path / "stderr-0").read_text()


@pytest.mark.xdist_group("ranks")
def test_a_log_that_can_not_be_written_stops_no_job(tmp_path: Path, memory_dir: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    which = recipe(tmp_path, memory_dir) | {"log": {"console": True, "path": str(tmp_path / "logs")}}
    assert run(2, _train, which, str(tmp_path)) == [["_Console", "then"]] * 2
    for rank in (0, 1):
        told = [line for line in _lines(tmp_path / f"stderr-{rank}") if line["level"] == "WARNING"]
        assert ["no log can be written to" in line["message"] for line in told] == [True]
