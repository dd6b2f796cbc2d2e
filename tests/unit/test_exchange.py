"""The exchange: what all ranks have in common, in one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from sm_tiered.exchange import HISTORY, MOST_TIERS, Agreed, Offer, exchange


class Together:
    """A group of ranks in one process: the others' lists are given."""

    def __init__(self, others: list[list[int]]) -> None:
        self.rank, self.world, self.others = 0, 1 + len(others), others
        self.calls = 0
        self.sent: list[int] = []

    def max(self, values: Sequence[int]) -> list[int]:
        self.calls += 1
        self.sent = list(values)
        return [max(column) for column in zip(values, *self.others, strict=True)]

    def gather(self, value: object) -> list[Any]:
        raise AssertionError("an exchange is one all-reduce")

    def add(self, key: str, amount: int) -> int:
        raise AssertionError("an exchange is one all-reduce")

    def drop(self, key: str) -> None: ...

    def close(self) -> None: ...


def agree(*offers: Offer) -> Agreed:
    sent: list[list[int]] = []
    for rank, offer in enumerate(offers[1:], 1):
        alone = Together([])
        alone.rank = rank
        exchange(alone, offer)
        sent.append(alone.sent)
    return exchange(Together(sent), offers[0])


ALL_WRITTEN = Offer(step=5, tiers=0b101, written=(True,) * HISTORY)


def test_equal_offers_agree() -> None:
    found = agree(ALL_WRITTEN, ALL_WRITTEN, ALL_WRITTEN)
    assert found.same_step
    assert found.same_values
    assert found.same_value_names
    assert found.tiers == 0b101
    assert found.written == (True,) * HISTORY
    assert found.failed_rank is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"step": 6}, "same_step"),
        ({"values_signature": 1}, "same_value_names"),
        ({"values_fingerprint": 1}, "same_values"),
        ({"values_signature": 2**62}, "same_value_names"),
    ],
)
def test_what_must_be_alike_is_noticed_when_it_is_not(change: dict[str, int], field: str) -> None:
    assert not getattr(agree(ALL_WRITTEN, ALL_WRITTEN, replace(ALL_WRITTEN, **change)), field)


@pytest.mark.parametrize(
    "flag",
    ["structure_changed", "no_room", "no_room_yet", "preempted", "gave_up", "went_on"],
)
def test_one_rank_s_flag_counts_for_all(flag: str) -> None:
    assert not getattr(agree(ALL_WRITTEN, ALL_WRITTEN), flag)
    assert getattr(agree(ALL_WRITTEN, replace(ALL_WRITTEN, **{flag: True})), flag)


def test_each_tier_of_any_rank_counts_for_all() -> None:
    one, other = replace(ALL_WRITTEN, tiers=1 << 15 | 0b010), replace(ALL_WRITTEN, tiers=0b110)
    assert agree(one, other).tiers == 1 << 15 | 0b110


@pytest.mark.parametrize("name", ["in_flight", "drain_failed"])
def test_of_each_tier_the_largest_number_of_any_rank_counts(name: str) -> None:
    one, other = (replace(ALL_WRITTEN, **{name: numbers}) for numbers in ((0, 2, 0, 7), (1, 0, 0, 10**10)))
    found = getattr(agree(one, other), name)
    assert found == (1, 2, 0, 10**10, *[0] * (MOST_TIERS - 4))
    assert not any(getattr(agree(ALL_WRITTEN, ALL_WRITTEN), name))


def test_a_record_counts_only_when_every_rank_has_written_its_own() -> None:
    late = replace(ALL_WRITTEN, written=(False, *(True,) * (HISTORY - 1)))
    assert agree(ALL_WRITTEN, late).written == (False, *(True,) * (HISTORY - 1))


def test_the_rank_that_failed_is_named_rank_0_among_them() -> None:
    assert agree(replace(ALL_WRITTEN, failed=True), ALL_WRITTEN).failed_rank == 0
    assert agree(ALL_WRITTEN, replace(ALL_WRITTEN, failed=True)).failed_rank == 1


def test_rank_0_decides_about_clocks_and_metrics() -> None:
    assert agree(replace(ALL_WRITTEN, decided=0b10), ALL_WRITTEN).decided == 0b10
