"""Tensors that have one place for many numbers are saved like others, and refused before a restore begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sm_tiered.errors import MismatchError
from sm_tiered_dcp import TieredCheckpointer
from tests.distributed.dcp_jobs import bits, recipe


class _Holder:
    """A Stateful object that counts what is loaded into it."""

    def __init__(self, **tensors: Any) -> None:
        self.tensors, self.loaded = tensors, 0

    def state_dict(self) -> dict[str, Any]:
        return self.tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded += 1


def _state(value: float, places: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """A state with a tensor of one's choice in each of four *places*, between others."""
    found = {name: torch.full((3, 4), value) for name in ("x", "list.1", "holder.x", "per_rank.00000.x")} | (
        places or {}
    )
    return {
        "a": torch.full((5,), value),
        "x": found["x"],
        "list": [torch.full((2,), value), found["list.1"]],
        "holder": _Holder(first=torch.full((2,), value), x=found["holder.x"]),
        "per_rank": {"x": found["per_rank.00000.x"], "rng": int(value)},
        "step": int(value),
        "z": torch.full((6,), value),
    }


def _known(state: dict[str, Any]) -> Any:
    return bits({**state, "holder": state["holder"].tensors})


SHARED = {
    "a scalar": torch.tensor(7.0).expand(3, 4),
    "a row": torch.arange(4.0).expand(3, 4),
    "a column": torch.arange(3.0)[:, None].expand(3, 4),
    "a window": torch.arange(6.0).unfold(0, 4, 1),
}


@pytest.mark.parametrize("place", ["x", "list.1", "holder.x", "per_rank.00000.x"])
@pytest.mark.parametrize("kind", SHARED)
def test_a_tensor_whose_numbers_share_places_is_refused_by_name_before_anything_changes(
    kind: str, place: str, tmp_path: Path, memory_dir: Path
) -> None:
    with TieredCheckpointer.from_recipe(recipe(tmp_path, memory_dir, disk=None)) as checkpointer:
        checkpointer.save(1, _state(1.0)).wait("memory")
        state = _state(0.0, {place: SHARED[kind]})
        before = _known(state)
        with pytest.raises(
            MismatchError, match=rf"^(rank 0: )?{place}: its numbers share places.* can't be filled.*contiguous"
        ):
            checkpointer.restore(state)
        assert _known(state) == before
        assert state["holder"].loaded == 0
        state = _state(0.0)
        assert checkpointer.restore(state) == 1
        assert _known(state) == _known(_state(1.0))
        assert state["holder"].loaded == 1


def test_such_a_tensor_is_saved_and_restored_into_a_dense_one(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, disk=None)
    names = ("x", "list.1", "holder.x", "per_rank.00000.x")
    saved = _state(1.0, dict(zip(names, SHARED.values(), strict=True)))
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, saved).wait("memory")
        with pytest.raises(MismatchError, match="its numbers share places"):
            checkpointer.restore(saved)
        state = _state(0.0)
        assert checkpointer.restore(state) == 1
    assert _known(state) == _known(saved)


def test_strides_of_nothing_that_lead_nowhere_are_no_obstacle(tmp_path: Path, memory_dir: Path) -> None:
    """A stride of 0 is harmless where there is but one number, or none."""
    base = torch.zeros(8, 6)
    targets = {
        "one": torch.zeros(1).as_strided((1,), (0,)),
        "one row": torch.zeros(4).as_strided((1, 4), (0, 1)),
        "none": torch.zeros(1, 0).expand(4, 0),
        "scalar": torch.tensor(0.0),
        "transposed": base[:3, :2].t(),
        "stepped": base[4::2, ::3],
        "permuted": torch.zeros(2, 3, 4).permute(2, 0, 1)[::2],
        "diagonal": torch.zeros(4, 4).diagonal(),
    }
    saved = {name: torch.randn(tensor.shape) for name, tensor in targets.items()}
    with TieredCheckpointer.from_recipe(recipe(tmp_path, memory_dir, disk=None)) as checkpointer:
        checkpointer.save(1, saved).wait("memory")
        assert checkpointer.restore(targets) == 1
    assert all(torch.equal(targets[name], tensor) for name, tensor in saved.items())
