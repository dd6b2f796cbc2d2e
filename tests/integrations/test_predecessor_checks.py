"""What an import compared with checksums that the save left, and what it could not: both are said, in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.serialization import set_crc32_options

from sm_tiered.policies.keep import Latest
from sm_tiered.recipe import Recipe
from sm_tiered.settings import HyperPodSettings, S3Settings
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered_dcp.predecessor import adopt, import_step
from sm_tiered_dcp.predecessor.origins import open_daemon
from tests.integrations.predecessor_imports import cut, taken
from tests.integrations.predecessor_made import NAMESPACE, Made, directory, made, two_ranks
from tests.integrations.test_predecessor_cli import TO, Job, filled
from tests.unit.acting import call, document

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


@contextmanager
def without_crc() -> Generator[None, None, None]:
    """Let torch leave its checksums out, as who asks for speed does."""
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(True)


def half() -> Made:
    """A checkpoint of which the second rank's streams have no checksum."""
    with without_crc():
        bare = two_ranks(10)
    found = two_ranks(10)
    at = 0
    for index, info in bare.metadata.storage_data.items():
        if info.rank == 1:
            found.metadata.storage_data[index] = replace(info)
            at = max(at, info.offset + info.length)
    found.shards[1] = bare.shards[1]
    assert at == len(found.shards[1])
    return found


@pytest.fixture
def job(tmp_path: Path, make_s3_settings: Callable[..., S3Settings], s3_client: S3Client) -> Job:
    return Job(tmp_path, make_s3_settings(), s3_client)


def told(job: Job, *more: str) -> Any:
    base = ("import", job.recipe, "--from", job.base, "--from-namespace", NAMESPACE, *TO, "--json", *more)
    (found,) = document(call(*base))["checkpoints"]
    return found["compared"], found["unchecked"]


def test_all_that_has_a_checksum_is_compared_and_that_is_said(job: Job) -> None:
    job.put(10)
    assert "step 10: 4 of 4 values were compared with checksums that their save left" in job.run(*TO)
    again = job.run(*TO)
    assert "step 10: what is there was compared with our own digests; what it came from was not read again" in again
    assert told(job) == (0, [])


def test_what_has_no_checksum_is_said_by_name(job: Job) -> None:
    job.put(10, half())
    said = job.run(*TO)
    assert "step 10: 2 of 4 values were compared with checksums that their save left; 2 have none, so nothing " in said
    assert "so nothing tells whether they are damaged: b, note" in said


def test_programs_are_told_too(job: Job) -> None:
    job.put(10, half())
    assert told(job, "--dry-run") == (0, [])
    assert told(job) == (2, ["b", "note"])


def test_many_that_have_none_are_counted_and_some_of_them_named(job: Job) -> None:
    with without_crc():
        job.put(10, made({f"v{number:02d}": torch.ones(2) for number in range(12)}))
    said = job.run(*TO)
    assert "0 of 12 values were compared" in said
    assert "12 have none, so nothing tells whether they are damaged: v00, v01, v02, v03, v04, v05, v06, v07, …" in said


def test_a_dry_run_compares_nothing_and_says_nothing_of_it(job: Job) -> None:
    job.put(10)
    assert "compared" not in job.run(*TO, "--dry-run")


def test_what_an_earlier_try_had_brought_is_not_counted_again(tmp_path: Path) -> None:
    half().put(tmp_path / "base", 10)
    target = directory(tmp_path / "out", "ours")
    cut(tmp_path / "base", target)
    found = taken(tmp_path / "base", target)
    assert (found.compared, found.bare, found.unchecked) == (0, 2, ("b", "note"))


META = '{"checksum": "x", "algorithm": "md5"}'


@pytest.mark.parametrize("meta", [None, "", META])
def test_the_service_s_own_checksum_stands_for_every_byte_of_a_shard(meta: str | None, tmp_path: Path) -> None:
    with StandInDaemon() as daemon:
        with without_crc():
            filled(daemon, 10)
        if meta is not None:
            blobs = daemon.namespaces[NAMESPACE].blobs[1]
            blobs[10] = replace(blobs[10], meta=meta)
        settings = HyperPodSettings(name="cluster", save=None, keep=Latest(3), url=daemon.url)
        with closing(open_daemon(settings, NAMESPACE)) as place:
            found = import_step(place, place.listed()[0], directory(tmp_path / "out", "ours"), namespace="ours")
    assert (found.compared, found.unchecked) == ((4, ()) if meta is None else (2, ("b", "note")))


def test_on_the_fly_it_is_said_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with StandInDaemon() as daemon:
        with without_crc():
            filled(daemon, 10)
        blobs = daemon.namespaces[NAMESPACE].blobs[1]
        blobs[10] = replace(blobs[10], meta="")
        tiers = {
            "memory": {"kind": "memory", "path": str(tmp_path / "mem"), "allow_disk": True},
            "cluster": {"kind": "hyperpod", "url": daemon.url},
            "local": {"kind": "local", "path": str(tmp_path / "out"), "fsync": False},
        }
        with caplog.at_level(logging.INFO, logger="sm_tiered"):
            assert adopt(Recipe.parse({"version": 1, "namespace": NAMESPACE, "tiers": tiers}))
    assert "4 values are on local, read back; 2 were compared with checksums that their save left" in caplog.text
    assert "2 values have no checksum, so nothing tells whether they are damaged: b, note" in caplog.text
