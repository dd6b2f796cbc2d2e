"""One counter tells how a save stands in the memory of all ranks."""

from __future__ import annotations

import pytest

from sm_tiered.acks import Acks
from sm_tiered.errors import DeadlineExceededError, RankFailedError
from sm_tiered.group import SoloGroup
from sm_tiered.records import Attempt, CheckpointId

SAVE, OTHER = (CheckpointId(attempt=Attempt(ordinal=1, utc_secs=1, nonce="0123abcd"), step=step) for step in (1, 2))


class Shared(SoloGroup):
    """One of *world* ranks that count together."""

    def __init__(self, rank: int, world: int, counters: dict[str, int]) -> None:
        self.rank, self.world, self._counters = rank, world, counters


def ranks(world: int) -> tuple[list[Acks], dict[str, int]]:
    counters: dict[str, int] = {}
    return [Acks(Shared(rank, world, counters)) for rank in range(world)], counters


def test_a_save_is_complete_once_all_have_acknowledged_it() -> None:
    acks, counters = ranks(3)
    for number, one in enumerate(acks):
        assert [other.look(SAVE) for other in acks] == [(False, None)] * 3
        assert not any(other.complete(SAVE) for other in acks), number
        one.give(SAVE)
    assert [one.look(SAVE) for one in acks] == [(True, None)] * 3
    assert acks[1].complete(SAVE)
    assert acks[0].look(OTHER) == (False, None)
    acks[1].forget(SAVE)
    assert counters
    acks[0].forget(SAVE)
    assert set(counters.values()) <= {0}


@pytest.mark.parametrize("failing", [[0], [2], [1, 2], [0, 1, 2, 3]])
def test_one_that_fails_ends_it_for_all_whatever_the_others_say(failing: list[int]) -> None:
    acks, _ = ranks(4)
    for rank in set(range(4)) - set(failing):
        acks[rank].give(SAVE)
    for rank in failing:
        acks[rank].refuse(SAVE)
    for one in acks:
        done, error = one.look(SAVE)
        assert done
        assert isinstance(error, RankFailedError)
        assert error.step == SAVE.step
        assert error.rank is not None
        assert 0 <= error.rank < 4
        assert error.rank == failing[0] or len(failing) > 1
        assert not one.complete(SAVE)


@pytest.mark.parametrize("error", [DeadlineExceededError("not yet"), RankFailedError("gone")])
def test_a_store_that_does_not_answer_yet_is_no_failure(
    error: DeadlineExceededError | RankFailedError, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one, _), _ = ranks(2)

    def fail(_self: object, _key: str, _amount: int) -> int:
        raise error

    monkeypatch.setattr(SoloGroup, "add", fail)
    assert one.look(SAVE) == ((False, None) if isinstance(error, DeadlineExceededError) else (True, error))
