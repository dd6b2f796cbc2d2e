"""What others do with the cluster's checkpoint service: the predecessor, and a bare socket.

The predecessor is imported in rooms only, from where `tests/predecessor.py` has put it; its log file is left out.
"""

from __future__ import annotations

import functools
import gc
import logging
import socket
import sys
import time
import warnings
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cluster_bench import NAMESPACE, SETTLE_SECS, forget, loaded
from states import gpt_state, state_bytes
from timing import Peak, Yardstick, anonymous_bytes, secs_of

__all__ = ["bare", "load", "memory", "saves"]

_MOST_KEPT = 6
_BUFFER_BYTES = 8 * 1024 * 1024


def _configured(package: str, url: str) -> Any:
    """Return the predecessor's configuration; from now on its client asks *url*, and it says errors only."""
    warnings.filterwarnings("ignore")
    sys.path.insert(0, package)
    from amzn_sagemaker_checkpointing.checkpointing.filesystem import storage_base  # type: ignore[import-not-found]
    from amzn_sagemaker_checkpointing.config import (  # type: ignore[import-not-found]
        in_memory_client,
        sagemaker_checkpoint_config,
    )
    from amzn_sagemaker_checkpointing.storage.clients.inmemory import (  # type: ignore[import-not-found]
        inmemory_client,
    )

    logger = logging.getLogger("predecessor")
    logger.setLevel(logging.ERROR)
    storage_base._TieredStorageBase._setup_logger = staticmethod(lambda *_, **__: logger)
    inmemory_client.InMemoryClientConfig = functools.partial(in_memory_client.InMemoryClientConfig, base_url=url)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return sagemaker_checkpoint_config.SageMakerCheckpointConfig(namespace=NAMESPACE, world_size=1)


def _begin(config: Any, state: dict[str, Any], step: int) -> Any:
    from amzn_sagemaker_checkpointing.checkpointing.filesystem.filesystem import (  # type: ignore[import-not-found]
        SageMakerTieredStorageWriter,
    )

    return dcp.async_save(state, storage_writer=SageMakerTieredStorageWriter(config, step=step))


def saves(package: str, url: str, tensors: int, size: int, runs: int) -> dict[str, Any]:
    """Save as the predecessor's documentation does; the first is not counted."""
    forget(url)
    config = _configured(package, url)
    state = gpt_state(tensors, size)
    yardstick = Yardstick(state_bytes(state))
    samples: dict[str, list[float]] = {"copy": [], "blocked": [], "total": []}
    for step in range(runs + 1):
        samples["copy"].append(yardstick.secs())
        begun = time.perf_counter()
        future = _begin(config, state, step)
        samples["blocked"].append(time.perf_counter() - begun)
        future.result()
        samples["total"].append(time.perf_counter() - begun)
        time.sleep(SETTLE_SECS)
    return {name: times[1:] for name, times in samples.items()}


def load(package: str, url: str, tensors: int, size: int) -> dict[str, Any]:
    """Load what `saves` left, as its documentation does."""
    config = _configured(package, url)
    from amzn_sagemaker_checkpointing.checkpointing.filesystem.filesystem import (  # type: ignore[import-not-found]
        SageMakerTieredStorageReader,
    )

    def restore(state: dict[str, Any]) -> None:
        dcp.load(state, storage_reader=SageMakerTieredStorageReader(config))

    return loaded(restore, tensors, size)


def memory(package: str, url: str, tensors: int, size: int, runs: int) -> dict[str, Any]:
    """Look how much private memory the trainer has more while it saves."""
    forget(url)
    config = _configured(package, url)
    state = gpt_state(tensors, size)
    gc.collect()
    before = anonymous_bytes()
    with Peak(anonymous_bytes) as peak:
        for step in range(runs):
            _begin(config, state, step).result()
    return {"peak_bytes": peak.highest - before}


def bare(url: str, size: int, runs: int) -> dict[str, Any]:
    """Send *size* bytes that lie in RAM to the service and receive them, through a socket: what the service takes.

    Before that it is given as many as anybody leaves there at once, so that it has had all its memory before.
    """
    forget(url)
    urlopen(
        Request(f"{url}/v1/cp/namespaces/{NAMESPACE}?num_ranks=2&steps_retained={_MOST_KEPT}", method="POST")
    ).close()
    yardstick, data, buffer = Yardstick(size), bytearray(size), memoryview(bytearray(_BUFFER_BYTES))
    samples: dict[str, list[float]] = {"copy": [], "total": [], "load": []}
    for step in range(_MOST_KEPT):
        _exchange(url, "POST", step, data, buffer)
    for step in range(_MOST_KEPT, _MOST_KEPT + runs + 1):
        samples["copy"].append(yardstick.secs())
        for name, method, body in (("total", "POST", data), ("load", "GET", b"")):
            samples[name].append(secs_of(functools.partial(_exchange, url, method, step, body, buffer)))
            time.sleep(SETTLE_SECS)
    forget(url)
    return {name: times[1:] for name, times in samples.items()}


def _exchange(url: str, method: str, step: int, body: bytes | bytearray, buffer: memoryview) -> None:
    parts = urlsplit(url)
    head = (
        f"{method} /v1/cp/checkpoints/{NAMESPACE}/0/{step} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection((parts.hostname or "", parts.port or 80)) as connection:
        connection.sendall(head.encode())
        connection.sendall(body)
        received = connection.recv_into(buffer)
        if b" 200 " not in bytes(buffer[:64]):
            raise RuntimeError(f"the service answered {bytes(buffer[:received])!r}")
        while connection.recv_into(buffer):
            continue
