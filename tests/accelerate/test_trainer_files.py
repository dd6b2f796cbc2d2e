"""Who brings which of the Trainer's files, and where the Trainer is told to write."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sm_tiered_accelerate.trainer_files import Dealt, Detour, deal, whose

STATE = "trainer_state.json"
MODEL = "pytorch_model_fsdp_0"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        # One rank.
        ([[STATE, "rng_state.pth"]], [((), ("rng_state.pth", STATE))]),
        # Two that see the same directory.
        (
            [[STATE, "rng_state_0.pth", "rng_state_1.pth"]] * 2,
            [(("rng_state_0.pth",), (STATE,)), (("rng_state_1.pth",), (STATE,))],
        ),
        # Two on nodes of their own, where the second has something that the first lacks.
        (
            [[STATE, "rng_state_0.pth"], ["rng_state_1.pth", "shard-1.bin"]],
            [(("rng_state_0.pth",), (STATE,)), (("rng_state_1.pth", "shard-1.bin"), (STATE,))],
        ),
        # Shards of DCP, and what names a rank that did not write it.
        (
            [[STATE, f"{MODEL}/__0_0.distcp", f"{MODEL}/.metadata", "rng_state_1.pth"], [f"{MODEL}/__1_0.distcp"]],
            [
                ((f"{MODEL}/__0_0.distcp", "rng_state_1.pth"), (f"{MODEL}/.metadata", STATE)),
                ((f"{MODEL}/__1_0.distcp",), (f"{MODEL}/.metadata", STATE)),
            ],
        ),
        # What a launch of more ranks left.
        ([[STATE, "rng_state_0.pth", "rng_state_3.pth"]], [(("rng_state_0.pth",), (STATE,))]),
    ],
)
def test_each_file_is_brought_once(told: list[list[str]], expected: list[Any]) -> None:
    dealt = [deal(told, rank) for rank in range(len(told))]
    assert dealt == [Dealt(own=own, shared=shared) for own, shared in expected]


def test_random_state_is_for_its_rank_alone() -> None:
    names = ["rng_state_12.pth", "a/rng_state_0.pth", "rng_state.pth", "__1_0.distcp", "optimizer.pt"]
    assert [whose(name) for name in names] == [12, 0, None, None, None]


def test_a_detour_is_not_to_be_seen_afterwards_nor_in_a_pickle() -> None:
    args, model = SimpleNamespace(output_dir="out", save_strategy="best"), SimpleNamespace()
    detour = Detour()
    detour.end()
    detour.take(args, Path("/elsewhere"), save_strategy="no")
    assert detour.taken
    assert (os.path.join(args.output_dir, "x"), args.save_strategy) == ("/elsewhere/x", "no")
    assert pickle.loads(pickle.dumps(args)).output_dir == copy.deepcopy(args).output_dir == "out"
    detour.write_on_each_node(model)
    assert vars(model) == {}
    detour.take(args, Path("/third"))
    detour.end()
    detour.end()
    assert vars(args) == {"output_dir": "out", "save_strategy": "best"}
    assert not detour.taken
