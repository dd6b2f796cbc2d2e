"""Loaders of a resumed training: after any cut, the same batches, orders and random numbers as without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sm_tiered_accelerate import attach
from tests.accelerate.training import accelerator_for
from tests.distributed.dcp_jobs import recipe

BATCHES = 5
END = 2 * BATCHES + 2


class Drawing(Dataset[torch.Tensor]):
    """Samples that draw random numbers when they are loaded."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(1) / 2


SCENES: dict[str, dict[str, Any]] = {
    "plain": {},
    "seedable": {"use_seedable_sampler": True},
    "in order": {"shuffle": False},
    "with a validation": {"validates": True},
    "watched late": {"late": True, "shuffle": False, "draws": False},
}


class Run:
    """A training that notes what it draws; *stop* ends it after so many batches."""

    def __init__(
        self,
        *,
        shuffle: bool = True,
        validates: bool = False,
        late: bool = False,
        draws: bool = True,
        **configuration: Any,
    ) -> None:
        config = DataLoaderConfiguration(use_stateful_dataloader=True, **configuration)
        self.accelerator = accelerator_for(dataloader_config=config, gradient_accumulation_steps=1)
        torch.manual_seed(3)
        data: Any = Drawing() if draws else torch.arange(4.0 * BATCHES)
        loaders = [DataLoader(data, batch_size=4, shuffle=shuffle) for _ in range(2)]
        self.model, *self.loaders = self.accelerator.prepare(nn.Linear(1, 1), *loaders)
        self.validates, self.late = validates, late

    def batches(self, step: int) -> Iterator[tuple[int, Any]]:
        while True:
            for batch in self.loaders[0]:
                step += 1
                yield step, (batch.flatten().tolist(), torch.rand(1).item())
            if self.validates:
                for batch in self.loaders[1]:
                    yield step, ("validation", batch.flatten().tolist())

    def train(self, which: dict[str, Any], stop: int) -> dict[int, list[Any]]:
        found: dict[int, list[Any]] = {}
        if self.late:
            tiered: Any = None
            began = 0
        else:
            tiered = attach(self.accelerator, which)
            began = tiered.restore() or 0
        for step, drawn in self.batches(began):
            tiered = tiered or attach(self.accelerator, which)
            found.setdefault(step, []).append(drawn)
            tiered.maybe_save(step)
            if step == stop:
                break
        tiered.detach()
        return found


CUTS = [1, BATCHES - 1, BATCHES, BATCHES + 2]


@pytest.mark.parametrize(
    ("scene", "cut"),
    # At an epoch's end the validation that follows is cut off, and a script begins with the next epoch.
    [(scene, cut) for scene in SCENES for cut in CUTS if scene != "with a validation" or cut % BATCHES],
)
def test_a_cut_changes_nothing(tmp_path: Path, memory_dir: Path, scene: str, cut: int) -> None:
    settings = SCENES[scene]
    uncut = Run(**settings).train(recipe(tmp_path, memory_dir / "uncut", disk=None), END)
    which = recipe(tmp_path, memory_dir / "cut", disk=None)
    first = Run(**settings).train(which, cut)
    assert first == {step: drawn for step, drawn in uncut.items() if step <= cut}
    second = Run(**{**settings, "late": False}).train(which, END)
    if settings.get("late"):
        # What had begun before it was watched goes on at its place; what it drew is not known.
        second = {step: [values for values, _ in drawn] for step, drawn in second.items()}
        uncut = {step: [values for values, _ in drawn] for step, drawn in uncut.items()}
    assert second == {step: drawn for step, drawn in uncut.items() if step > cut}


def test_before_the_first_batch(tmp_path: Path, memory_dir: Path) -> None:
    uncut = Run().train(recipe(tmp_path, memory_dir / "uncut", disk=None), END)
    which = recipe(tmp_path, memory_dir / "cut", disk=None)
    with attach(Run().accelerator, which) as tiered:
        tiered.restore()
        tiered.save(0)
    assert Run().train(which, END) == uncut


def test_the_end_of_a_block_in_mid_epoch(tmp_path: Path, memory_dir: Path) -> None:
    uncut = Run().train(recipe(tmp_path, memory_dir / "uncut", disk=None), END)
    which = recipe(tmp_path, memory_dir / "cut", memory={"save": None}, disk={"save": "on_end"})
    run = Run()
    with attach(run.accelerator, which) as tiered:
        tiered.restore()
        for step, _ in run.batches(0):
            tiered.maybe_save(step)
            if step == 3:
                break
    assert Run().train(which, END) == {step: drawn for step, drawn in uncut.items() if step > 3}


def test_what_the_accelerator_has_freed_is_left_alone(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, disk=None)
    run = Run()
    with attach(run.accelerator, which) as tiered:
        tiered.save(0)
        gone = run.loaders
        run.accelerator.free_memory()
        loaders = [DataLoader(Drawing(), batch_size=4) for _ in range(2)]
        run.model, *run.loaders = run.accelerator.prepare(nn.Linear(1, 1), *loaders)
        tiered.save(1)
        assert all("_update_state_dict" not in vars(loader) for loader in gone)
    with attach(Run().accelerator, which) as tiered:
        assert tiered.restore() == 1
