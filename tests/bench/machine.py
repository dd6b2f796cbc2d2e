"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

__all__ = ["facts"]


def facts() -> dict[str, str]:
    """Return what a reader must know of this machine to compare."""
    return {
        "cpu": _line("/proc/cpuinfo", "model name"),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(_line('/proc/meminfo', 'MemTotal').split()[0]) / 1024**2:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "huge pages": f"{_chosen('enabled')}, of tmpfs {_chosen('shmem_enabled')}",
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def _line(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _chosen(name: str) -> str:
    try:
        text = Path(f"/sys/kernel/mm/transparent_hugepage/{name}").read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or text.strip()
