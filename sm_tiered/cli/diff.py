"""``sm-tiered diff``: which tensors of two checkpoints differ, and by how much, whatever ranks saved either of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sm_tiered.cli.choice import Chosen, chosen, parse_which
from sm_tiered.cli.common import EXIT_FAILED, EXIT_OK, open_recipe, parallel, threads_for
from sm_tiered.cli.gauge import Gauge
from sm_tiered.cli.output import print_json, render
from sm_tiered.selection import is_moment, picked
from sm_tiered.stored_chunks import VerifiedChunks
from sm_tiered.stored_files import stored_with_files
from sm_tiered.stored_reads import TensorReader, room_for
from sm_tiered.stored_tensors import Stored, StoredTensor, natural
from sm_tiered.tensor_diff import Difference, compare, same_value

__all__ = ["Found", "Warned", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """Something that looks wrong."""

    kind: str
    message: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Everything that comparing two checkpoints told."""

    a: Chosen
    b: Chosen
    left: Stored
    right: Stored
    compared: Mapping[str, Difference]
    """Tensors that both have, of one dtype and shape."""
    unlike: tuple[str, ...]
    """Tensors that both have, of another dtype or shape."""
    values: Mapping[str, bool]
    """Whether a value that both have is the same."""
    bytes_read: int
    secs: float

    @property
    def different(self) -> list[str]:
        """Names of tensors that differ, those that do so most first."""
        names = [name for name, each in self.compared.items() if not each.same]
        return sorted(names, key=lambda name: -self.compared[name].relative)

    @property
    def only(self) -> tuple[list[str], list[str]]:
        """Names of tensors and values that only one side has."""
        sides = [[*stored.tensors, *stored.values] for stored in (self.left, self.right)]
        left, right = (frozenset(names) for names in sides)
        return [name for name in sides[0] if name not in right], [name for name in sides[1] if name not in left]

    @property
    def same(self) -> bool:
        """Whether both hold the same."""
        return not (self.different or self.unlike or any(self.only)) and all(self.values.values())

    @property
    def skipped_bytes(self) -> int:
        """What was not read, for its digests are equal."""
        return sum(each.skipped_bytes for each in self.compared.values())


def run(recipe: str, one: str, other: str, *, only: Sequence[str], every: bool, exit_code: bool, as_json: bool) -> int:
    """Compare two checkpoints of *recipe*; return the exit status, which tells of differences with *exit_code* only."""
    asked = parse_which(one, name="A"), parse_which(other, name="B")
    settings = open_recipe(recipe)
    with chosen(settings, asked[0]) as a, chosen(settings, asked[1]) as b:
        found = _compare(a, b, only, quiet=as_json)
    from sm_tiered.cli.diff_tables import blocks, document

    if as_json:
        print_json(document(found, warnings(found)))
    else:
        render(*blocks(found, warnings(found), every=every))
    return EXIT_FAILED if exit_code and not found.same else EXIT_OK


def _compare(a: Chosen, b: Chosen, only: Sequence[str], *, quiet: bool) -> Found:
    threads = max(threads_for(a.settings), threads_for(b.settings))
    headers = [_chunks(each, 4) for each in (a, b)]
    left, right = (
        _picked(stored_with_files(each.records, found), only) for each, found in zip((a, b), headers, strict=True)
    )
    names = [name for name in left.tensors if name in right.tensors]
    alike = [name for name in names if _kind(left.tensors[name]) == _kind(right.tensors[name])]
    alike.sort(key=lambda name: _place(left.tensors[name]))
    values = [name for name in left.values if name in right.values]
    readers = [
        TensorReader(_chunks(each, threads + max((room_for(stored.tensors[name]) for name in alike), default=4)))
        for each, stored in ((a, left), (b, right))
    ]
    total = sum(left.tensors[name].bytes for name in alike)
    with Gauge(f"{a.label} and {b.label}", total, quiet=quiet) as gauge:

        def tensor(name: str) -> Difference:
            one, other = left.tensors[name], right.tensors[name]
            moment = a.checkpoint.step != b.checkpoint.step and is_moment(one)
            return compare(readers[0], one, readers[1], other, moment=moment, tell=gauge.add)

        def value(name: str) -> bool:
            return same_value(readers[0], left.values[name], readers[1], right.values[name])

        differences = dict(zip(alike, parallel(tensor, alike, threads=threads), strict=True))
        same = dict(zip(values, parallel(value, values, threads=threads), strict=True))
        secs = gauge.secs
    return Found(
        a=a,
        b=b,
        left=left,
        right=right,
        compared={name: differences[name] for name in names if name in differences},
        unlike=tuple(name for name in names if name not in differences),
        values=same,
        bytes_read=sum(each.bytes_read for each in (*headers, readers[0].chunks, readers[1].chunks)),
        secs=secs,
    )


def _chunks(each: Chosen, room: int) -> VerifiedChunks:
    return VerifiedChunks(each.tier, each.checkpoint, each.records, durable=each.durable, room=room)


def _picked(stored: Stored, only: Sequence[str]) -> Stored:
    if not only:
        return stored
    return Stored(tensors=picked(stored.tensors, prefix=None, patterns=only, every=True))


def _kind(tensor: StoredTensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.shape


def _place(tensor: StoredTensor) -> tuple[str, int]:
    return (tensor.chunks[0].part, tensor.chunks[0].start) if tensor.chunks else ("", 0)


def warnings(found: Found) -> list[Warned]:
    """Return what looks wrong: what could not be compared, and what steps should change and is the same at two."""
    odd = tuple(sorted({*found.left.odd, *found.right.odd}, key=natural))
    message = f"{len(odd)} tensors were not compared, for they are not stored in row-major order"
    warned = [Warned(kind="not_compared", message=message, names=odd)] if odd else []
    return warned if found.a.checkpoint.step == found.b.checkpoint.step else warned + _stale(found)


def _stale(found: Found) -> list[Warned]:
    steps = f"steps {found.a.checkpoint.step} and {found.b.checkpoint.step}"
    warned: list[Warned] = []
    moments = [name for name in found.compared if is_moment(found.left.tensors[name])]
    stale = [name for name in moments if found.compared[name].same_shards]
    if stale:
        shards = sum(found.compared[name].same_shards for name in stale)
        of = sum(found.compared[name].shards for name in moments)
        what = f"{shards} of {of} pieces of optimizer state are bit-identical at {steps}"
        why = "the optimizer was saved stale, or these parameters were not trained"
        warned.append(Warned(kind="stale_optimizer", message=f"{what}: {why}", names=tuple(stale)))
    if found.compared and not found.different and not found.unlike:
        message = f"every tensor is bit-identical at {steps}: nothing was trained between them, or the save was stale"
        warned.append(Warned(kind="all_identical", message=message))
    return warned
