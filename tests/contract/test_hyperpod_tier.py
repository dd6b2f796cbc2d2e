"""What of the contract a tier of shares keeps, over the stand-in and over the predecessor's own test server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar
from uuid import uuid4

import pytest

from sm_tiered import checksum, layout
from sm_tiered.errors import CorruptPartError, KeyNotFoundError
from sm_tiered.inventory import list_checkpoints, read_attempts, read_holding
from sm_tiered.manifest import attempt_record_to_json, compose_manifest, manifest_to_json, record_to_json
from sm_tiered.policies.keep import Latest
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId, Part, Record
from sm_tiered.settings import HyperPodSettings
from sm_tiered.testing.contract import MIB, TierContract, chunked, payload
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.tiers import Tier, open_tier
from sm_tiered.tiers.base import Blob, Chunks
from sm_tiered.tiers.hyperpod import HyperPodTier
from sm_tiered.tiers.retrying_shares import RetryingShareTier
from sm_tiered.tiers.shares import Share
from tests.predecessor import Server, predecessor_server

__all__ = ["predecessor_server"]

ATTEMPT = Attempt(ordinal=1, utc_secs=1_700_000_000, nonce="0123abcd")


def _settings(url: str) -> HyperPodSettings:
    return HyperPodSettings(name="cluster", save=None, keep=Latest(2), url=url)


class PartsAsShares(RetryingShareTier):
    """Writes each part as a checkpoint of its own, of one rank, so that the contract can read it under its key."""

    def __init__(self, settings: HyperPodSettings, namespace: str) -> None:
        super().__init__(HyperPodTier(settings, namespace))
        self.namespace = namespace
        self._steps: dict[str, int] = {}

    def put_part(self, key: str, chunks: Chunks, size: int) -> None:
        checkpoint = CheckpointId(attempt=ATTEMPT, step=self._steps.setdefault(key, len(self._steps)))
        data = b"".join(map(bytes, chunks()))
        part = Part(name=layout.part_name(0, 0), size=size, chunks=checksum.digest_chunks(memoryview(data)))
        record = Record(namespace=self.namespace, checkpoint=checkpoint, rank=0, world=1, saved_at=1.0, parts=(part,))
        parts = ((part, chunks),)
        self.put_share(Share(checkpoint=checkpoint, rank=0, world=1, record=record_to_json(record), parts=parts))
        if len(self._steps) > 4:  # there is no room for more
            self.drop(CheckpointId(attempt=ATTEMPT, step=len(self._steps) - 4))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        super().read_into(self._key(key), offset, buffer)

    def get(self, key: str, *, max_bytes: int = 2**28) -> Blob:
        return super().get(self._key(key), max_bytes=max_bytes)

    def _key(self, key: str) -> str:
        if key not in self._steps:
            return key
        checkpoint = CheckpointId(attempt=ATTEMPT, step=self._steps[key])
        return layout.in_dir(checkpoint, layout.part_name(0, 0))


class ReadContract(TierContract):
    """The contract without what a tier of shares refuses: single keys written, replaced or deleted."""

    refused: ClassVar[None] = None
    test_what_was_put_is_what_is_got = refused  # type: ignore[assignment]
    test_put_takes_the_place_of_what_stood_there = refused  # type: ignore[assignment]
    test_getting_what_is_not_there_says_so = refused  # type: ignore[assignment]
    test_get_refuses_more_than_max_bytes = refused  # type: ignore[assignment]
    test_a_key_that_begins_with_a_dot_is_a_key = refused  # type: ignore[assignment]
    test_put_if_absent_writes_once = refused  # type: ignore[assignment]
    test_put_if_absent_may_come_again_after_a_delete = refused  # type: ignore[assignment]
    test_of_racing_put_if_absent_exactly_one_wins = refused  # type: ignore[assignment]
    test_replace_writes_over_the_version_that_was_read = refused  # type: ignore[assignment]
    test_replace_refuses_another_version = refused  # type: ignore[assignment]
    test_a_version_is_used_up_by_replace = refused  # type: ignore[assignment]
    test_replace_needs_something_to_replace = refused  # type: ignore[assignment]
    test_a_listing_has_keys_sizes_and_times_in_key_order = refused  # type: ignore[assignment]
    test_a_prefix_is_of_the_key_not_of_its_directories = refused  # type: ignore[assignment]
    test_list_dirs_names_only_what_has_keys_below = refused  # type: ignore[assignment]
    test_what_others_wrote_is_seen = refused  # type: ignore[assignment]
    test_an_exception_out_of_the_source_leaves_nothing = refused  # type: ignore[assignment]
    test_a_source_of_another_length_leaves_nothing = refused  # type: ignore[assignment]
    test_delete_takes_away_what_is_named_and_nothing_else = refused  # type: ignore[assignment]
    test_directories_left_empty_disappear = refused  # type: ignore[assignment]
    test_probe_passes_and_leaves_nothing = refused  # type: ignore[assignment]
    test_close_can_be_called_many_times = refused  # type: ignore[assignment]

    at: str
    """Where the service listens."""

    @pytest.fixture
    def tier(self, url: str) -> Iterator[Tier]:
        self.at = url
        tier = PartsAsShares(_settings(url), f"run-{uuid4().hex[:12]}")
        yield tier
        tier.close()

    def test_nothing_is_left_of_a_probe(self, tier: Tier) -> None:
        tier.probe()
        assert tier.list("") == []

    def test_whole_checkpoints_are_told_and_dropped(self, tier: PartsAsShares) -> None:
        """By one tier written, by another read."""
        checkpoint = CheckpointId(attempt=ATTEMPT, step=7)
        records = self._save(tier, checkpoint)
        other = open_tier(_settings(self.at), tier.namespace)
        assert list_checkpoints(other) == [checkpoint]
        held = read_holding(other, checkpoint, durable=True)
        assert (held.problem, held.records) == (None, records)
        manifest = layout.in_dir(checkpoint, layout.MANIFEST)
        assert other.get(manifest).data == manifest_to_json(compose_manifest(records))
        buffer = bytearray(1000)
        other.read_into(layout.in_dir(checkpoint, "__2_0.distcp"), 2_000_000, memoryview(buffer))
        assert buffer == payload(3_000_002, 2)[2_000_000:2_001_000]
        tier.drop(checkpoint)
        with pytest.raises(KeyNotFoundError):
            other.get(manifest)
        assert list_checkpoints(other) == []
        other.close()

    def test_a_lower_step_after_a_rollback_is_the_newest_and_stays(self, tier: PartsAsShares) -> None:
        for step in (100, 200, 300, 400):
            self._save(tier, CheckpointId(attempt=ATTEMPT, step=step))
        chosen = CheckpointId(attempt=ATTEMPT, step=100)
        later = Attempt(ordinal=2, utc_secs=1_700_000_001, nonce="89abcdef")
        record = AttemptRecord(namespace=tier.namespace, attempt=later, parent=chosen, chosen=True)
        tier.put_if_absent(layout.attempt_key(later), attempt_record_to_json(record))
        newest = CheckpointId(attempt=later, step=110)
        self._save(tier, newest)
        other = open_tier(_settings(self.at), tier.namespace)
        assert list_checkpoints(other)[-1] == newest
        assert read_holding(other, newest, durable=True).problem is None
        assert read_holding(other, chosen, durable=True).problem is None
        assert read_attempts(other) == ({later: record}, set())
        other.close()

    def test_a_source_that_changes_while_it_is_sent_leaves_nothing(self, tier: PartsAsShares) -> None:
        """It is asked twice, and the first time all was well."""
        checkpoint, asked = CheckpointId(attempt=ATTEMPT, step=9), list[int]()
        data = payload(9 * MIB)
        part = Part(name="__0_0.distcp", size=len(data), chunks=checksum.digest_chunks(memoryview(data)))
        record = Record(namespace=tier.namespace, checkpoint=checkpoint, rank=0, world=1, saved_at=1.0, parts=(part,))

        def turning() -> Iterator[memoryview]:
            asked.append(1)
            yield from chunked(data[:-1])()
            yield memoryview(b"x" if len(asked) == 2 else data[-1:])

        made = Share(checkpoint=checkpoint, rank=0, world=1, record=record_to_json(record), parts=((part, turning),))
        with pytest.raises(CorruptPartError):
            tier.put_share(made)
        other = open_tier(_settings(self.at), tier.namespace)
        assert other.list("") == []
        assert len(asked) == 2
        other.close()

    def _save(self, tier: PartsAsShares, checkpoint: CheckpointId) -> dict[int, bytes]:
        """Write a checkpoint of three ranks; return its records."""
        records: dict[int, bytes] = {}
        for rank in range(3):
            data = payload(3_000_000 + rank, rank)
            part = Part(name=layout.part_name(rank, 0), size=len(data), chunks=checksum.digest_chunks(memoryview(data)))
            made = Record(
                namespace=tier.namespace, checkpoint=checkpoint, rank=rank, world=3, saved_at=1.0, parts=(part,)
            )
            records[rank] = record_to_json(made)
            parts = ((part, chunked(data, 1_000_000, 7)),)
            tier.put_share(Share(checkpoint=checkpoint, rank=rank, world=3, record=records[rank], parts=parts))
        return records


class TestOverTheStandIn(ReadContract):
    @pytest.fixture
    def url(self) -> Iterator[str]:
        with StandInDaemon() as daemon:
            yield daemon.url


class TestOverThePredecessorsServer(ReadContract):
    @pytest.fixture
    def url(self, predecessor_server: Server) -> str:  # noqa: F811 - pytest's way to use a fixture
        return predecessor_server.url
