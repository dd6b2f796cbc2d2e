"""Whether the memory tier will fit, asked before the first save: better a sentence then than a full tmpfs later."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sm_tiered.errors import ConfigError, TierFullError, TierUnavailableError

__all__ = ["cgroup_room", "check_budget"]

_UNLIMITED = 1 << 60
"""cgroup v1 says "no limit" by a number above this."""


def check_budget(
    path: str | os.PathLike[str],
    need_bytes: int,
    budget_bytes: int | None,
    *,
    checkpoints: int,
    already_bytes: int = 0,
    cgroup_root: str = "/sys/fs/cgroup",
    cgroup_file: str = "/proc/self/cgroup",
) -> str | None:
    """Check that *need_bytes*, of which *already_bytes* are taken, find room; return a warning, or None.

    *checkpoints*: how many that is, for messages: more than are kept, for some are being written or on their way.

    The tmpfs and the explicit budget are hard limits. The container's memory limit is only warned of: how much of
    what is in use there could be reclaimed, nobody knows.

    Raises:
        ConfigError: *budget_bytes* is less than is needed.
        TierFullError: the tmpfs at *path* has not that much left.
    """
    if budget_bytes is not None and need_bytes > budget_bytes:
        raise ConfigError(
            f"memory tier: {_size(need_bytes)} are needed for {checkpoints} checkpoints, tiers.memory.budget is "
            f"{_size(budget_bytes)}",
            hint=f"Raise the budget to {_size(need_bytes)}, or lower keep.latest.",
        )
    more = max(0, need_bytes - already_bytes)
    free = _tmpfs_free(path)
    if free is not None and more > free:
        raise TierFullError(
            f"memory tier: {_size(more)} more are needed in {path}, {_size(free)} are free",
            hint="Enlarge it (`docker run --shm-size=…`; Kubernetes: an emptyDir with medium: Memory and a larger "
            "sizeLimit; `mount -o remount,size=…`), or lower keep.latest.",
            tier="memory",
        )
    room = cgroup_room(cgroup_root, cgroup_file)
    if room is not None and more > room:
        return (
            f"memory tier: {_size(more)} more are needed, the memory limit of this container leaves {_size(room)}: "
            "the kernel may kill the trainer. Raise the limit (`docker run --memory=…`; Kubernetes: "
            "resources.limits.memory), or lower keep.latest."
        )
    return None


def cgroup_room(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int | None:
    """Return how many bytes this process's memory cgroups (v2 or v1) leave, or None when they set no limit."""
    rooms = (_room(directory, *names) for directory, names in _cgroups(Path(root), Path(own)))
    return min((room for room in rooms if room is not None), default=None)


def _cgroups(root: Path, own: Path) -> Iterator[tuple[Path, tuple[str, str]]]:
    """Yield each directory whose limit binds this process, with the names of limit and usage there."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inside = base / path.lstrip("/")
        for directory in (inside, *inside.parents):
            yield directory, names
            if directory == base:
                break


def _room(directory: Path, limit_name: str, usage_name: str) -> int | None:
    try:
        limit = (directory / limit_name).read_text(encoding="ascii").strip()
        usage = int((directory / usage_name).read_text(encoding="ascii"))
        stat = (directory / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= _UNLIMITED:
        return None
    facts = dict(line.split(" ", 1) for line in stat.splitlines())
    # Cached files are given up under pressure; tmpfs pages are not among the inactive ones of files.
    cached = int(facts.get("total_inactive_file", facts.get("inactive_file", "0")))
    return max(0, int(limit) - usage + cached)


def _tmpfs_free(path: str | os.PathLike[str]) -> int | None:
    try:
        found = os.statvfs(path)
    except OSError as error:
        raise TierUnavailableError(f"{os.fspath(path)}: {error.strerror}", tier="memory") from error
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
