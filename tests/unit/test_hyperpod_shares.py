"""The format of a share: what is sent is what is told, and nothing that differs from its digests is sent whole."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest
import xxhash

from sm_tiered.errors import CorruptPartError, FormatError
from sm_tiered.testing.contract import payload
from sm_tiered.tiers.hyperpod_shares import (
    FIRST_BYTES,
    SHARE_MAGIC,
    Head,
    header_length,
    outgoing,
    parse_head,
)
from tests.unit.hyperpod_sharing import FIRST, MIB, SECOND, at, attempt_record, data_of, pieces, share

CHECKPOINT = at(FIRST, 7)
SIZES = (9 * MIB + 7, 0, 100, 8 * MIB, 1)


def whole(*sizes: int, lengths: tuple[int, ...] = (MIB,)) -> bytes:
    made = outgoing(share(CHECKPOINT, 1, 2, *sizes, lengths=lengths), namespace="run", attempt=None)
    return b"".join(map(bytes, made.chunks()))


def head_of(blob: bytes) -> Head:
    return parse_head(blob[FIRST_BYTES : FIRST_BYTES + header_length(blob[:FIRST_BYTES])])


def test_the_header_tells_where_everything_is_small_parts_first() -> None:
    made = share(CHECKPOINT, 1, 2, *SIZES)
    told = attempt_record(FIRST).decode()
    sent = outgoing(made, namespace="run", attempt=told)
    blob = b"".join(map(bytes, sent.chunks()))
    head = head_of(blob)
    assert head == sent.head
    assert (head.namespace, head.checkpoint, head.rank, head.world, head.attempt) == ("run", CHECKPOINT, 1, 2, told)
    assert head.size == len(blob)
    assert blob[head.record.offset :][: head.record.size] == made.record
    assert list(head.parts) == ["__1_1.distcp", "__1_4.distcp", "__1_2.distcp", "__1_3.distcp", "__1_0.distcp"]
    for name, place in head.parts.items():
        number = int(name[4])
        assert blob[place.offset :][: place.size] == data_of(7, 1, number, SIZES[number]), name


@pytest.mark.parametrize("lengths", [(1 << 30,), (8 * MIB,), (MIB,), (3 * MIB + 1, 10, 8 * MIB), (40_950,)])
def test_pieces_of_any_length_give_the_same_share(lengths: tuple[int, ...]) -> None:
    found, expected = whole(*SIZES, lengths=lengths), whole(*SIZES)
    assert found[head_of(found).record.offset :] == expected[head_of(expected).record.offset :]


def test_shard_meta_is_the_digest_of_the_whole_share() -> None:
    made = outgoing(share(CHECKPOINT, 0, 1, *SIZES), namespace="run", attempt=None)
    blob = b"".join(map(bytes, made.chunks()))
    told = json.loads(made.meta())
    assert told == {"checksum": base64.b64encode(xxhash.xxh3_128_digest(blob)).decode(), "algorithm": "xxh3_128"}


@pytest.mark.parametrize("where", [0, 8 * MIB - 1, 8 * MIB, 9 * MIB + 6])
def test_a_byte_that_differs_from_its_digest_ends_it_before_the_last_piece(where: int) -> None:
    good = share(CHECKPOINT, 0, 1, 9 * MIB + 7)
    data = bytearray(data_of(7, 0, 0, 9 * MIB + 7))
    data[where] ^= 1
    bad = replace(good, parts=((good.parts[0][0], pieces(bytes(data), (3 * MIB,))),))
    made, sent = outgoing(bad, namespace="run", attempt=None), list[int]()
    with pytest.raises(CorruptPartError, match=f"chunk {where // (8 * MIB)} has XXH3-128"):
        sent.extend(map(len, made.chunks()))
    assert 0 < sum(sent) < made.head.size


@pytest.mark.parametrize(
    ("size", "off"), [(0, 1), (0, 8 * MIB), (5, -1), (5, 1), (5, 8 * MIB), (8 * MIB, -1), (8 * MIB, 1)]
)
def test_a_source_of_another_length_ends_it_before_the_last_piece(size: int, off: int) -> None:
    good = share(CHECKPOINT, 0, 1, size, 100)
    data = data_of(7, 0, 0, size) + payload(max(off, 0))
    bad = replace(good, parts=((good.parts[0][0], pieces(data[: size + off], (MIB,))), good.parts[1]))
    made, sent = outgoing(bad, namespace="run", attempt=None), list[int]()
    with pytest.raises(CorruptPartError, match="bytes were given"):
        sent.extend(map(len, made.chunks()))
    assert 0 < sum(sent) < made.head.size


def test_every_flipped_bit_of_a_header_is_found() -> None:
    blob = whole(100, 0)
    end = head_of(blob).record.offset
    for at_bit in range(8 * len(SHARE_MAGIC), 8 * end):
        bad = bytearray(blob)
        bad[at_bit // 8] ^= 1 << at_bit % 8
        with pytest.raises(FormatError):
            head_of(bytes(bad))


@pytest.mark.parametrize("first", [b"", b"SMTSHAR1", SHARE_MAGIC + b"\xff" * 8, SHARE_MAGIC + b"\0" * 8])
def test_a_length_that_no_header_has_is_refused(first: bytes) -> None:
    with pytest.raises(FormatError):
        header_length(first)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checkpoint", "step_7"),
        ("checkpoint", 7),
        ("rank", -1),
        ("rank", 10**30),
        ("world", 0),
        ("namespace", "../cluster/reset"),
        ("record", -1),
        ("record_digest", "0"),
        ("parts", [{"name": "../x", "offset": 0, "size": 1}]),
        ("parts", [{"name": "__1_0.distcp", "offset": 5, "size": 1}]),
        ("parts", {}),
        ("attempt", 5),
        ("attempt", "{}"),
        ("attempt", "\ud800"),
        ("attempt", attempt_record(SECOND).decode()),
        ("sent_at", "now"),
        ("format", 2),
        ("kind", "record"),
    ],
)
def test_a_sealed_header_that_says_nonsense_is_refused(field: str, value: object) -> None:
    from sm_tiered.sealed_json import dump, sealed

    blob = whole(100, 0)
    fields = json.loads(blob[FIRST_BYTES : head_of(blob).record.offset])
    fields.pop("xxh3_128")
    with pytest.raises(FormatError):
        parse_head(sealed(dump({**fields, field: value})))
    parse_head(sealed(dump(fields)))
