"""Copies of checkpoints in directories that the user names, made in the background from what stands in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import DeadlineExceededError, SaveError, TieredError
from sm_tiered.tiers.memory import MemoryTier, OpenPart
from sm_tiered.worker import Worker

__all__ = ["Copies"]


@dataclass(slots=True)
class Copies:
    """Makes one copy after the other. A file of the arena can't be recycled while it waits here."""

    memory: MemoryTier
    _worker: Worker = field(init=False)
    _failures: list[SaveError] = field(default_factory=list[SaveError])

    def __post_init__(self) -> None:
        self._worker = Worker("sm_tiered-copies", on_error=self._failed)

    def add(self, directory: str, names: Sequence[str], target: Path, step: int) -> None:
        """Copy the parts *names* of the checkpoint in *directory* to *target*, soon; one that is there is replaced.

        Raises:
            TieredError: a part is not there, or *target* can't be made.
        """
        with ExitStack() as stack:
            # Opened now: what is open is not recycled, however long the copies before take.
            parts = [(name, stack.enter_context(self.memory.open_part(f"{directory}/{name}"))) for name in names]
            try:
                target.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _not_copied(target, step, error) from error
            held = stack.pop_all()
        self._worker.submit(lambda: self._copy(parts, target, step, held))

    def _copy(self, parts: Sequence[tuple[str, OpenPart]], target: Path, step: int, held: ExitStack) -> None:
        with held:
            try:
                for name, part in parts:
                    _write(target / name, _chunks(part))
            except (OSError, TieredError) as error:
                raise _not_copied(target, step, error) from error

    def _failed(self, error: Exception) -> None:
        self._failures.append(error if isinstance(error, SaveError) else SaveError(f"a copy failed: {error}"))

    def failures(self) -> list[SaveError]:
        """Return what failed since this was asked last."""
        found = self._failures
        self._failures = []
        return found

    def wait(self, timeout_secs: float) -> None:
        """Wait until all copies are made.

        Raises:
            DeadlineExceededError: they took longer; they go on in the background.
        """
        if not self._worker.quiesce(timeout_secs):
            raise DeadlineExceededError(
                f"copies to output_dir were not made within {timeout_secs:.0f} s", hint="They go on: wait again."
            )

    def close(self) -> None:
        """Make what is left, and end. Can be called many times."""
        self._worker.close()


def _not_copied(target: Path, step: int, error: Exception) -> SaveError:
    return SaveError(
        f"the copy in {target} was not made: {error}",
        hint="The checkpoint itself is in the tiers; `sm-tiered ls` shows it.",
        step=step,
    )


def _chunks(part: OpenPart) -> Iterator[bytes]:
    for start in range(0, part.size, CHUNK_BYTES):
        yield part.pread(start, min(CHUNK_BYTES, part.size - start))


def _write(path: Path, chunks: Iterator[bytes]) -> None:
    """Write a file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{token_hex(4)}")
    try:
        with new.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
