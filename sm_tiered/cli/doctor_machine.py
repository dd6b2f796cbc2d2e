"""What the machine gives: memory on tmpfs, huge pages, limits, versions, and who works in the memory tier."""

from __future__ import annotations

import os
import re
import resource
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from sm_tiered import layout
from sm_tiered.cli.findings import Finding, existing, failed, mount_of, ok, warn
from sm_tiered.cli.output import age, size
from sm_tiered.errors import TierError
from sm_tiered.locks import probe
from sm_tiered.queue import Queue
from sm_tiered.settings import MemorySettings
from sm_tiered.tiers.budget import cgroup_room
from sm_tiered.tiers.files import DirectoryTier

__all__ = ["job_findings", "machine_findings", "memory_findings", "version_findings"]

_SHMEM_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_PACKAGE = "sm-tiered"
_ALSO = ("torch", "boto3", "s3torchconnector", "pydantic", "xxhash")
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([^;]*)(;.*)?", re.ASCII)
_BOUND = re.compile(r"(>=|<)\s*(\d+(?:\.\d+)*)", re.ASCII)
_TRAINER = re.compile(r"trainer-([A-Za-z0-9_-]{1,100})-(\d{1,6})", re.ASCII)
_SHM = "Enlarge it: `docker run --shm-size=…`; Kubernetes: an emptyDir with medium: Memory and a larger sizeLimit."


# ---- memory


def memory_findings(settings: MemorySettings, slots: int, node_bytes: int | None) -> Iterator[Finding]:
    """Look at the memory tier's place, which must hold *slots* checkpoints.

    *node_bytes*: what one takes there, where that is known.
    """
    name, path = settings.name, Path(settings.path)
    mount = mount_of(path)
    if mount is None:
        yield warn(name, "file system", f"the kernel does not tell what {path} is on")
    elif mount.kind in ("tmpfs", "ramfs"):
        yield ok(name, "file system", f"{path} is in memory ({mount.kind} on {mount.point})")
    elif settings.allow_disk:
        yield warn(name, "file system", f"{path} is on a disk ({mount.kind}), as allow_disk says", "For tests only.")
    else:
        fix = "Use a path below /dev/shm, or mount a tmpfs there."
        yield failed(name, "file system", f"{path} is on no tmpfs ({mount.kind} on {mount.point})", fix)
    yield _private(name, path)
    yield _room(settings, path, slots, node_bytes)
    if mount is not None and mount.kind == "tmpfs":
        yield _huge(name, mount.point, mount.option("huge"))
    yield _locked(name, node_bytes)


def _private(name: str, path: Path) -> Finding:
    check = "owner and mode"
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        place = existing(path)
        if os.access(place, os.W_OK):
            return ok(name, check, f"{path} is not there yet; the first launch makes it")
        return failed(name, check, f"{path} can't be made: {place} is not writable", "Give the tier another path.")
    except OSError as error:
        return failed(name, check, f"{path}: {error.strerror}")
    fix = f"Remove it, or set tiers.{name}.path to a directory of your own with mode 0700."
    if not stat.S_ISDIR(facts.st_mode):
        return failed(name, check, f"{path} is no directory", fix)
    if facts.st_uid != os.geteuid():
        return failed(name, check, f"{path} belongs to uid {facts.st_uid}, this is uid {os.geteuid()}", fix)
    if facts.st_mode & 0o077:
        return failed(name, check, f"{path} has mode {stat.S_IMODE(facts.st_mode):04o}: others can get in", fix)
    return ok(name, check, f"{path} is this user's alone")


def _room(settings: MemorySettings, path: Path, slots: int, node_bytes: int | None) -> Finding:
    facts = os.statvfs(existing(path))
    whole, free = facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize
    name, cgroup = settings.name, cgroup_room()
    told = f"{size(free)} of {size(whole)} free"
    told += "" if settings.budget_bytes is None else f", budget {size(settings.budget_bytes)}"
    told += ", no cgroup limit" if cgroup is None else f", the cgroup leaves {size(cgroup)}"
    if node_bytes is None:
        return ok(name, "room", f"{told}; how large a checkpoint is here is not known yet")
    need = slots * node_bytes
    more = slots - settings.generations
    told = f"{size(need)} are needed (keep.latest + {more} = {slots} × {size(node_bytes)}): {told}"
    if settings.budget_bytes is not None and need > settings.budget_bytes:
        return failed(name, "room", told, f"Raise budget to {size(need)}, or lower keep.latest.")
    if whole and need > whole:
        return failed(name, "room", told, f"{_SHM} Or lower keep.latest.")
    # What stands there of this very tier is counted as room: it is recycled.
    if cgroup is not None and need > cgroup + _taken(path):
        return warn(name, "room", told, "Raise the container's memory limit, or lower keep.latest.")
    return ok(name, "room", told)


def _taken(path: Path) -> int:
    total = 0
    for directory, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
    return total


