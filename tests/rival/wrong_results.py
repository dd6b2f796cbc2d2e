"""Defects 1 to 10: a load returns something else than what was saved, and says nothing."""

from __future__ import annotations

import random
import time
from typing import Any

from sm_tiered.testing.daemon import DaemonFault, StandInDaemon
from sm_tiered.testing.proxy import Rule
from tests.distributed import dcp_jobs
from tests.rival.rig import PATIENCE_SECS, Rig
from tests.rival.sides import LOST, Loaded, Side, dcp_load, library, load, save, save_steps, settle, state_of

FLIPS = 50


def _said(rig: Rig, loaded: Loaded, saved: dict[str, list[float]]) -> str:
    """Return what the user of *loaded* knows and has."""
    if loaded.error:
        assert not rig.ours or "checkpoints exist and none can be restored: step 10" in loaded.error
        return "refused"
    wrong = [name for name, values in saved.items() if loaded.values[name] != values]
    return f"loads, {', '.join(wrong)} not as saved" if wrong else "loads what was saved"


def _save_three(rank: int, side: Side) -> None:
    import torch

    lib = library(side)
    config = lib.configure(save_to_s3=True)
    save(lib, config, 10, {f"w{index}": torch.full((1000,), float(index)) for index in (1, 2, 3)})


def _load_three(rank: int, side: Side) -> Loaded:
    import torch

    lib = library(side)
    return load(lib, lib.configure(), {f"w{index}": torch.full((1000,), LOST) for index in (1, 2, 3)})


