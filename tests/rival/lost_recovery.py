"""Defects 11 to 18: good data exists, and is not found, not written or not used."""

from __future__ import annotations

import time
from typing import Any

from sm_tiered.testing.daemon import DaemonFault
from sm_tiered.testing.proxy import Rule
from tests.rival.rig import PATIENCE_SECS, Rig
from tests.rival.sides import Side, library, load_step, save, state_of


def _found(rig: Rig, side: Side) -> str:
    (loaded,) = rig.load(side)
    return f"loads step {loaded.values['w'][0]:.0f}" if not loaded.error else "nothing is loaded"


def _throttled(*match: str) -> Rule:
    """One answer 429: a 503 is repeated inside the client that both sides use."""
    return Rule(kind="status", match=match, status=429, code="TooManyRequests", times=1)


def one_429_at_the_commit(rig: Rig) -> str:
    """d07: what commits step 300 in S3 is answered 429, once; then memory is lost."""
    side = rig.side(s3=True)
    rig.proxy.restart(
        _throttled("PUT ", "step_300/metadata.metadata"),
        Rule(
            kind="status",
            match=("PUT ", "step_0000000300", "manifest.json"),
            status=429,
            code="TooManyRequests",
            times=1,
        ),
    )
    rig.run(side, _save_whatever_happens)
    assert rig.proxy.fired
    rig.lose_memory()
    return _found(rig, side)


def _save_whatever_happens(rank: int, side: Side) -> None:
    lib = library(side)
    config = lib.configure(save_to_s3=True)
    for step in (100, 200, 300):
        try:
            save(lib, config, step, state_of(float(step)))
        except BaseException as error:
            if lib.side.predecessor is None or step < 300:
                raise AssertionError(f"step {step} was not saved") from error


def _loop(rank: int, side: Side, steps: list[int], pause_secs: float) -> list[str]:
    """The loop of the documentation, in which the next step's save_to_s3 is set while a save is on its way."""
    import torch.distributed.checkpoint as dcp

    lib = library(side)
    config, failed = lib.configure(), list[str]()
    future: Any = None
    for step in steps:
        state = state_of(float(step))
        config.save_to_s3 = step % 50 == 0
        writer = lib.writer(checkpoint_config=config, step=step)
        if future is not None and (error := future.exception()):
            failed.append(str(error))
        future = dcp.async_save(state, storage_writer=writer)
        time.sleep(pause_secs)
    if error := future.exception():
        failed.append(str(error))
    return failed


def slow_s3_in_the_loop(rig: Rig) -> str:
    """d08b: the loop of the documentation with an S3 that takes longer than a step; then memory is lost."""
    side = rig.side(s3=True)
    rig.proxy.restart(
        Rule(kind="slow", match=("PUT ", "checkpoint.pt"), pause_secs=0.003),
        Rule(kind="slow", match=("PUT ", "__0_0.distcp"), pause_secs=0.003),
    )
    (failed,) = rig.run(side, _loop, [50, 60, 70], 0.25)
    rig.proxy.restart()
    _await_s3(rig, 50)
    rig.lose_memory()
    return f"{len(failed)} saves failed, {_found(rig, side)}"


def slow_service_in_the_loop(rig: Rig) -> str:
    """d08: the loop of the documentation with a service that takes longer than a step."""
    side = rig.side(s3=True)
    rig.daemon.restart(DaemonFault(kind="late", method="POST", path=r"/checkpoints/.*/0/\d+$", secs=0.4))
    rig.run(side, _loop, [40, 50, 60], 0.0)
    rig.daemon.restart()
    _await_s3(rig, 50)
    names = {part for key in rig.objects() for part in key.split("/") if part.startswith("step_")}
    found = sorted({int(name.removeprefix("step_").partition("-")[0]) for name in names})
    return f"S3 has steps {found}, it was to be [50]"


def _await_s3(rig: Rig, step: int) -> None:
    """Wait for our drainer; the predecessor has none, and its futures are done."""
    end = time.monotonic() + PATIENCE_SECS
    while rig.ours and time.monotonic() < end:
        if any(f"step_{step:010d}" in key and key.endswith("manifest.json") for key in rig.objects()):
            return
        time.sleep(0.05)


def lost_shard(rig: Rig) -> str:
    """d06: of the newest of three steps a shard is lost."""
    side = rig.side()
    rig.save(side, {step: (float(step), False) for step in (100, 150, 200)})
    rig.lose_newest_shard(0)
    return _found(rig, side)


def resized_in_memory(rig: Rig) -> str:
    """d09: saved by two ranks to memory, loaded by one and by three."""
    return _resized(rig, s3=False)


def resized_from_s3(rig: Rig) -> str:
    """d09b: saved by two ranks to memory and S3, loaded by one and by three; then from S3 alone."""
    both = _resized(rig, s3=True)
    rig.lose_memory()
    return f"{both}; from S3 alone {_by_one_and_three(rig, s3=True)}"


def _resized(rig: Rig, *, s3: bool) -> str:
    rig.save(rig.side(2, s3=s3), {10: (1.0, s3)})
    rig.lose_node()
    return _by_one_and_three(rig, s3=s3)


def _by_one_and_three(rig: Rig, *, s3: bool) -> str:
    told: list[str] = []
    for world, name in ((1, "2→1"), (3, "2→3")):
        loaded = rig.run(rig.side(world, s3=s3), load_step)
        rig.lose_node()
        good = all(not found.error and found.values["w"] == [1.0] for found in loaded)
        told.append(f"{name} {'loads' if good else 'fails'}")
    return ", ".join(told)


def step_zero(rig: Rig) -> str:
    """d14: step 0 is in S3, memory is lost."""
    side = rig.side(s3=True)
    rig.save(side, {0: (0.0, True)})
    rig.lose_memory()
    return _found(rig, side)


def one_429_on_load(rig: Rig) -> str:
    """d19: one GET of a load from S3 is answered 429."""
    side = rig.side(s3=True)
    rig.save(side, {100: (100.0, True)})
    rig.lose_memory()
    rig.proxy.restart(
        _throttled("GET ", "metadata.metadata"),
        _throttled("GET ", "manifest.json"),
    )
    found = _found(rig, side)
    assert rig.proxy.fired
    return found


def _save_to_memory(rank: int, side: Side) -> str:
    lib = library(side)
    try:
        save(lib, lib.configure(), 10, state_of(1.0))
    except BaseException as error:
        return f"the save fails: {error}"
    return "saved"


def s3_is_down(rig: Rig) -> str:
    """d15: S3 answers nothing; a save goes to memory only."""
    side = rig.side(s3=True, endpoint="http://127.0.0.1:9")
    (told,) = rig.run(
        side, _save_to_memory, env={"AWS_MAX_ATTEMPTS": "1", "SM_TIERED__TIERS__S3__RETRY__ATTEMPTS": "1"}
    )
    return told.partition(":")[0] if told != "saved" else f"saved, {_found(rig, rig.side())}"


def dropped_request(rig: Rig) -> str:
    """d24: one request that carries a shard to the service loses its connection."""
    side = rig.side()
    rig.daemon.restart(DaemonFault(kind="reset", method="POST", path=r"/checkpoints/.*/0/\d*10$", times=1))
    (told,) = rig.run(side, _save_to_memory)
    assert rig.daemon.fired
    rig.lose_node()
    return told.partition(":")[0] if told != "saved" else f"saved, {_found(rig, side)}"
