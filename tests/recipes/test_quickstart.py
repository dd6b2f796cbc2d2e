"""The quickstart as a user runs it, with a small model: real ranks, real kills."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
MODULES = ("quickstart", "launch", "journal", "byte_lm", "fingerprint")


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts' folder first on the path, as when Python runs one of them."""
    monkeypatch.syspath_prepend(str(RECIPES))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def quickstart(recipes: None) -> ModuleType:
    """The supervisor."""
    return importlib.import_module("quickstart")


def rows(output: str) -> dict[str, list[str]]:
    """Return the cells of the printed table by event."""
    found = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in output.splitlines() if "│" in line]
    return {cells[0]: cells[1:] for cells in found}


@pytest.mark.timeout(240)
@pytest.mark.xdist_group("ranks")
def test_the_quickstart_survives_a_kill_and_a_lost_node_bit_for_bit(tmp_path: Path) -> None:
    path = os.pathsep.join(str(part) for part in (ROOT, ROOT / "integrations"))
    with subprocess.Popen(
        [sys.executable, str(RECIPES / "quickstart.py"), "--small"],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path), "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as supervisor:
        output = supervisor.communicate(timeout=200)[0]
    assert supervisor.returncode == 0, output
    assert "bit-identical: weights, optimizer, random state and all 60 losses, on 2 ranks" in output

    table = rows(output)
    (killed,) = (cells for event, cells in table.items() if event.startswith("killed at"))
    (lost,) = (cells for event, cells in table.items() if event.startswith("node lost at"))
    assert killed[1] == "memory"
    assert int(killed[0]) % 5 == 0
    assert 0 <= int(killed[2]) <= 5
    assert lost[1] == "disk"
    assert int(lost[0]) % 20 == 0
    assert int(lost[2]) > 0
    for cells in (killed, lost):
        assert float(cells[3]) < 30.0
        assert float(cells[4]) <= float(cells[5])
    assert not list(tmp_path.iterdir()), "something was left behind"
    assert not list(Path("/dev/shm").glob(f"sm_tiered-quickstart-{supervisor.pid}-*"))


def launch(*fingerprints: dict[str, Any]) -> SimpleNamespace:
    """A launch whose ranks have told these fingerprints at their end."""
    return SimpleNamespace(ranks=[SimpleNamespace(lines=[{"pid": 1}, {"fingerprint": f}]) for f in fingerprints])


def test_a_single_loss_that_differs_in_its_last_bit_is_found(quickstart: ModuleType) -> None:
    same = {"weights": "a", "optimizer": "b", "random state": "c", "losses": [(1.5).hex(), (0.1).hex()]}
    other = {**same, "losses": [(1.5).hex(), (0.1 + 2**-56).hex()]}
    assert quickstart.compare(launch(same, same), launch(same, same)) == []
    assert quickstart.compare(launch(same, same), launch(same, other)) == ["losses of rank 1"]


@pytest.mark.parametrize(
    ("after_kill", "after_loss"),
    [(("disk", 10), ("disk", 20)), (("memory", 10), ("memory", 20)), (("", None), ("disk", 20))],
)
def test_a_resume_from_the_wrong_tier_fails_the_quickstart(
    quickstart: ModuleType, after_kill: tuple[str, int | None], after_loss: tuple[str, int | None]
) -> None:
    def leg(tier: str, restored: int | None) -> Any:
        return quickstart.Leg(event="x", restored=restored, tier=tier, lost=3, restore_secs=0.1, blocked_secs=[])

    quickstart.check([leg("", None), leg("memory", 10), leg("disk", 20)])
    with pytest.raises(quickstart.QuickstartError, match="restored step"):
        quickstart.check([leg("", None), leg(*after_kill), leg(*after_loss)])


def test_a_journal_can_be_read_while_a_line_is_half_written(recipes: None, tmp_path: Path) -> None:
    journal = importlib.import_module("journal")
    journal.Journal(tmp_path / "rank-0.jsonl")
    reader = journal.Reader(tmp_path / "rank-0.jsonl")
    assert reader.look() == [{"pid": os.getpid()}]
    with (tmp_path / "rank-0.jsonl").open("ab") as file:
        file.write(b'{"step"')
        file.flush()
        assert reader.look() == []
        file.write(b": 1}\n")
    assert reader.look() == [{"step": 1}]
    assert reader.lines == [{"pid": os.getpid()}, {"step": 1}]


def test_batches_are_a_function_of_step_and_rank_and_the_model_is_as_large_as_it_says(recipes: None) -> None:
    byte_lm = importlib.import_module("byte_lm")
    size = byte_lm.Size()
    corpus, again = byte_lm.Corpus(), byte_lm.Corpus()
    text, following = corpus.batch(7, 1, size)
    assert text.shape == (1, 64)
    assert text[0, 1:].equal(following[0, :-1])
    assert text.equal(again.batch(7, 1, size)[0])
    assert not text.equal(corpus.batch(8, 1, size)[0])
    assert not text.equal(corpus.batch(7, 0, size)[0])
    parameters = sum(parameter.numel() for parameter in byte_lm.ByteLM(size).parameters())
    assert 3 * 4 * parameters >= 100e6


def test_the_recipe_needs_no_environment_and_says_what_the_supervisor_counts_on(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sm_tiered.policies import AnyOf, EveryNSteps
    from sm_tiered.recipe import Recipe

    for name in [name for name in os.environ if name.startswith("QUICKSTART_")]:
        monkeypatch.delenv(name)
    settings = Recipe.load(RECIPES / "quickstart.yaml").settings()
    memory, disk = settings.tiers
    assert (memory.name, memory.save) == ("memory", EveryNSteps(quickstart.MEMORY_EVERY))
    assert disk.name == "disk"
    assert isinstance(disk.save, AnyOf)
    assert EveryNSteps(quickstart.DISK_EVERY) in disk.save.policies
    assert re.fullmatch(r"\w+", settings.namespace)
