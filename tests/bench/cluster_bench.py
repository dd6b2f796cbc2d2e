"""Saves to the cluster's checkpoint service and restores from it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from save_bench import WARM_SECS, recipe
from states import gpt_state, state_bytes, tensors_of
from timing import Peak, Yardstick, anonymous_bytes, secs_of

from sm_tiered.locks import probe

__all__ = ["KEEPS_PAGES", "NAMESPACE", "SETTLE_SECS", "forget", "load", "loaded", "memory", "saves", "service"]

NAMESPACE = "bench"
_LIMIT_SECS = 120.0
SETTLE_SECS = 0.5


KEEPS_PAGES = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_TRIM_THRESHOLD_": str(2**35),
}
"""Has a server keep the memory that it had once, as a service has whose memory is set aside for it: pages that a
hypervisor brings back at their first touch cost more here than all that is measured."""


@contextmanager
def service(*, discard: bool) -> Generator[str, None, None]:
    """Run the stand-in for the service in a process of its own; give its address."""
    command = [sys.executable, "-m", "sm_tiered.testing.daemon", "--port", "0", *["--discard"] * discard]
    env = {**os.environ, **KEEPS_PAGES}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def forget(url: str) -> None:
    """Leave the service without anything of an earlier measurement, whose memory would be in the way."""
    for name in (NAMESPACE, f"{NAMESPACE}__2"):
        with suppress(OSError):
            urlopen(Request(f"{url}/v1/cp/namespaces/{name}", method="DELETE")).close()


# ---- ours


def _opened(path: str, state: dict[str, Any], url: str | None) -> Any:
    """Return a checkpointer whose pages for *state* are prepared."""
    from sm_tiered_dcp import TieredCheckpointer

    checkpointer = TieredCheckpointer.from_recipe(_recipe(path, url))
    checkpointer.prepare(state)
    store: Any = checkpointer._open.store
    assert store.arena.wait(WARM_SECS)
    return checkpointer


def _recipe(path: str, url: str | None) -> dict[str, Any]:
    made = recipe(path)
    if url is None:
        return {**made, "namespace": "alone"}
    made["tiers"]["cluster"] = {"kind": "hyperpod", "url": url, "keep": {"latest": 2}}
    return made


def saves(path: str, url: str, tensors: int, size: int, runs: int) -> dict[str, Any]:
    """Save in turn into memory alone and into memory and the cluster; the first of both is not counted."""
    forget(url)
    state = gpt_state(tensors, size)
    yardstick = Yardstick(state_bytes(state))
    alone, both = _opened(path, state, None), _opened(path, state, url)
    samples: dict[str, list[float]] = {"copy": [], "alone": [], "blocked": [], "total": []}
    for step in range(runs + 1):
        samples["copy"].append(yardstick.secs())
        samples["alone"].append(secs_of(lambda step=step: alone.save(step, state)))
        alone.wait()
        time.sleep(SETTLE_SECS)
        begun = time.perf_counter()
        handle = both.save(step, state)
        samples["blocked"].append(time.perf_counter() - begun)
        handle.wait("cluster", timeout=_LIMIT_SECS)
        samples["total"].append(time.perf_counter() - begun)
        time.sleep(SETTLE_SECS)
    alone.close()
    both.close()
    return {name: times[1:] for name, times in samples.items()}


def load(path: str, url: str, tensors: int, size: int) -> dict[str, Any]:
    """Restore what `saves` left on the cluster, on a node whose memory is empty."""
    from sm_tiered_dcp import TieredCheckpointer

    with TieredCheckpointer.from_recipe(_recipe(path, url)) as checkpointer:
        return loaded(checkpointer.restore, tensors, size)


def memory(path: str, url: str, tensors: int, size: int, runs: int) -> dict[str, Any]:
    """Look how much private memory trainer and drainer have more while a job saves to the cluster."""
    forget(url)
    state = gpt_state(tensors, size)
    gc.collect()
    before = anonymous_bytes()
    with Peak(anonymous_bytes) as trainer:
        checkpointer = _opened(path, state, url)
        checkpointer.save(0, state).wait("cluster", timeout=_LIMIT_SECS)
        time.sleep(SETTLE_SECS)
        idle = _drainer_bytes(path)
        with Peak(lambda: _drainer_bytes(path), every_secs=0.01) as drainer:
            for step in range(1, runs + 1):
                checkpointer.save(step, state).wait("cluster", timeout=_LIMIT_SECS)
                time.sleep(SETTLE_SECS)
        checkpointer.close()
    return {"peak_bytes": trainer.highest - before, "drainer_bytes": drainer.highest, "idle_bytes": idle}


def _drainer_bytes(path: str) -> int:
    holder = probe(Path(path) / NAMESPACE / ".locks/drainer")
    if holder is None or not holder.pid:
        return 0
    try:
        return anonymous_bytes(holder.pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def loaded(restore: Any, tensors: int, size: int) -> dict[str, Any]:
    """Time *restore* into a state whose pages are there, look at its private memory, and compare what it brought."""
    state = gpt_state(tensors, size, fill=1.0)
    yardstick = Yardstick(state_bytes(state))
    copies = [yardstick.secs() for _ in range(3)]
    gc.collect()
    before = anonymous_bytes()
    with Peak(anonymous_bytes, every_secs=0.01) as peak:
        loaded = secs_of(lambda: restore(state))
    saved = gpt_state(tensors, size)
    if not all((a == b).all() for a, b in zip(tensors_of(state), tensors_of(saved), strict=True)):
        raise RuntimeError("what was restored is not what was saved")
    return {"copy": copies, "load": [loaded], "peak_bytes": [peak.highest - before]}
