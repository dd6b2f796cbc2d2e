"""`TieredFiles`: a training loop's checkpoints as whole files, for programs that have formats of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sm_tiered import layout
from sm_tiered.file_loader import FileLoader, Get
from sm_tiered.records import Attempt
from sm_tiered.settings import Settings
from sm_tiered.tiers.memory import MemoryTier
from sm_tiered_dcp.engine import Engine
from sm_tiered_dcp.file_saver import FileSaver, Saved, TakeFiles
from sm_tiered_dcp.loop import SaveLoop

__all__ = ["TieredFiles"]


def _accept(get: Get) -> None:
    """Nothing to look at."""


def _everybodys(name: str) -> int | None:
    """Files are for all ranks, whatever they are called."""


class TieredFiles(SaveLoop[TakeFiles]):
    """Checkpoints of one job whose content is files: what one program writes, another reads, under the same names.

    What is saved is a function that is given the step and returns a `FileSet`; see `SaveLoop` for the rest.
    """

    def __init__(self, engine: Engine) -> None:
        """Use `from_recipe`."""
        super().__init__(engine)
        self._kept: FileLoader | None = None
        self._staging: Path | None = None

    def _make_saver(self, engine: Engine) -> FileSaver:
        self._file_saver = FileSaver(engine)
        return self._file_saver

    @property
    def settings(self) -> Settings:
        """The recipe, resolved."""
        return self._open.settings

    @property
    def memory(self) -> MemoryTier | None:
        """The memory tier of this node."""
        return self._open.store.tiers.memory

    @property
    def newest(self) -> Saved | None:
        """What this rank saved last, and where it stands in the tiers."""
        return self._file_saver.newest

    def restore(
        self,
        use: Callable[[Path], None],
        step: int | None = None,
        *,
        called: Callable[[int], str] = str,
        inspect: Callable[[Get], None] = _accept,
        first: Sequence[str] = (),
        whose: Callable[[str], int | None] = _everybodys,
        attempt: Attempt | None = None,
        keep: bool = False,
    ) -> int | None:
        """Call *use* with a directory that holds the files of the newest complete, verified checkpoint, or of *step*.

        Return its step; None when nothing was ever saved. Each node has every file once; a rank's own files are seen
        by that rank alone. The directory is only to be read, and gone when this returns. Collective.

        Args:
            use: reads the directory. What it raises is raised on all ranks, as a RestoreIncompleteError.
            step: this step instead of the newest; what was saved after it is left behind.
            called: the last segment of the directory's path, by step.
            inspect: called before *use*, before anything is changed, with a function that returns one of the files
                named in *first*; a MismatchError that it raises is raised on all ranks.
            first: see *inspect*.
            attempt: refuse a checkpoint of another one.
            whose: of a file that one rank alone reads, that rank: other nodes do without it. Each node's memory has
                only what its own ranks wrote.
            keep: leave the directory until `let_go`, the next restore or the end.

        Raises:
            CheckpointNotFoundError: no tier has *step*.
            MismatchError: *inspect* refused; or the checkpoint holds no files, or those of another number of ranks.
            TierUnavailableError: a tier did not answer, so what is newest can't be known.
            NothingRestorableError: checkpoints exist and none can be restored.
            RestoreIncompleteError: *use* failed: the state must not be used.
        """
        engine, wanted = self._open, layout.check_step(step) if step is not None else None
        store = engine.store
        self.let_go()
        engine.saver.quiesce()
        loader = FileLoader(
            use,
            group=engine.group,
            here=store.ranks_here,
            base=Path(store.tiers.memory.root) if store.tiers.memory is not None else None,
            called=called,
            inspect=inspect,
            first=first,
            whose=whose,
            attempt=attempt,
            resized=engine.settings.allow_partial,
        )
        try:
            self.restored = store.restore(loader, step=wanted, room=loader.room)
        except BaseException:
            loader.close()
            raise
        if self.restored is None or not keep:
            loader.close()
        else:
            self._kept = loader
        if self.restored is None:
            return None
        engine.remember(self.restored)
        return self.restored.step

    @contextmanager
    def staging(self) -> Generator[Path, None, None]:
        """Give a directory of this rank's own, in memory if the recipe has such a tier, for files that are to be saved.

        It is gone afterwards. Not collective.
        """
        with tempfile.TemporaryDirectory(prefix=f"rank-{self.rank:05d}-", dir=self._staging_base()) as directory:
            yield Path(directory)

    def _staging_base(self) -> Path | None:
        if self.memory is None:
            return None
        base = Path(self.memory.root) / layout.STAGING
        base.mkdir(mode=0o700, exist_ok=True)
        return base

    def staging_here(self) -> Path:
        """Return a directory that all of `ranks_here` have for files that are to be saved, until the end. Collective.

        It is in memory if the recipe has such a tier. Empty it as you go: what still is in it goes with the next one,
        or with the next launch.
        """
        token = str(self.gather(secrets.token_hex(8))[0])
        self._remove_staging(full=self.rank == self.ranks_here[0])  # all ranks are here, and nobody writes
        base = self._staging_base()
        if base is None:
            self._staging = Path(tempfile.mkdtemp(prefix="sm_tiered-staging-"))
        else:
            self._staging = base / token
            self._staging.mkdir(mode=0o700, exist_ok=True)
        return self._staging

    def _remove_staging(self, *, full: bool) -> None:
        staging, self._staging = self._staging, None
        if staging is None:
            return
        if full:
            shutil.rmtree(staging, ignore_errors=True)
            return
        for directory, _, _ in os.walk(staging, topdown=False):
            # Other ranks may not be done with theirs.
            with suppress(OSError):
                os.rmdir(directory)

    @property
    def ranks_here(self) -> tuple[int, ...]:
        """The ranks that share this node's memory tier, ascending; this one alone where there is none."""
        return self._open.store.ranks_here

    def gather(self, value: object) -> list[Any]:
        """Return every rank's *value*, in rank order. Collective."""
        return self._open.group.gather(value)

    def together(self, action: Callable[[], None]) -> None:
        """Run *action* on every rank; if it fails on one, raise on all. Collective."""
        self._open.store.all_or_none(action)

    def let_go(self) -> None:
        """Remove the directory that the last restore has kept. Not collective."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()

    def close(self) -> None:
        """See `SaveLoop.close`."""
        self._leave()
        super().close()

    def abandon(self) -> None:
        """See `SaveLoop.abandon`."""
        self._leave()
        super().abandon()

    def _leave(self) -> None:
        self.let_go()
        if self._staging is not None:
            self._remove_staging(full=len(self.ranks_here) == 1)
