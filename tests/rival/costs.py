"""Defects 22 and 23 and the endpoint: what a save costs, leaves behind, and where it goes."""

from __future__ import annotations

import os
from typing import Any

from sm_tiered.testing.proxy import FaultProxy
from tests.rival.rig import Rig
from tests.rival.sides import Side, library, save, state_of

VIEWS, VIEW_FLOATS, SAVES = 20, 12_500, 40


def _save_views(rank: int, side: Side) -> None:
    import torch

    lib = library(side)
    base = torch.arange(float(VIEWS * VIEW_FLOATS))
    views = {f"v{index}": base[index * VIEW_FLOATS :][:VIEW_FLOATS] for index in range(VIEWS)}
    save(lib, lib.configure(), 10, views)


def views(rig: Rig) -> str:
    """d16: a state of views: 20 parts of one tensor of a million bytes."""
    rig.run(rig.side(), _save_views)
    name, step = rig.blobs(0)[-1]
    stored = rig.daemon.namespaces[name].blobs[0][step].size
    return f"{stored / (VIEWS * VIEW_FLOATS * 4):.1f} times the data"


def _sockets() -> int:
    found = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{entry}").startswith("socket:")
        except OSError:
            continue  # it was the listing's own
    return found


def _save_often(rank: int, side: Side) -> int:
    """Return how many sockets are open after that many saves more than after the first, with the last 20 writers."""
    import torch.distributed.checkpoint as dcp

    lib = library(side)
    config, writers, first = lib.configure(), list[Any](), 0
    for step in range(SAVES):
        writer = lib.writer(checkpoint_config=config, step=step)
        dcp.save(state_of(float(step)), storage_writer=writer)
        writers = [*writers[-19:], writer]
        if step == 0:
            first = _sockets()
    return _sockets() - first


def leaked_sockets(rig: Rig) -> str:
    """d21: 40 saves, of which the script still has 20 writers."""
    (more,) = rig.run(rig.side(), _save_often)
    return f"{more} more sockets after {SAVES} saves"


def _save_to_s3(rank: int, side: Side, other: str) -> str:
    lib = library(side)
    os.environ["AWS_ENDPOINT_URL_S3"] = other
    try:
        save(lib, lib.configure(save_to_s3=True), 10, state_of(1.0))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def two_endpoints(rig: Rig) -> str:
    """d23: AWS_ENDPOINT_URL_S3 names S3's endpoint, AWS_ENDPOINT_URL that of everything else."""
    side = rig.side(s3=True)
    rig.proxy.restart()
    with FaultProxy(rig.proxy.upstream) as meant:
        rig.run(side, _save_to_s3, meant.url)
    astray = [request for request in rig.proxy.requests if request.method in ("PUT", "POST")]
    assert meant.requests
    return "the save goes to AWS_ENDPOINT_URL" if astray else "the save goes to AWS_ENDPOINT_URL_S3"
