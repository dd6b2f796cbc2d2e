"""A stand-in for the in-memory checkpoint service of a HyperPod cluster, on loopback: for tests and for laptops.

``python -m sm_tiered.testing.daemon --port 9200`` prints its address and serves until SIGTERM or Ctrl-C. It keeps what
is put in its own RAM, drops the lowest step of a rank that has too many, and has no authentication, as the service.
What goes wrong is set with `StandInDaemon.restart`, see `sm_tiered.testing.daemon_faults`.
"""

from __future__ import annotations

import argparse
import ipaddress
import signal
import sys
import threading
from dataclasses import dataclass

from sm_tiered.testing.daemon_faults import DaemonFault, DaemonRequest
from sm_tiered.testing.daemon_http import DaemonServer, Service
from sm_tiered.testing.daemon_memory import StoredNamespace, shard_meta

__all__ = ["DaemonFault", "DaemonRequest", "StandInDaemon", "StoredNamespace", "main", "shard_meta"]

SMALL_STEPS = 2**31 - 1
"""The highest step of a service that counts steps in 32 bits: for ``memory.max_step``."""


@dataclass(kw_only=True)
class StandInDaemon(Service):
    """The service: a context manager that listens at `url`. What it keeps outlives leaving it and entering it again.

    Raises:
        ValueError: *host* is not the loopback of this machine.
    """

    _server: DaemonServer | None = None

    def __post_init__(self) -> None:
        if not _is_loopback(self.host):
            raise ValueError(f"host={self.host!r} is not loopback; use '127.0.0.1': there is no authentication here")

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def namespaces(self) -> dict[str, StoredNamespace]:
        """What it keeps, live."""
        return self.memory.namespaces

    @property
    def dropped(self) -> list[tuple[str, int, int]]:
        """What its own retention dropped so far: namespace, rank, step."""
        return self.memory.dropped

    @property
    def fired(self) -> list[DaemonRequest]:
        """The requests that a fault struck."""
        return [request for request in self.requests if request.struck]

    def restart(self, *faults: DaemonFault) -> None:
        """Forget the requests so far, and let *faults* strike from now on, counted from 1; what is kept stays."""
        self.requests.clear()
        self.faults.set(faults)

    def flip(self, namespace: str, rank: int, step: int, bit: int) -> None:
        """Change one bit of a blob where it is kept; its ``Shard-Meta`` stays."""
        self.namespaces[namespace].blobs[rank][step].data[bit // 8] ^= 1 << bit % 8

    def __enter__(self) -> StandInDaemon:
        self._server = DaemonServer(self)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.end()
            self._server = None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(
        prog="python -m sm_tiered.testing.daemon",
        description="A stand-in for the in-memory checkpoint service of a HyperPod cluster.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="an address of this machine's loopback (%(default)s)")
    parser.add_argument("--port", type=int, default=9200, help="0: any that is free (%(default)s)")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="how long every request waits")
    parser.add_argument("--discard", action="store_true", help="keep only the first MiB of a body, to measure clients")
    parser.add_argument("--small-steps", action="store_true", help="refuse steps of 2**31 and more")
    given = parser.parse_args()
    # Blocked before any thread exists, the signals come to nobody but sigwait.
    awaited = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    try:
        daemon = StandInDaemon(
            host=given.host, port=given.port, latency_secs=given.latency_ms / 1000, discard=given.discard
        )
        if given.small_steps:
            daemon.memory.max_step = SMALL_STEPS
        with daemon:
            sys.stdout.write(f"{daemon.url}\n")
            sys.stdout.flush()
            signal.sigwait(awaited)
    except (ValueError, OSError, OverflowError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
