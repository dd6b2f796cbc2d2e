"""The story, the exposure and the ledger of runs that are made up, against what really happened in them."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sm_tiered.event_reading import Told
from sm_tiered.exposure import Exposure, exposure
from sm_tiered.goodput import Goodput, goodput
from sm_tiered.story import SAFE, Story
from sm_tiered.story_telling import tell
from tests.told_runs import BEGAN, Teller, long_run


def told(run: Teller) -> tuple[Story, Exposure, Goodput]:
    story = tell(run.done(), tiers=run.tiers, memory=run.tiers[0])
    seen = exposure(story)
    return story, seen, goodput(story, seen)


def window_at(seen: Exposure, at: float) -> tuple[float, float]:
    [window] = [w for w in seen.windows if w.began_at < at <= w.ended_at]
    return window.process_secs + at - window.began_at, window.node_secs + at - window.began_at


# ---- one run, by hand


def test_a_run_with_both_kinds_of_failure_is_told_as_it_was() -> None:
    run = Teller()
    run.start()
    for _ in range(4):
        run.train(10)
        run.save(drain=5.0 if run.step == 20 else None)
    run.train(7)
    run.kill(down=60)
    assert run.start() == 40
    run.train(12)
    run.kill(node=True, down=100)
    assert run.start(node_lost=True, restore_secs=9.0) == 20
    run.train(30)
    run.save(drain=4.0)
    run.end(closing=6.0)
    story, seen, ledger = told(run)

    assert [(leg.end, leg.restored and (leg.restored.step, leg.restored.tier)) for leg in story.legs] == [
        ("silent", None),
        ("silent", (40, "memory")),
        ("finished", (20, "disk")),
    ]
    assert [(save.step, {on.tier: on.state for on in save.tiers}) for save in story.saves] == [
        (10, {"memory": "acknowledged"}),
        (20, {"memory": "acknowledged", "disk": "committed"}),
        (30, {"memory": "acknowledged"}),
        (40, {"memory": "acknowledged"}),
        (50, {"memory": "acknowledged", "disk": "committed"}),
    ]
    first, second = ledger.failures
    assert (first.kind, first.reached_step, first.restored_step, first.lost_steps) == ("process", 47, 40, 7)
    assert (second.kind, second.reached_step, second.restored_step, second.lost_steps) == ("node", 52, 20, 32)
    assert (first.at_least, second.at_least) == (False, True)
    assert first.lost_secs == pytest.approx(7.0)
    # Twelve steps of its own and twenty of the launch before, whose two saves in between have to be made again as well.
    assert second.lost_secs == pytest.approx(12 + 20 + 2 * 0.25)
    assert ledger.lost_steps == 39
    assert ledger.total("kept_secs") == pytest.approx(50.0)
    assert ledger.total("lost_secs") == pytest.approx(39.0)
    assert ledger.total("blocked_secs") == pytest.approx(5 * 0.25)
    assert ledger.total("restoring_secs") == pytest.approx(3 + 3 + 9)
    assert ledger.total("closing_secs") == pytest.approx(6.0)
    assert ledger.total("down_secs") == pytest.approx(160.0)
    assert ledger.share == pytest.approx(50 / (50 + 39 + 1.25 + 15 + 6 + 160))
    assert ledger.mtbf_secs("process", "node") == pytest.approx(ledger.up_secs / 2)
    assert ledger.mtbf_secs("preempted") is None
    memory, disk = ledger.tiers
    assert (memory.tier, memory.safe, disk.tier, disk.safe) == ("memory", 5, "disk", 2)
    assert memory.interval_steps == 10
    assert (disk.blocked_secs, disk.upload_secs) == (pytest.approx(0.25), pytest.approx(4.5))

    at_kill = BEGAN + 3 + 40 + 4 * 0.25 + 7
    assert window_at(seen, at_kill) == (pytest.approx(7.0), pytest.approx(27 + 2 * 0.25))


def test_a_launch_that_goes_back_by_itself_has_two_legs_and_no_failure() -> None:
    run = Teller()
    run.start()
    run.train(10)
    run.save()
    run.train(5)
    run.tell("RestoreStarted", step=10)
    run.now += 2
    run.tell("AttemptOpened", attempt="a000002-1-00000002", parent_step=10, chosen=True)
    run.tell("Restored", step=10, attempt="a000001-1-00000001", tier="memory", secs=2.0, bytes=5)
    run.step = 10
    run.train(3)
    run.end(closing=0.0)
    story, _, ledger = told(run)
    assert [(leg.launch, leg.end, leg.attempt[:7]) for leg in story.legs] == [
        (0, "restored", "a000001"),
        (0, "finished", "a000002"),
    ]
    assert story.legs[1].restored is not None
    assert story.legs[1].restored.chosen
    assert ledger.failures == ()
    assert ledger.total("lost_secs") == pytest.approx(5.0)
    assert ledger.total("restoring_secs") == pytest.approx(5.0)
    assert ledger.lost_steps == 5


def test_what_ended_well_and_what_was_preempted_are_no_failures_of_their_own() -> None:
    run = Teller()
    run.start()
    run.train(5)
    run.save()
    run.end("closed", down=10)
    run.start()
    run.train(3)
    run.tell("Preempted", step=run.step)
    run.save(drain=1.0)
    run.train(2)
    run.kill(down=10)
    run.start()
    run.train(3)
    run.end("failed", closing=0.0, down=10)
    run.start()
    run.train(1)
    _, _, ledger = told(run)
    assert [(failure.kind, failure.how) for failure in ledger.failures] == [
        ("preempted", "killed"),
        ("process", "raised"),
    ]
    assert ledger.mtbf_secs("process", "node") == pytest.approx(ledger.up_secs)


def test_a_training_that_is_over_loses_nothing_to_the_next_one() -> None:
    run = Teller()
    run.start()
    run.train(5)
    run.end("finished", down=10)
    run.step, run.spent = 0, {}
    run.start()
    run.train(5)
    _, _, ledger = told(run)
    assert (ledger.total("lost_secs"), ledger.lost_steps) == (0.0, 0)
    assert ledger.failures == ()


def test_a_run_without_progress_is_told_from_its_saves_alone() -> None:
    run = Teller(progress=False)
    run.start()
    run.train(10)
    run.save()
    run.train(7)
    run.kill(down=60)
    run.start()
    run.train(10)
    run.save()
    story, _, ledger = told(run)
    [failure] = ledger.failures
    assert (failure.reached_step, failure.lost_steps) == (10, 0), "nothing tells of the seven steps"
    assert ledger.total("down_secs") == pytest.approx(67.0 - 0.1), "their time is down time"
    assert [leg.end for leg in story.legs] == ["silent", "silent"]


def test_clocks_that_disagree_do_not_change_the_order_of_launches() -> None:
    run = Teller()
    run.start()
    run.train(10)
    run.save()
    run.kill(down=0)
    run.now -= 5000
    run.start()
    run.train(10)
    run.end()
    story = tell(run.done(), tiers=run.tiers, memory="memory")
    assert [leg.restored and leg.restored.step for leg in story.legs] == [None, 10]
    ledger = goodput(story, exposure(story))
    assert ledger.total("down_secs") == 0
    assert ledger.total("kept_secs") == pytest.approx(20)


# ---- any run


@st.composite
def runs(draw: st.DrawFn) -> Teller:
    run = Teller(step_secs=draw(st.sampled_from([0.5, 1.0, 7.0])))
    run.start()
    for _ in range(draw(st.integers(0, 25))):
        what = draw(st.sampled_from(["train", "train", "train", "save", "durable", "kill", "node", "close"]))
        trained = run.step and run.events[-1].kind == "Progress"
        if what in ("save", "durable") and trained and run.step not in run.acked:
            blocked = draw(st.sampled_from([0.0, 0.125, 2.0]))
            run.save(blocked=blocked, ack=0.0, drain=draw(st.sampled_from([0.0, 3.0])) if what == "durable" else None)
        elif what == "train":
            run.train(draw(st.integers(1, 6)))
        elif what in ("kill", "node", "close") and trained:
            down = draw(st.sampled_from([0.0, 1.0, 500.0]))
            run.end("closed", down=down) if what == "close" else run.kill(down=down, node=what == "node")
            run.start(node_lost=what == "node", restore_secs=draw(st.sampled_from([0.0, 4.0])))
    run.train(1)
    return run


@settings(max_examples=150, deadline=None)
@given(runs())
def test_every_second_is_counted_once_and_under_its_name(run: Teller) -> None:
    _, seen, ledger = told(run)
    truth = run.truth
    assert ledger.total("lost_secs") == pytest.approx(truth.lost)
    assert ledger.total("kept_secs") == pytest.approx(truth.kept)
    assert ledger.total("blocked_secs") == pytest.approx(truth.blocked)
    assert ledger.total("restoring_secs") == pytest.approx(truth.restoring)
    assert ledger.total("closing_secs") == pytest.approx(truth.closing)
    assert ledger.total("down_secs") == pytest.approx(truth.down)
    assert ledger.wall_secs == pytest.approx(ledger.ended_at - ledger.began_at)
    assert ledger.lost_steps == truth.lost_steps
    assert len(ledger.failures) == len(truth.failures)
    for lost in seen.lost:
        assert lost.secs > 0


def test_what_was_thrown_away_before_is_not_lost_once_more() -> None:
    run = Teller(step_secs=0.5)
    run.start()
    run.train(1)
    run.save(blocked=0.0, ack=0.0)
    for steps, node in ((1, False), (1, False), (3, True)):
        run.train(steps)
        run.kill(down=0.0, node=node)
        run.start(node_lost=node)
    run.train(1)
    assert [(lost.leg, lost.by, lost.secs) for lost in told(run)[1].lost] == [
        (0, 1, 0.5),
        (1, 2, 0.5),
        (0, 3, 0.5),
        (2, 3, 1.5),
    ]


@settings(max_examples=150, deadline=None)
@given(runs(), st.randoms(use_true_random=False))
def test_what_would_be_lost_at_any_time_is_the_work_since_the_newest_safe_step(
    run: Teller, chance: random.Random
) -> None:
    story, seen, _ = told(run)
    assert seen.windows
    for before, after in zip(seen.windows, seen.windows[1:], strict=False):
        assert before.began_at < before.ended_at
        if before.leg == after.leg:
            assert before.ended_at == after.began_at
    for _ in range(5):
        leg = chance.choice([leg for leg in story.legs if leg.ended_at > leg.ready_at])
        at = chance.uniform(math.nextafter(leg.ready_at, math.inf), leg.ended_at)
        process, node = window_at(seen, at)
        assert 0 <= process <= node + 1e-6
        # In the leg itself: nothing is at risk that a save of it already has.
        newest = max(
            (
                save.at
                for save in leg.saves
                for on in save.tiers
                if on.state in SAFE and on.ended_at is not None and on.ended_at < at
            ),
            default=leg.ready_at if leg.restored is not None else None,
        )
        if newest is not None:
            assert process == pytest.approx(at - newest)


@settings(max_examples=100, deadline=None)
@given(runs())
def test_the_window_at_a_failure_is_what_the_failure_lost(run: Teller) -> None:
    story, seen, ledger = told(run)
    for failure in ledger.failures:
        leg, following = story.legs[failure.leg], story.legs[failure.leg + 1]
        if leg.ended_at == leg.ready_at or following.restored is None:
            continue
        process, node = window_at(seen, leg.ended_at)
        late = any(
            on.ended_at is not None and on.ended_at >= leg.ended_at
            for save in story.saves
            if save.leg <= leg.index
            for on in save.tiers
        )
        if not late:  # what became safe after its death made the loss smaller
            wanted = node if failure.kind == "node" else process
            assert failure.lost_secs == pytest.approx(wanted, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(runs(), st.randoms(use_true_random=False))
def test_any_share_of_the_events_in_any_order_gives_a_ledger_that_adds_up(run: Teller, chance: random.Random) -> None:
    events = [event for event in run.done() if chance.random() < 0.7]
    spoilt = [replace(event, facts={**event.facts, "step": -5}) for event in events if chance.random() < 0.1]
    everything = sorted([*events, *spoilt], key=lambda event: event.time)
    story = tell(everything)
    seen = exposure(story)
    ledger = goodput(story, seen)
    assert ledger.wall_secs == pytest.approx(ledger.ended_at - ledger.began_at, abs=1e-3)
    for name in ("restoring_secs", "blocked_secs", "kept_secs", "lost_secs", "closing_secs", "down_secs"):
        assert all(getattr(leg, name) >= 0 for leg in ledger.legs)


def test_ten_thousand_saves_are_told_quickly() -> None:
    run = long_run(10_000)
    events = run.done()
    began = time.process_time()
    story = tell(events)
    seen = exposure(story)
    ledger = goodput(story, seen)
    assert time.process_time() - began < 2.0
    assert story.memory == "memory"
    assert len(ledger.failures) == 6
    assert ledger.total("lost_secs") == pytest.approx(run.truth.lost, rel=0.05)


def test_events_that_lack_their_facts_are_counted() -> None:
    def event(kind: str, **facts: object) -> Told:
        return Told(time=BEGAN, kind=kind, rank=0, launch="aa", namespace="run", facts=facts)

    bad = [
        event("SaveStaged", step="7", tiers=[], blocked_secs=1.0, bytes=1),
        event("SaveStaged", step=7, tiers="memory", blocked_secs=-1.0, bytes=1),
        event("Restored", step=7, tier=5, secs=1.0),
        event("Progress", step=10**12),
        event("TrainingEnded", step=None, how="</script>"),
        event("SaveFailed", step=1, tier="x" * 900, error="e"),
        event("Committed", step=True),
    ]
    story = tell([event("NothingSaved"), *bad, event("Unknown", what=[[[]]])])
    assert story.unreadable == 6, "a rank's Committed is none that anybody tells"
    assert len(story.legs) == 1