def truncated_object(rig: Rig) -> str:
    """d01: the object in S3 is cut where one of its three tensors ends."""
    side = rig.side(s3=True)
    rig.run(side, _save_three)
    rig.lose_memory()
    key = rig.shard(10)
    data = rig.read(key)
    rig.write(key, data[: len(data) // 3])
    (loaded,) = rig.run(side, _load_three)
    return _said(rig, loaded, {f"w{index}": [float(index)] for index in (1, 2, 3)})


def empty_answer(rig: Rig) -> str:
    """d02: the service answers 200 with an empty body that has a valid checksum."""
    side = rig.side()
    rig.save(side, {10: (1.0, False)})
    rig.lose_node()
    rig.daemon.restart(DaemonFault(kind="cut", sealed=True, method="GET", path=rf"/{rig.namespace}[^/]*/0/\d*10$"))
    (loaded,) = rig.load(side)
    assert rig.daemon.fired
    return _said(rig, loaded, {"w": [1.0]})


def _flip_and_load(rank: int, side: Side, bucket: str, key: str) -> dict[str, int]:
    """Change one bit of the object, load, and put it right again: that many times."""
    import boto3
    import torch

    lib = library(side)
    client: Any = boto3.client("s3")
    data = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    chance, told = random.Random(3), {"silent": 0, "detected": 0, "right": 0}
    for _ in range(FLIPS):
        bit = chance.randrange(len(data) * 8 // 20, len(data) * 8 * 19 // 20)
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        client.put_object(Bucket=bucket, Key=key, Body=bytes(damaged))
        state = state_of(LOST, rows=200)
        loaded = load(lib, lib.configure(), state)
        right = torch.equal(state["w"], state_of(1.0, rows=200)["w"])
        told["detected" if loaded.error else "right" if right else "silent"] += 1
    client.put_object(Bucket=bucket, Key=key, Body=data)
    state = state_of(LOST, rows=200)
    assert load(lib, lib.configure(), state).error is None
    assert torch.equal(state["w"], state_of(1.0, rows=200)["w"])
    return told


def _save_large(rank: int, side: Side) -> None:
    lib = library(side)
    save(lib, lib.configure(save_to_s3=True), 10, state_of(1.0, rows=200))


def flipped_bits(rig: Rig) -> str:
    """d03: one bit of the object in S3 is another one, fifty times."""
    side = rig.side(s3=True)
    rig.run(side, _save_large)
    rig.lose_memory()
    (told,) = rig.run(side, _flip_and_load, rig.bucket, rig.shard(10))
    assert told["right"] == 0
    return f"{told['silent']} of {FLIPS} loaded in silence"


def _load_through(rank: int, side: Side, urls: list[str]) -> Loaded:
    lib = library(side.of(daemon=urls[rank]))
    return load(lib, lib.configure(), state_of(LOST))


def ranks_disagree(rig: Rig) -> str:
    """d11: one request of rank 1 for the newest step is answered 503, once."""
    side = rig.side(2)
    rig.save(side, {100: (100.0, False), 200: (200.0, False)})
    rig.lose_node()
    with StandInDaemon(memory=rig.daemon.memory) as other:
        other.restart(DaemonFault(kind="status", method="GET", path=r"/\d+/\d*200$", times=1))
        loaded = rig.run(side, _load_through, [rig.daemon.url, other.url])
    steps = [int(found.values["w"][0]) for found in loaded]
    assert not any(found.error for found in loaded), [found.error for found in loaded]
    return f"ranks hold steps {steps[0]} and {steps[1]}"


def _shards(rig: Rig) -> list[bytes]:
    """What the newest attempt at step 10, or the one before where it has none, has in S3 of either rank."""
    return [rig.read(rig.shard(10, rank)) for rank in range(2)]


def overwritten_in_place(rig: Rig) -> str:
    """d12: a second run saves the same step and dies between the shards of its two ranks."""
    side = rig.side(2, s3=True)
    rig.save(side, {10: (1.0, True)})
    rig.lose_memory()
    before = _shards(rig)
    # The second of the two is held: ours drains them in any order, the predecessor's rank 1 may not overwrite its own.
    rig.proxy.restart(
        Rule(kind="half_open", match=("PUT", "_0.distcp"), first=2), Rule(kind="half_open", match=("PUT", "rank_1/"))
    )
    job = dcp_jobs.start(2, save_steps, side, {10: (2.0, True)})
    end = time.monotonic() + PATIENCE_SECS
    while (_shards(rig) == before or not rig.proxy.fired) and time.monotonic() < end:
        time.sleep(0.05)
    assert rig.proxy.fired, "no rank ever got as far as the second shard"
    written = [rank for rank, (was, now) in enumerate(zip(before, _shards(rig), strict=True)) if was != now]
    assert written in ([0], [1]), f"the run wrote the shards of ranks {written}"
    job.kill()
    job.wait()
    rig.lose_memory()
    rig.proxy.restart()
    loaded = rig.load(side)
    assert not any(found.error for found in loaded), [found.error for found in loaded]
    return f"loads {loaded[0].values['w']} on rank 0, {loaded[1].values['w']} on rank 1"


def mixed_attempts(rig: Rig) -> str:
    """d13: step 10 is saved to S3 by one run and to memory by the next; the service then loses a shard."""
    side = rig.side(s3=True)
    rig.save(side, {10: (1.0, True)})
    rig.save(side, {10: (2.0, False)})
    name, step = rig.blobs(0)[-1]
    del rig.daemon.namespaces[name].blobs[0][step]
    (loaded,) = rig.load(side)
    return f"saved 2.0, loads {loaded.values['w'][0]}" if not loaded.error else "refused"


def _tensor_parallel(rank: int, value: float) -> dict[str, Any]:
    """A tensor that both ranks have, and two that rank 1 has alone."""
    import torch

    own = {"a_tp": torch.full((10_000,), value), "b_tp": torch.full((100,), value)} if rank else {}
    return {"w": torch.full((100,), value), **own}


def _save_with_world_one(rank: int, side: Side) -> str:
    lib = library(side)
    try:
        save(lib, lib.configure(world_size=1), 10, _tensor_parallel(rank, 11.0))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _load_with_world_one(rank: int, side: Side) -> Loaded:
    lib = library(side)
    state = _tensor_parallel(rank, LOST)
    state.pop("a_tp", None)
    return load(lib, lib.configure(world_size=1), state)


def wrong_world(rig: Rig) -> str:
    """d10: two processes, of which world_size counts one, as its docstring asks with tensor parallelism."""
    side = rig.side(2)
    refused = rig.run(side, _save_with_world_one)
    if any(refused):
        assert all("world_size" in text for text in refused), refused
        return "refused when it is configured"
    loaded = rig.run(side, _load_with_world_one)
    return f"rank 1: {_said(rig, loaded[1], {'b_tp': [11.0]})}"


def _reuse(rank: int, side: Side) -> tuple[list[str], list[Loaded]]:
    import torch.distributed.checkpoint as dcp

    lib = library(side)
    config, refused = lib.configure(), list[str]()
    writer = lib.writer(checkpoint_config=config, step=10)
    for step in (10, 20):
        try:
            dcp.save(state_of(float(step)), storage_writer=writer, checkpoint_id=f"step_{step}")
        except Exception as error:
            refused.append(f"{type(error).__name__}: {error}")
        else:
            settle(lib, config, writer)
    reader = lib.reader(checkpoint_config=config)
    first = dcp_load(lambda: reader, state_of(LOST))
    save(lib, config, 30, state_of(30.0))
    return refused, [first, dcp_load(lambda: reader, state_of(LOST)), load(lib, config, state_of(LOST), 10)]


def reused_writer(rig: Rig) -> str:
    """d18: one writer saves steps 10 and 20 by checkpoint_id, one reader loads before and after step 30."""
    ((_, (_, again, ten)),) = rig.run(rig.side(), _reuse)
    return f"step 10 holds {ten.values['w'][0]}, the latest is {again.values['w'][0]}"


def lost_after_rollback(rig: Rig) -> str:
    """d20: back to step 100 of 300, then step 110 is saved."""
    side = rig.side()
    rig.save(side, {step: (float(step), False) for step in (100, 200, 300)})
    rig.run(side, _roll_back)
    rig.lose_node()
    (loaded,) = rig.load(side)
    return f"loads step {loaded.values['w'][0]:.0f}"


def _roll_back(rank: int, side: Side) -> None:
    lib = library(side)
    config, state = lib.configure(), state_of(LOST)
    assert load(lib, config, state, 100).values == {"w": [100.0]}
    save(lib, config, 110, state_of(110.0))


def _load_nothing(rank: int, side: Side) -> Loaded:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    lib = library(side)
    return load(lib, lib.configure(), state_of(LOST), 500, planner=DefaultLoadPlanner(allow_partial_load=True))


def nothing_is_loaded(rig: Rig) -> str:
    """d05b: step 500 is loaded, with allow_partial_load, where nothing was ever saved."""
    (loaded,) = rig.run(rig.side(), _load_nothing)
    assert not loaded.error or "500" in loaded.error
    return "refused" if loaded.error else f"load returns, w = {loaded.values['w'][0]}"
