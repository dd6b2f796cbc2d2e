"""The tests that every tier passes, and every wrapper around one: a pytest mix-in, for third parties' tiers too.

::

    class TestMyTier(TierContract):
        @pytest.fixture
        def tier(self, tmp_path):
            return MyTier(tmp_path)

Override `raw_read`, `raw_keys` and `raw_write` to look past the tier: the tests then see what it might hide.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from sm_tiered.errors import CorruptPartError, KeyExistsError, KeyNotFoundError
from sm_tiered.tiers.base import Blob, Entry, Tier

__all__ = ["TierContract", "chunked", "payload"]

MIB = 1024 * 1024


def payload(size: int, seed: int = 0) -> bytes:
    """Return *size* bytes that do not repeat and are the same at every call."""
    return random.Random(seed).randbytes(size)


def chunked(data: bytes, *lengths: int) -> Callable[[], Iterator[memoryview]]:
    """Return a source of *data* in chunks of these lengths in turn, each made useless once the next is asked for."""

    def chunks() -> Iterator[memoryview]:
        at, turn = 0, 0
        while at < len(data):
            length = (lengths or (MIB,))[turn % len(lengths or (MIB,))]
            piece = bytearray(data[at : at + length])
            yield memoryview(piece)
            piece[:] = b"\xee" * len(piece)  # whoever kept the view instead of its bytes stores this
            at, turn = at + length, turn + 1

    return chunks


class TierContract:
    """Subclass it, name the subclass ``Test…``, and give it a fixture ``tier`` that returns an empty tier."""

    part_sizes: tuple[int, ...] = (0, 1, 1000, MIB, MIB + 1, 9 * MIB + 7)

    def raw_read(self, tier: Tier, key: str) -> bytes | None:
        """Return what is stored under *key*, or None; past the tier where that can be done."""
        try:
            return tier.get(key).data
        except KeyNotFoundError:
            return None

    def raw_keys(self, tier: Tier) -> list[str]:
        """Return the keys of all objects, sorted; past the tier where that can be done."""
        return [entry.key for entry in tier.list("")]

    def raw_write(self, tier: Tier, key: str, data: bytes) -> None:
        """Store *data* under *key*; past the tier where that can be done."""
        tier.put(key, data)

    # Small objects

    def test_it_is_a_tier_with_a_name(self, tier: Tier) -> None:
        assert isinstance(tier, Tier)
        assert tier.name

    @pytest.mark.parametrize("data", [b"", b"x", b"\x00\xff\r\n", payload(200_000)], ids=len)
    def test_what_was_put_is_what_is_got(self, tier: Tier, data: bytes) -> None:
        tier.put("dir/key.json", data)
        blob = tier.get("dir/key.json")
        assert isinstance(blob, Blob)
        assert blob.data == data
        assert self.raw_read(tier, "dir/key.json") == data

    def test_put_takes_the_place_of_what_stood_there(self, tier: Tier) -> None:
        tier.put("k", b"a long first value")
        tier.put("k", b"second")
        assert self.raw_read(tier, "k") == b"second"

    def test_getting_what_is_not_there_says_so(self, tier: Tier) -> None:
        with pytest.raises(KeyNotFoundError):
            tier.get("nothing/here")
        tier.put("dir/key", b"x")
        with pytest.raises(KeyNotFoundError):
            tier.get("dir")

    def test_get_refuses_more_than_max_bytes(self, tier: Tier) -> None:
        tier.put("k", b"12345")
        assert tier.get("k", max_bytes=5).data == b"12345"
        with pytest.raises(CorruptPartError):
            tier.get("k", max_bytes=4)

    def test_a_key_that_begins_with_a_dot_is_a_key(self, tier: Tier) -> None:
        tier.put("step/.metadata", b"m")
        assert tier.get("step/.metadata").data == b"m"
        assert self.raw_keys(tier) == ["step/.metadata"]

    # Conditional puts

    def test_put_if_absent_writes_once(self, tier: Tier) -> None:
        tier.put_if_absent("d/k", b"first")
        with pytest.raises(KeyExistsError):
            tier.put_if_absent("d/k", b"second")
        assert self.raw_read(tier, "d/k") == b"first"

    def test_put_if_absent_may_come_again_after_a_delete(self, tier: Tier) -> None:
        tier.put_if_absent("k", b"first")
        tier.delete(["k"])
        tier.put_if_absent("k", b"second")
        assert self.raw_read(tier, "k") == b"second"

    def test_of_racing_put_if_absent_exactly_one_wins(self, tier: Tier) -> None:
        start = threading.Barrier(4)

        def race(who: int) -> bytes | None:
            start.wait(10)
            try:
                tier.put_if_absent("race/k", b"%d" % who * 1000)
            except KeyExistsError:
                return None
            return b"%d" % who * 1000

        with ThreadPoolExecutor(4) as pool:
            winners = [won for won in pool.map(race, range(4)) if won is not None]
        assert len(winners) == 1
        assert self.raw_read(tier, "race/k") == winners[0]

    def test_replace_writes_over_the_version_that_was_read(self, tier: Tier) -> None:
        tier.put("k", b"old")
        tier.replace("k", b"new", version=tier.get("k").version)
        assert self.raw_read(tier, "k") == b"new"

    def test_replace_refuses_another_version(self, tier: Tier) -> None:
        tier.put("k", b"old")
        version = tier.get("k").version
        tier.put("k", b"changed meanwhile")
        with pytest.raises(KeyExistsError):
            tier.replace("k", b"new", version=version)
        assert self.raw_read(tier, "k") == b"changed meanwhile"

    def test_a_version_is_used_up_by_replace(self, tier: Tier) -> None:
        tier.put("k", b"old")
        version = tier.get("k").version
        tier.replace("k", b"new", version=version)
        with pytest.raises(KeyExistsError):
            tier.replace("k", b"newer", version=version)
        assert self.raw_read(tier, "k") == b"new"

    def test_replace_needs_something_to_replace(self, tier: Tier) -> None:
        tier.put("k", b"old")
        version = tier.get("k").version
        tier.delete(["k"])
        with pytest.raises(KeyNotFoundError):
            tier.replace("k", b"new", version=version)
        assert self.raw_keys(tier) == []

    # Listings

    def test_nothing_there_is_an_empty_listing(self, tier: Tier) -> None:
        assert tier.list("") == []
        assert tier.list("no/such/prefix") == []
        assert list(tier.list_dirs("")) == []
        assert list(tier.list_dirs("nothing/")) == []

    def test_a_listing_has_keys_sizes_and_times_in_key_order(self, tier: Tier) -> None:
        before = time.time()
        for key, data in {"b/2": b"22", "b/10": b"1", "a": b"", "b.c": b"333"}.items():
            tier.put(key, data)
        entries = tier.list("")
        assert [(entry.key, entry.size) for entry in entries] == [("a", 0), ("b.c", 3), ("b/10", 1), ("b/2", 2)]
        assert all(isinstance(entry, Entry) and abs(entry.modified_at - before) < 3600 for entry in entries)

    def test_a_prefix_is_of_the_key_not_of_its_directories(self, tier: Tier) -> None:
        for key in ("step_1/a", "step_1/b", "step_10/a", "other"):
            tier.put(key, b"x")
        assert [entry.key for entry in tier.list("step_1")] == ["step_1/a", "step_1/b", "step_10/a"]
        assert [entry.key for entry in tier.list("step_1/")] == ["step_1/a", "step_1/b"]

    def test_list_dirs_names_only_what_has_keys_below(self, tier: Tier) -> None:
        for key in ("top", "a/1", "a/2", "b/c/3"):
            tier.put(key, b"x")
        assert sorted(tier.list_dirs("")) == ["a", "b"]
        assert list(tier.list_dirs("b/")) == ["c"]
        assert list(tier.list_dirs("a/")) == []

    def test_what_others_wrote_is_seen(self, tier: Tier) -> None:
        assert tier.list("") == []
        self.raw_write(tier, "d/late", b"written past the tier")
        assert [entry.key for entry in tier.list("d/")] == ["d/late"]
        assert tier.get("d/late").data == b"written past the tier"

    # Parts

    def test_parts_of_every_size_come_back(self, tier: Tier) -> None:
        for size in self.part_sizes:
            data, key = payload(size, size), f"step/part-{size}"
            tier.put_part(key, chunked(data, 3 * MIB + 1, 10, 8 * MIB), size)
            assert self.raw_read(tier, key) == data, size
            buffer = bytearray(size)
            tier.read_into(key, 0, memoryview(buffer))
            assert buffer == data, size

    def test_a_part_may_come_in_many_small_chunks(self, tier: Tier) -> None:
        data = payload(2 * MIB + 5)
        tier.put_part("p", chunked(data, 1, 4095, 7777), len(data))
        assert self.raw_read(tier, "p") == data

    @pytest.mark.parametrize(
        ("offset", "length"), [(0, 1), (0, 100), (1, 99), (MIB, 777), (2 * MIB, 5), (2 * MIB + 4, 1), (7, 0)]
    )
    def test_any_range_can_be_read(self, tier: Tier, offset: int, length: int) -> None:
        data = payload(2 * MIB + 5)
        tier.put_part("p", chunked(data), len(data))
        buffer = bytearray(b"\x55" * (length + 2))
        tier.read_into("p", offset, memoryview(buffer)[1:-1])
        assert bytes(buffer) == b"\x55" + data[offset : offset + length] + b"\x55"

    @pytest.mark.parametrize(("offset", "length"), [(0, 101), (100, 1), (99, 2), (500, 10)])
    def test_reading_past_the_end_is_damage(self, tier: Tier, offset: int, length: int) -> None:
        tier.put_part("p", chunked(payload(100)), 100)
        with pytest.raises(CorruptPartError):
            tier.read_into("p", offset, memoryview(bytearray(length)))

    @pytest.mark.parametrize("length", [0, 1, 10])
    def test_reading_what_is_not_there_says_so(self, tier: Tier, length: int) -> None:
        with pytest.raises(KeyNotFoundError):
            tier.read_into("no/part", 0, memoryview(bytearray(length)))

    def test_reads_in_threads_do_not_mix(self, tier: Tier) -> None:
        data = payload(2 * MIB)
        tier.put_part("p", chunked(data), len(data))

        def read(index: int) -> bool:
            offset, buffer = index * 1000, bytearray(50_000)
            tier.read_into("p", offset, memoryview(buffer))
            return bytes(buffer) == data[offset : offset + 50_000]

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(16)))

    @pytest.mark.parametrize("size", [10, 3 * MIB, 9 * MIB])
    @pytest.mark.parametrize("given", ["none", "half", "all"])
    def test_an_exception_out_of_the_source_leaves_nothing(self, tier: Tier, size: int, given: str) -> None:
        data = payload(size)
        share = {"none": 0, "half": size // 2, "all": size}[given]

        def breaking() -> Iterator[memoryview]:
            yield from chunked(data[:share])()
            raise ZeroDivisionError("the source broke")

        with pytest.raises(ZeroDivisionError, match="the source broke"):
            tier.put_part("step/p", breaking, size)
        gc.collect()
        assert self.raw_keys(tier) == []
        tier.put_part("step/p", chunked(data), size)
        assert self.raw_read(tier, "step/p") == data

    @pytest.mark.parametrize("size", [10, 3 * MIB])
    @pytest.mark.parametrize("off", [-1, 1])
    def test_a_source_of_another_length_leaves_nothing(self, tier: Tier, size: int, off: int) -> None:
        with pytest.raises(CorruptPartError):
            tier.put_part("step/p", chunked(payload(size + off)), size)
        gc.collect()
        assert self.raw_keys(tier) == []

    # Deletion, probing, closing

    def test_delete_takes_away_what_is_named_and_nothing_else(self, tier: Tier) -> None:
        for key in ("d/1", "d/2", "d/3", "e/1"):
            tier.put(key, b"x")
        tier.delete(iter(["d/1", "not/there", "d/3"]))
        assert self.raw_keys(tier) == ["d/2", "e/1"]
        tier.delete([])
        assert len(self.raw_keys(tier)) == 2

    def test_directories_left_empty_disappear(self, tier: Tier) -> None:
        for key in ("a/b/c", "d/e"):
            tier.put(key, b"x")
        tier.delete(["a/b/c"])
        assert list(tier.list_dirs("")) == ["d"]
        assert list(tier.list_dirs("a/")) == []

    def test_probe_passes_and_leaves_nothing(self, tier: Tier) -> None:
        tier.put("k", b"x")
        tier.probe()
        assert self.raw_keys(tier) == ["k"]

    def test_close_can_be_called_many_times(self, tier: Tier) -> None:
        tier.put("k", b"x")
        for _ in range(3):
            tier.close()
