"""Copies of checkpoints in directories that the user names, made in the background from what stands in memory."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from secrets import token_hex
from weakref import WeakSet

from accelerate.logging import get_logger  # pyright: ignore[reportMissingTypeStubs]

from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import DeadlineExceededError, SaveError, TieredError
from sm_tiered.tiers.memory import MemoryTier, OpenPart
from sm_tiered.worker import Worker
from sm_tiered_dcp.file_saver import Saved

__all__ = ["Copies"]

_logger = get_logger(__name__)


class Copies:
    """Makes one copy after the other. A file of the arena can't be recycled while it waits here."""

    def __init__(self, memory: MemoryTier | None, *, raises: bool, timeout_secs: float) -> None:
        """Copy from *memory*.

        Args:
            memory: this node's, if there is any.
            raises: whether `deliver` raises what failed, or logs it.
            timeout_secs: how long the end of a training waits.
        """
        self._memory, self._raises, self._timeout_secs = memory, raises, timeout_secs
        self._worker = Worker("sm_tiered-copies", on_error=self._failed)
        self._failures: list[SaveError] = []
        _live.add(self)

    def add(self, saved: Saved, target: Path, step: int) -> None:
        """Copy the files of *saved* to *target*, soon; what fails, here or later, `deliver` tells."""
        memory = self._memory
        assert memory is not None
        try:
            with ExitStack() as stack:
                # Opened now: what is open is not recycled, however long the copies before take.
                keys = [(name, f"{saved.directory}/{name}") for name in saved.names]
                parts = [(name, stack.enter_context(memory.open_part(key))) for name, key in keys]
                target.mkdir(parents=True, exist_ok=True)
                held = stack.pop_all()
        except (OSError, TieredError) as error:
            self._failed(_not_copied(target, step, error))
            return
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

    def deliver(self) -> None:
        """Tell what failed since this was asked last, as the recipe says of saves.

        Raises:
            SaveError: with ``on_error: raise``.
        """
        while self._failures:
            error = self._failures.pop(0)
            if self._raises:
                raise error
            _logger.warning(f"sm_tiered: {error}", main_process_only=False)

    def wait(self, timeout_secs: float | None = None) -> None:
        """Wait until all copies are made; None: as long as the end of a training waits.

        Raises:
            DeadlineExceededError: they took longer; they go on in the background.
            SaveError: see `deliver`.
        """
        limit = self._timeout_secs if timeout_secs is None else timeout_secs
        if not self._worker.quiesce(limit):
            raise DeadlineExceededError(
                f"copies to output_dir were not made within {limit:.0f} s", hint="They go on: wait again."
            )
        self.deliver()

    def close(self) -> None:
        """Make what is left, within the time that the end of a training waits, and end. Can be called many times.

        Raises: see `wait`.
        """
        try:
            self.wait()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End without waiting: what is under way goes on for as long as the process lives."""
        _live.discard(self)
        self._worker.close(0.0)


_live: WeakSet[Copies] = WeakSet()


@atexit.register
def _end_copies() -> None:
    """A script may end without a word: what it asked for is copied all the same."""
    for copies in list(_live):
        try:
            copies.close()
        except TieredError:
            _logger.exception("sm_tiered: copies were not made", main_process_only=False)


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
