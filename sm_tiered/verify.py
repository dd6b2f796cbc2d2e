"""Verifying a checkpoint on one tier: manifest against records, records against parts, bytes against digests.

It only reads. A checkpoint that a running job recycles or deletes meanwhile is no damaged one: before anything counts
as a problem, what makes the checkpoint visible (manifest or records) is looked at again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from sm_tiered import checksum, layout
from sm_tiered.errors import ConfigError, CorruptPartError, FormatError, KeyNotFoundError
from sm_tiered.manifest import MAX_BYTES, manifest_from_json, record_from_json
from sm_tiered.records import CheckpointId, Manifest, Part, Record
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.shares import ShareTier
from sm_tiered.verify_chunks import Chunk, check_chunks, choose_chunks
from sm_tiered.verify_report import Problem, Report, State

__all__ = ["Problem", "Progress", "Report", "State", "verify_checkpoint"]

Progress = Callable[[int, int], None]
"""``progress(done, total)``, in bytes."""

_TRIES = 3
"""How often a checkpoint that changes while it is read is begun again."""


def verify_checkpoint(
    tier: Tier,
    checkpoint: CheckpointId,
    *,
    durable: bool,
    share: float = 1.0,
    seed: int = 0,
    threads: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Verify *checkpoint*, reading the given *share* of its chunks: a random choice that *seed* decides.

    It needs one chunk of memory (8 MiB) for each of *threads*, which read and hash, beside the largest record.

    Raises:
        ConfigError: *share* is not above 0 and at most 1.
        TierError: the tier did not answer or refused.
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"share is {share}", hint="Allowed: 0 < share <= 1.")
    for _ in range(_TRIES):
        check = _Check(
            tier=tier,
            checkpoint=checkpoint,
            durable=durable,
            share=share,
            seed=seed,
            threads=threads,
            progress=progress,
        )
        report = check.run()
        if not report.problems or not check.changed():
            return report
    return Report(
        tier=tier.name, checkpoint=checkpoint, state=State.CHANGING, note="it changed each time it was being read"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """One rank's record, without its items."""

    rank: int
    record: Record


