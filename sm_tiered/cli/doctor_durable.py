"""What durable tiers allow, found out by doing it: small probes that are taken away again."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from sm_tiered.cli.findings import Finding, existing, failed, missing_dirs, mount_of, ok, warn
from sm_tiered.cli.output import age, size
from sm_tiered.errors import TieredError, TierError
from sm_tiered.settings import LocalSettings, S3Settings
from sm_tiered.tiers.conditions import check_conditions
from sm_tiered.tiers.local import LocalTier

__all__ = ["local_findings", "s3_findings"]

_NETWORK = frozenset(
    {"nfs", "nfs4", "lustre", "ceph", "gpfs", "glusterfs", "beegfs", "cifs", "smb3", "9p", "fuse.sshfs", "efs", "afs"}
)
_SKEW_WARN_SECS, _SKEW_FAIL_SECS = 5.0, 300.0
_PATIENCE_SECS = 10.0
_PROBE_BYTES = 1024 * 1024


# ---- a directory


def local_findings(settings: LocalSettings, namespace: str) -> Iterator[Finding]:
    """Look at a directory tier."""
    name, path = settings.name, Path(settings.path)
    mount = mount_of(path)
    if mount is not None:
        shared = mount.kind in _NETWORK or mount.kind.startswith("fuse.")
        who = "a network file system" if shared else "this node's: right where all ranks are on this node"
        yield ok(name, "file system", f"{path} is on {mount.kind} ({mount.point}), {who}")
        if mount.kind in ("tmpfs", "ramfs"):
            fix = "Set its path to a disk or a network file system."
            yield warn(name, "durable", f"{path} is in memory: it does not outlive the node", fix)
    facts = os.statvfs(existing(path))
    yield ok(name, "room", f"{size(facts.f_bavail * facts.f_frsize)} of {size(facts.f_blocks * facts.f_frsize)} free")
    with _clean_again(Path(settings.path) / namespace):
        yield from _written(LocalTier(settings, namespace), settings)


def _written(tier: LocalTier, settings: LocalSettings) -> Iterator[Finding]:
    name, key = settings.name, f".doctor-{secrets.token_hex(8)}"
    try:
        begun = time.monotonic()
        tier.put(key, secrets.token_bytes(_PROBE_BYTES))
        secs = time.monotonic() - begun
        synced = "written and synced" if settings.fsync else "written (fsync is off)"
        yield ok(name, "writing", f"{size(_PROBE_BYTES)} {synced} in {1000 * secs:.0f} ms")
        tier.get(key)
    except TierError as error:
        yield failed(name, "writing", error)
        with suppress(TierError):
            tier.delete([key])
        return
    try:
        # Exclusive links decide races, and a lock guards replacing.
        check_conditions(tier, f"{key}-link")
        version = tier.get(f"{key}-link").version
        tier.replace(f"{key}-link", b"mine", version=version)
        yield ok(name, "exclusive writes", "hard links and locks work: of two commits one wins")
    except TierError as error:
        fix = "Commits need link(2) that fails where the name stands; use a file system that has it."
        yield failed(name, "exclusive writes", error, fix)
    try:
        tier.delete([key, f"{key}-link"])
        yield ok(name, "deleting", "what was written is gone again")
    except TierError as error:
        yield failed(name, "deleting", error)


@contextmanager
def _clean_again(root: Path) -> Generator[None, None, None]:
    """Take away the directories that the block makes, if they are empty."""
    made = missing_dirs([root])
    try:
        yield
    finally:
        if root in made:
            # Where the namespace was there before, this lock may be somebody's.
            with suppress(OSError):
                os.unlink(root / ".replace")
        for directory in made:
            with suppress(OSError):
                os.rmdir(directory)


# ---- S3


def s3_findings(settings: S3Settings, namespace: str) -> Iterator[Finding]:
    """Look at an S3 tier."""
    from sm_tiered.tiers.s3_probe import S3Probe, credentials_of

    name = settings.name
    try:
        found = credentials_of(settings.profile)
    except TieredError as error:
        yield failed(name, "credentials", error)
        return
    if found.method is None:
        fix = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the tier's profile, or give a role."
        yield failed(name, "credentials", f"none found; tried {', '.join(found.tried)}", fix)
        return
    yield ok(name, "credentials", f"from {found.method}")
    hasty = replace(
        settings,
        request_timeout_secs=min(settings.request_timeout_secs, _PATIENCE_SECS),
        retry_deadline_secs=min(settings.retry_deadline_secs, _PATIENCE_SECS),
    )
    try:
        probe = S3Probe(hasty, namespace)
    except TieredError as error:
        yield failed(name, "endpoint", error)
        return
    try:
        begun = time.time()
        for each in probe.run():
            what = f"{each.permission}{': ' if each.permission and each.note else ''}{each.note}"
            if each.error is not None:
                fix = each.error.hint or (f"Allow {each.permission}." if each.permission else None)
                yield failed(name, each.operation, each.error, fix)
            else:
                yield (ok if each.tried else warn)(name, each.operation, what)
        yield from _clock(name, probe.server_time, begun)
        if probe.old_uploads:
            fix = "They cost money; the drainer aborts them after its next commit, a lifecycle rule does too."
            yield warn(name, "unfinished uploads", f"{probe.old_uploads} older than a day", fix)
    finally:
        probe.close()


def _clock(name: str, server_time: float | None, begun: float) -> Iterator[Finding]:
    if server_time is None:
        return
    # S3 tells whole seconds, and its answer came after *begun*.
    skew = server_time - begun
    if abs(skew) < _SKEW_WARN_SECS:
        yield ok(name, "clock", "agrees with S3's to a few seconds")
        return
    say = failed if abs(skew) >= _SKEW_FAIL_SECS else warn
    ahead = "behind" if skew > 0 else "ahead of"
    told = f"this machine's is {age(abs(skew))} {ahead} S3's, which refuses requests from 15 min on"
    yield say(name, "clock", told, "Set it: chrony or ntpd.")
