"""Which checkpoints in memory may be recycled."""

from __future__ import annotations

from sm_tiered.generations import Generations
from sm_tiered.records import Attempt, CheckpointId


def at(step: int, ordinal: int = 1) -> CheckpointId:
    return CheckpointId(attempt=Attempt(ordinal=ordinal, utc_secs=0, nonce="00000000"), step=step)


def after(keep: int, *steps: int, written: int = 0) -> Generations:
    """A line of *steps*, of which all but the newest *written* are known to be whole."""
    line = Generations(keep=keep)
    for step in steps:
        line.add(at(step))
    line.learn([index >= written for index in range(len(line.recent()))])
    return line


def test_nothing_is_recycled_before_a_checkpoint_is_whole() -> None:
    line = after(1, 5, 10, written=2)
    assert line.releasable([at(5), at(10)], ()) == set()


def test_the_kept_ones_and_all_above_the_watermark_stay() -> None:
    line = after(2, 5, 10, 15, 20, written=1)
    assert line.watermark == at(15)
    assert line.releasable([at(5), at(10), at(15), at(20)], ()) == {at(5)}


def test_what_the_drainer_needs_stays() -> None:
    line = after(1, 5, 10, 15)
    assert line.releasable([at(5), at(10), at(15)], {at(5)}) == {at(10)}


def test_a_step_that_failed_does_not_count_as_kept() -> None:
    line = Generations(keep=2)
    for step in (5, 10, 15):
        line.add(at(step))
    line.learn([True, False, True])
    assert line.watermark == at(15)
    assert line.releasable([at(5), at(10), at(15)], ()) == {at(10)}


def test_the_restored_one_stays_until_a_newer_one_is_whole() -> None:
    line = Generations(keep=1)
    line.continue_from([at(5)], at(10))
    abandoned = at(15)
    assert line.releasable([at(5), at(10), abandoned], ()) == {at(5), abandoned}
    line.add(at(11, ordinal=2))
    line.learn([False, True, True])
    assert line.releasable([at(10), at(11, ordinal=2)], ()) == set()
    line.learn([True, True, True])
    assert line.releasable([at(10), at(11, ordinal=2)], ()) == {at(10)}


def test_what_this_rank_has_written_is_taken_as_whole_only_when_asked() -> None:
    line = after(1, 5, 10, written=1)
    assert line.releasable([at(5), at(10)], ()) == set()
    assert line.supposing([True, True]).releasable([at(5), at(10)], ()) == {at(5)}
    assert line.supposing([False, True]).releasable([at(5), at(10)], ()) == set(), "it failed here"
    assert line.releasable([at(5), at(10)], ()) == set(), "supposing changes nothing"


def test_the_watermark_never_goes_back() -> None:
    line = after(1, 5, 10, 15)
    line.learn([False, False, True])
    assert line.watermark == at(15)