def _huge(name: str, point: str, option: str | None) -> Finding:
    try:
        words = _SHMEM_HUGE.read_text(encoding="ascii")
    except OSError:
        words = ""
    system = next(iter(re.findall(r"\[(\w+)\]", words)), "unknown")
    chosen = option or ("force" if system == "force" else "never")
    if chosen in ("always", "within_size", "force"):
        return ok(name, "huge pages", f"{point} uses them (huge={chosen})")
    better = f"`mount -o remount,huge=within_size {point}` makes first saves and restores faster."
    return ok(name, "huge pages", f"{point} has huge={chosen}, the system's shmem_enabled is {system}", better)


def _locked(name: str, node_bytes: int | None) -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    told = "unlimited" if limit == resource.RLIM_INFINITY else size(limit)
    gpus = any(os.path.exists(f"/dev/{device}") for device in ("nvidia0", "nvidiactl", "kfd"))
    if gpus and limit != resource.RLIM_INFINITY and (node_bytes is None or limit < node_bytes):
        fix = "`ulimit -l unlimited` (docker: --ulimit memlock=-1): pinned memory copies from GPUs faster."
        return warn(name, "locked memory", f"the limit is {told}", fix)
    return ok(name, "locked memory", f"the limit is {told}{'' if gpus else '; there is no GPU that would need it'}")


# ---- who works there


def job_findings(settings: MemorySettings, namespace: str) -> Iterator[Finding]:
    """Look at the trainers, the drainer and the queue of *namespace* on this node."""
    root, name = Path(settings.path) / namespace, settings.name
    locks = root / layout.LOCKS
    try:
        names = sorted(os.listdir(locks))
    except FileNotFoundError:
        yield ok(name, "job", f"no job of {namespace} has run here")
        return
    except OSError as error:
        yield failed(name, "job", f"{locks}: {error.strerror}")
        return
    trainers = [lock for lock in names if _TRAINER.fullmatch(lock)]
    alive = {lock: holder for lock in trainers if (holder := probe(locks / lock)) is not None}
    if alive:
        pids = ", ".join(str(holder.pid) for holder in list(alive.values())[:8])
        yield ok(name, "trainers", f"{len(alive)} alive here (pid {pids}{', …' if len(alive) > 8 else ''})")
    dead = len(trainers) - len(alive)
    if dead:
        yield warn(name, "trainers", f"{dead} ended without letting go", "Nothing to do: the next launch clears that.")
    yield from _queue(DirectoryTier(name=name, base=settings.path, namespace=namespace, fsync=False), locks)


def _queue(memory: DirectoryTier, locks: Path) -> Iterator[Finding]:
    name, drainer = memory.name, probe(locks / "drainer")
    try:
        entries = Queue(memory).entries()
    except TierError as error:
        yield failed(name, "drainer", error)
        return
    what = f"{len(entries)} {'share' if len(entries) == 1 else 'shares'} of checkpoints queued"
    if drainer is not None:
        yield ok(name, "drainer", f"alive (pid {drainer.pid}), {what}")
    elif entries:
        fix = "`sm-tiered drain RECIPE` finishes them; so does the next save."
        yield warn(name, "drainer", f"{what}, and no drainer is alive", fix)
    else:
        yield ok(name, "drainer", "nothing is queued; the next durable save starts it")
    late = [entry for entry in entries if entry.deadline_at < time.time()]
    if late:
        oldest = age(time.time() - min(entry.deadline_at for entry in late))
        fix = "See what its tier says below, and `.queue/drainer.log` in the namespace's directory."
        yield warn(name, "queue", f"{len(late)} are past commit_deadline_secs, by up to {oldest}", fix)


# ---- machine and versions


def machine_findings() -> Iterator[Finding]:
    """Look at what no recipe is needed for."""
    facts = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    if facts is None:
        yield failed("machine", "/dev/shm", "there is none", "Mount a tmpfs: the memory tier needs one.")
    else:
        free, whole = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
        small = whole <= 64 * 2**20
        say = warn if small else ok
        yield say("machine", "/dev/shm", f"{size(free)} of {size(whole)} free", _SHM if small else None)
    room = cgroup_room()
    yield ok("machine", "cgroup", "no memory limit" if room is None else f"leaves {size(room)}")


def version_findings() -> Iterator[Finding]:
    """Look at what is installed, without importing it."""
    yield ok("versions", "python", sys.version.split(" ", 1)[0])
    try:
        own, required = metadata.version(_PACKAGE), metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        yield warn("versions", _PACKAGE, "it runs from a directory and is not installed", "pip install -e .")
        own, required = None, list(_ALSO)
    if own is not None:
        yield ok("versions", _PACKAGE, own)
    for line in required:
        found = _REQUIREMENT.fullmatch(line.strip())
        if found is not None and "extra" not in (found[3] or ""):
            yield _installed(found[1], found[2].strip(" ()"))


def _installed(name: str, bounds: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return failed("versions", name, "it is not installed", f"pip install '{name}{bounds}'")
    here = _numbers(version)
    for sign, bound in _BOUND.findall(bounds):
        if (here < _numbers(bound)) if sign == ">=" else (here >= _numbers(bound)):
            return failed("versions", name, f"{version} is not {bounds}", f"pip install '{name}{bounds}'")
    return ok("versions", name, version)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
