"""What was asked of the stand-in for the HyperPod service, as short texts."""

from __future__ import annotations

from sm_tiered.testing.daemon import StandInDaemon


def asked(daemon: StandInDaemon) -> list[str]:
    """Return every request so far: its method, and the slot and the wire step, or what else it was about."""
    found: list[str] = []
    for request in daemon.requests:
        path = request.path.partition("?")[0].split("/")
        what = "/".join(path[-2:]) if "checkpoints" in path and path[-1] != "latest" else path[-1]
        found.append(f"{request.method} {'namespace' if 'namespaces' in path else what}")
    return found


def about(daemon: StandInDaemon, method: str, rank: int | None = None) -> list[str]:
    """Return the requests about blobs, of *rank*'s slot or of all, in order."""
    slots = [text for text in asked(daemon) if "/" in text and text.startswith(f"{method} ")]
    return [text for text in slots if rank is None or text.startswith(f"{method} {rank}/")]
