"""Which checkpoints are candidates, and in which order."""

from __future__ import annotations

from sm_tiered.lineage import candidates, next_attempt
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId


def attempt(ordinal: int, nonce: str = "00000000") -> Attempt:
    return Attempt(ordinal=ordinal, utc_secs=1_700_000_000, nonce=nonce)


def at(ordinal: int, step: int) -> CheckpointId:
    return CheckpointId(attempt=attempt(ordinal), step=step)


def opened(ordinal: int, parent: CheckpointId | None, *, chosen: bool) -> dict[Attempt, AttemptRecord]:
    record = AttemptRecord(namespace="n", attempt=attempt(ordinal), parent=parent, chosen=chosen)
    return {record.attempt: record}


def test_a_newer_attempt_comes_first_whatever_its_steps() -> None:
    assert candidates([at(1, 300), at(2, 110), at(1, 100)], {}) == [at(2, 110), at(1, 300), at(1, 100)]


def test_after_a_roll_back_the_steps_above_the_fork_are_no_candidates() -> None:
    attempts = opened(1, None, chosen=False) | opened(2, at(1, 100), chosen=True)
    assert candidates([at(1, 100), at(1, 200), at(1, 300), at(1, 50)], attempts) == [at(1, 100), at(1, 50)]


def test_a_roll_back_counts_before_its_first_save() -> None:
    attempts = opened(2, at(1, 100), chosen=True)
    assert candidates([at(1, 100), at(1, 200)], attempts)[0] == at(1, 100)


def test_a_restart_that_the_user_did_not_choose_hides_nothing() -> None:
    attempts = opened(2, at(1, 100), chosen=False)
    assert candidates([at(1, 100), at(1, 200)], attempts) == [at(1, 200), at(1, 100)]


def test_attempts_between_a_roll_back_and_its_parent_are_left_behind() -> None:
    attempts = opened(2, at(1, 300), chosen=False) | opened(3, at(1, 100), chosen=True)
    assert candidates([at(1, 100), at(1, 300), at(2, 310)], attempts) == [at(1, 100)]


def test_roll_backs_in_a_row_follow_the_last_one_s_ancestors() -> None:
    attempts = opened(2, at(1, 200), chosen=True) | opened(3, at(2, 250), chosen=True)
    everything = [at(1, 100), at(1, 200), at(1, 300), at(2, 250), at(2, 260), at(3, 255)]
    assert candidates(everything, attempts) == [at(3, 255), at(2, 250), at(1, 200), at(1, 100)]


def test_step_0_is_a_step_like_any_other() -> None:
    attempts = opened(2, at(1, 0), chosen=True)
    assert candidates([at(1, 0), at(1, 10)], attempts) == [at(1, 0)]


def test_an_attempt_is_numbered_above_all_that_were_seen() -> None:
    found = next_attempt([attempt(3), attempt(7), attempt(1)], utc_secs=5, nonce="0123abcd")
    assert str(found) == "a000008-5-0123abcd"
    assert next_attempt([], utc_secs=5, nonce="0123abcd").ordinal == 1
