"""A tensor whose storage was freed or resized, as FSDP does with what it gathers, is refused wherever it is met.

To read or fill it would end the process without a word: here a missing check is no failed test but a dead pytest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from sm_tiered.errors import MismatchError, StructureError, UnsafeValueError
from sm_tiered_dcp import TieredCheckpointer, TieredStorageReader, TieredStorageWriter
from sm_tiered_dcp.leaves import lacks_storage
from sm_tiered_dcp.tree import flatten
from sm_tiered_dcp.values import dump_value
from tests.distributed.dcp_jobs import recipe, steps

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

COUNT = 100_000


def freed(view: Callable[[torch.Tensor], torch.Tensor] = lambda base: base[:COUNT], to: int = 0) -> torch.Tensor:
    """A view of twice as many numbers, whose storage holds *to* bytes now."""
    found = view(torch.ones(2 * COUNT))
    found.untyped_storage().resize_(to)
    return found


FREED: dict[str, Callable[[], torch.Tensor]] = {
    "first half": freed,
    "second half": lambda: freed(lambda base: base[COUNT:]),
    "every other": lambda: freed(lambda base: base[1::2]),
    "cut short": lambda: freed(to=64),
    "last number cut": lambda: freed(to=4 * COUNT - 4),
    "every other, cut": lambda: freed(lambda base: base[::2], to=4 * COUNT),
    "parameter": lambda: torch.nn.Parameter(freed(lambda base: base[COUNT:])),
}
every_freed = pytest.mark.parametrize("make", FREED.values(), ids=FREED.keys())


def state(w: torch.Tensor | None = None) -> dict[str, Any]:
    return {"a": torch.zeros(5), "m": {"w": torch.zeros(COUNT) if w is None else w}, "epoch": 0}


def test_only_what_reaches_beyond_its_storage_is_told() -> None:
    base = torch.ones(4, 6)
    good = [
        base,
        base[1:, ::2],
        base.T,
        base[3:, 5:],
        base[4:],
        torch.ones(1).expand(9),
        torch.empty(0),
        torch.ones(()),
    ]
    good += [torch.ones(3, dtype=torch.complex64).conj(), torch.eye(3).to_sparse(), torch.empty(7, device="meta")]
    good += [freed(to=4 * COUNT), freed(lambda base: base[:0]), torch.empty(3, 0)]
    assert not any(map(lacks_storage, good))
    for to in (0, 4, 4 * COUNT - 1):
        assert lacks_storage(freed(to=to)), to
    assert lacks_storage(freed(lambda base: base[COUNT:], to=4 * COUNT))


@every_freed
def test_a_state_that_holds_one_is_not_flattened_nor_stored_as_a_value(make: Callable[[], torch.Tensor]) -> None:
    for place in ({"w": make()}, {"m": {"w": make()}}, {"m": [1, make()]}, {"per_rank": {"w": make()}}):
        with pytest.raises(StructureError, match=r"is larger than its storage, which was freed or resized"):
            flatten(place, rank=0)
    with pytest.raises(UnsafeValueError, match=r"v\[0\]: a tensor whose storage was freed or resized"):
        dump_value("v", (make(),), allow_pickle=True)


@every_freed
def test_it_is_neither_saved_nor_filled(make: Callable[[], torch.Tensor], tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, state(torch.ones(COUNT))).wait("memory")
        with pytest.raises(StructureError, match=r"m\.w, a \w+, is larger than its storage"):
            checkpointer.save(2, state(make()))
        with (
            closing(TieredStorageWriter(which, step=2)) as writer,
            pytest.raises(BaseException, match=r"m\.w, a \w+, is larger than its storage"),
        ):
            dcp.save(state(make()), storage_writer=writer)
        assert set(steps(memory_dir)) == {1}
        target = state(make())
        with pytest.raises(MismatchError, match=r"m\.w, a \w+, is larger than its storage"):
            checkpointer.restore(target)
        assert not target["a"].any()
        with (
            closing(TieredStorageReader(which)) as reader,
            pytest.raises(BaseException, match=r"m\.w: the target is larger than its storage"),
        ):
            dcp.load(target, storage_reader=reader)
        target = state()
        assert checkpointer.restore(target) == 1
        assert target["m"]["w"].eq(1.0).all()