@dataclass(slots=True, kw_only=True)
class _Check:
    """One try."""

    tier: Tier
    checkpoint: CheckpointId
    durable: bool
    share: float
    seed: int
    threads: int
    progress: Progress | None
    problems: list[Problem] = field(default_factory=list[Problem])
    manifest: bytes | None = None
    digests: dict[int, str] = field(default_factory=dict[int, str])
    """Of each record that was read; empty for one that was gone by then."""
    notes: list[str] = field(default_factory=list[str])
    indexed: bool = False
    """Whether a record holds items, which other readers need an index for."""
    parts: int = 0
    chunks: int = 0
    bytes_read: int = 0
    rereads: int = 0

    def run(self) -> Report:
        """Look at everything once."""
        shares = self._committed() if self.durable else self._in_memory()
        if isinstance(shares, Report):
            return shares
        # Listed after the records were read: whatever they name was there before them.
        prefix = f"{layout.checkpoint_dir(self.checkpoint)}/"
        sizes = {entry.key.removeprefix(prefix): entry.size for entry in self.tier.list(prefix)}
        self._check_index(sizes)
        self._check_chunks(self._readable(shares, sizes))
        state = State.DAMAGED if self.problems else State.PARTIAL if self.notes else State.WHOLE
        return self._report(state, "; ".join(self.notes) or None)

    def changed(self) -> bool:
        """Return whether what made the checkpoint visible is no longer what it was when this try began."""
        if self.durable:
            return self._get(layout.MANIFEST) != self.manifest
        for rank, found in self.digests.items():
            data = self._get(layout.record_name(rank))
            if data is None or checksum.digest(data) != found:
                return True
        return False

    # ---- what there should be

    def _committed(self) -> list[_Share] | Report:
        try:
            self.manifest = self._get(layout.MANIFEST)
            if self.manifest is None:
                return self._report(State.UNCOMMITTED, "no manifest")
            manifest = manifest_from_json(self.manifest)
        except (FormatError, CorruptPartError) as error:
            self._problem(error.message, part=layout.MANIFEST)
            return self._report(State.DAMAGED)
        if manifest.tombstone:
            return self._report(State.DELETED, "deleted")
        if manifest.checkpoint != self.checkpoint:
            self._problem(f"is that of {manifest.checkpoint}", part=layout.MANIFEST)
            return self._report(State.DAMAGED)
        shares: list[_Share] = []
        for rank in range(manifest.world):
            record = self._record(rank, manifest.records[rank])
            if record is not None:
                shares.append(_Share(rank=rank, record=record))
        if len(shares) == manifest.world:
            self._compare(manifest, shares)
        return shares

    def _in_memory(self) -> list[_Share] | Report:
        prefix = f"{layout.checkpoint_dir(self.checkpoint)}/"
        names = [entry.key.removeprefix(prefix) for entry in self.tier.list(prefix)]
        ranks = sorted(rank for rank in map(layout.parse_record_name, names) if rank is not None)
        if not ranks:
            return self._report(State.UNCOMMITTED if names else State.DELETED, "no record" if names else "recycled")
        shares: list[_Share] = []
        for rank in ranks:
            record = self._record(rank, None)
            if record is not None and record.failed is None:
                shares.append(_Share(rank=rank, record=record))
            elif record is not None:
                self.notes.append(f"rank {rank} failed: {record.failed}")
        worlds = {share.record.world for share in shares}
        if len(worlds) > 1:
            self._problem(f"the records disagree on the number of ranks: {sorted(worlds)}")
        missing = sorted(set(range(max(worlds, default=0))) - set(ranks))
        if missing:
            self.notes.append(f"no record of {_ranks(missing)} here")
        return shares

    def _record(self, rank: int, committed: str | None) -> Record | None:
        """Return the record of *rank* without its items, or None when it is damaged; *committed* is its digest."""
        name = layout.record_name(rank)
        try:
            data = self._get(name)
            if data is not None and committed is not None and checksum.digest(data) != committed:
                data = self._get(name)
            self.digests[rank] = "" if data is None else checksum.digest(data)
            if data is None:
                self._problem("is missing", rank=rank, part=name)
                return None
            if committed is not None and self.digests[rank] != committed:
                self._problem("is not the one that was committed", rank=rank, part=name)
                return None
            record = record_from_json(data)
        except (FormatError, CorruptPartError) as error:
            self._problem(error.message, rank=rank, part=name)
            return None
        if record.rank != rank or record.checkpoint != self.checkpoint:
            self._problem(f"is that of {record.checkpoint}, rank {record.rank}", rank=rank, part=name)
            return None
        if self.durable and record.failed is not None:
            self._problem(f"was committed although the rank failed: {record.failed}", rank=rank, part=name)
            return None
        self.indexed |= any(table.items for table in record.tables)
        return replace(record, tables=())

    def _compare(self, manifest: Manifest, shares: Sequence[_Share]) -> None:
        """A manifest is a function of its records: whatever they do not say is wrong in it."""
        first = shares[0].record
        made = Manifest(
            namespace=first.namespace,
            checkpoint=first.checkpoint,
            world=first.world,
            saved_at=first.saved_at,
            parts={part.name: part.size for share in shares for part in share.record.parts if not part.replica},
            records=manifest.records,
            metrics=first.metrics,
        )
        for name in ("namespace", "world", "saved_at", "parts", "metrics"):
            if getattr(made, name) != getattr(manifest, name):
                self._problem(f"{name} is not what the records say", part=layout.MANIFEST)
        for share in shares[1:]:
            if (share.record.namespace, share.record.world) != (first.namespace, first.world):
                name = layout.record_name(share.rank)
                self._problem("is of another namespace or number of ranks than rank 0's", rank=share.rank, part=name)

    # ---- what there is

    def _readable(self, shares: Sequence[_Share], sizes: dict[str, int]) -> list[tuple[int, Part]]:
        """Return the parts whose size is right, with their ranks."""
        found: list[tuple[int, Part]] = []
        owners: dict[str, int] = {}
        for share in shares:
            for part in share.record.parts:
                if self.durable and part.replica:
                    continue
                self.parts += 1
                owner = owners.setdefault(part.name, share.rank)
                size = sizes.get(part.name)
                if owner != share.rank:
                    what = f"stands in the records of ranks {owner} and {share.rank}"
                    self._problem(what, rank=owner, part=part.name)
                elif size is None:
                    self._problem("is missing", rank=share.rank, part=part.name)
                elif size != part.size:
                    self._problem(f"has {size} bytes, recorded {part.size}", rank=share.rank, part=part.name)
                else:
                    found.append((share.rank, part))
        return found

    def _check_index(self, sizes: dict[str, int]) -> None:
        """In memory these files come after the acknowledgement, and only on rank 0's node: they may be missing.

        A tier of shares has none.
        """
        wanted = self.durable and self.indexed and not isinstance(self.tier, ShareTier)
        for name in (layout.INDEX, layout.METADATA) if wanted else ():
            if not sizes.get(name):
                self._problem("is missing" if name not in sizes else "is empty", part=name)
        if layout.INDEX in sizes:
            try:
                data = self._get(layout.INDEX)
                wrong = None if data is None else self._wrong_index(data)
            except CorruptPartError as error:
                wrong = error.message
            if wrong is not None:
                self._problem(wrong, part=layout.INDEX)

    def _wrong_index(self, data: bytes) -> str | None:
        try:
            found = cast(object, json.loads(data))
        except (ValueError, RecursionError) as error:
            return f"is no JSON: {str(error)[:120]}"
        if not isinstance(found, dict):
            return "is no JSON object"
        fields = cast("dict[str, object]", found)
        if fields.get("step") != self.checkpoint.step or fields.get("attempt") != str(self.checkpoint.attempt):
            return "is that of another checkpoint"
        return None

    def _check_chunks(self, parts: Sequence[tuple[int, Part]]) -> None:
        seed = f"{self.seed}/{layout.checkpoint_dir(self.checkpoint)}"
        chosen = [
            Chunk(key=layout.in_dir(self.checkpoint, part.name), part=part, index=index)
            for part, index in choose_chunks([part for _, part in parts], share=self.share, seed=seed)
        ]
        total = sum(chunk.length for chunk in chosen)
        ranks = {part.name: rank for rank, part in parts}
        self._tell(total)
        for chunk, found in zip(chosen, check_chunks(self.tier, chosen, threads=self.threads), strict=True):
            if found.problem is not None:
                name = chunk.part.name
                self._problem(found.problem, rank=ranks[name], part=name, chunk=chunk.index)
            self.rereads += found.reread
            self.chunks += 1
            self.bytes_read += chunk.length
            self._tell(total)

    # ---- small things

    def _get(self, name: str) -> bytes | None:
        try:
            return self.tier.get(layout.in_dir(self.checkpoint, name), max_bytes=MAX_BYTES).data
        except KeyNotFoundError:
            return None

    def _problem(
        self, what: str, *, rank: int | None = None, part: str | None = None, chunk: int | None = None
    ) -> None:
        self.problems.append(
            Problem(tier=self.tier.name, checkpoint=self.checkpoint, what=what, rank=rank, part=part, chunk=chunk)
        )

    def _report(self, state: State, note: str | None = None) -> Report:
        return Report(
            tier=self.tier.name,
            checkpoint=self.checkpoint,
            state=state,
            note=note,
            problems=tuple(self.problems),
            parts=self.parts,
            chunks=self.chunks,
            bytes_read=self.bytes_read,
            rereads=self.rereads,
        )

    def _tell(self, total: int) -> None:
        if self.progress is not None:
            self.progress(self.bytes_read, total)


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
