"""Which checkpoints are candidates, and in which order."""

from __future__ import annotations

from sm_tiered.layout import parse_attempt
from sm_tiered.lineage import candidates, imported_attempt, next_attempt
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


def test_imports_are_below_all_of_ours_in_the_order_of_their_steps() -> None:
    steps = [0, 1, 9, 10, 11, 99, 100, 2_000_000_000, 10**10 - 1]
    made = [CheckpointId(attempt=imported_attempt(step, f"{-step & 15:x}" * 32), step=step) for step in steps]
    assert candidates(made, {}) == sorted(made, key=lambda checkpoint: -checkpoint.step)
    assert candidates([*made, at(1, 5)], {})[0] == at(1, 5)
    assert all(checkpoint.attempt.is_imported for checkpoint in made)
    assert not attempt(1).is_imported
    assert all(parse_attempt(str(checkpoint.attempt)) == checkpoint.attempt for checkpoint in made)


def test_two_saves_of_a_step_are_two_attempts() -> None:
    one, other = imported_attempt(17, "0123456789abcdef"), imported_attempt(17, "0123457789abcdef")
    assert (str(one), str(other)) == ("a000001-2-70123456", "a000001-2-70123457")


def test_who_chose_an_imported_step_leaves_the_later_imports_behind() -> None:
    made = [CheckpointId(attempt=imported_attempt(step, "f" * 32), step=step) for step in (5, 10, 20)]
    assert candidates(made, opened(2, made[1], chosen=True)) == [made[1], made[0]]
