"""Which checkpoints in memory may be recycled: a pure account of what was saved, what is whole, and what is kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from sm_tiered.exchange import HISTORY
from sm_tiered.records import CheckpointId

__all__ = ["Generations"]

_LONGEST = 64
"""So many saves after the watermark are remembered, at least."""


@dataclass(slots=True, kw_only=True)
class Generations:
    """The line of checkpoints that this attempt continues, oldest first, and how far it is known to be whole."""

    keep: int
    """How many whole ones are kept, at least 1."""
    line: list[CheckpointId] = field(default_factory=list[CheckpointId])
    watermark: CheckpointId | None = None

    def continue_from(self, ancestors: Iterable[CheckpointId], restored: CheckpointId) -> None:
        """Begin after a restore: *restored* is whole, *ancestors* came before it."""
        self.line = [*sorted(c for c in ancestors if c != restored), restored]
        self.watermark = restored

    def add(self, checkpoint: CheckpointId) -> None:
        """Say that a save of *checkpoint* has begun."""
        self.line.append(checkpoint)
        if len(self.line) > 2 * _LONGEST:
            # So many that nobody can tell whole any more: without a memory tier none is ever told of.
            place = self.line.index(self.watermark) if self.watermark in self.line else -1
            head = self.line[max(0, place - self.keep + 1) : place + 1]
            self.line = [*head, *self.line[max(place + 1, len(self.line) - _LONGEST) :]]

    def recent(self) -> list[CheckpointId]:
        """Return the checkpoints that an exchange reports on, newest first."""
        return self.line[: -HISTORY - 1 : -1]

    def learn(self, written: Sequence[bool]) -> None:
        """Take in, for each of `recent`, whether every rank's record is written.

        Each rank writes its records in order: what is not written below one that is whole has failed and is forgotten.
        """
        recent = self.recent()
        whole = [checkpoint for checkpoint, done in zip(recent, written, strict=False) if done]
        if not whole or (self.watermark in self.line and self.line.index(whole[0]) < self.line.index(self.watermark)):
            return
        self.watermark = whole[0]
        failed = {c for c, done in zip(recent, written, strict=False) if not done and c < whole[0]}
        line = [checkpoint for checkpoint in self.line if checkpoint not in failed]
        # What is older than anybody asks for is forgotten, or a save would cost more the longer the job runs.
        self.line = line[max(0, line.index(self.watermark) - max(self.keep, HISTORY)) :]

    def supposing(self, written: Sequence[bool]) -> Generations:
        """Return the account as it will be if every rank has written, of `recent`, what *written* says."""
        other = Generations(keep=self.keep, line=list(self.line), watermark=self.watermark)
        other.learn(written)
        return other

    def releasable(self, published: Iterable[CheckpointId], held: Collection[CheckpointId]) -> set[CheckpointId]:
        """Return those of *published* that nobody needs: neither kept, nor newer than the watermark, nor *held*."""
        watermark = self.watermark
        if watermark is None:
            # Nothing of this line is whole yet: the newest of what an earlier one left must outlive its first save.
            return set(sorted(set(published) - set(self.line) - set(held))[: -self.keep - 1])
        place = self.line.index(watermark) if watermark in self.line else len(self.line) - 1
        needed = set(self.line[max(0, place - self.keep + 1) :])
        return set(published) - needed - set(held)
