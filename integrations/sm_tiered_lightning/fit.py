"""One training, from its start to its end: what is asked and saved when."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from sm_tiered.errors import ConfigError, TieredError
from sm_tiered.figures import left_out
from sm_tiered.handle import SaveHandle
from sm_tiered_lightning.lookahead import Lookahead
from sm_tiered_lightning.metrics import Metrics
from sm_tiered_lightning.moments import Moments, stop
from sm_tiered_lightning.overrides import Overrides
from sm_tiered_lightning.paths import Paths
from sm_tiered_lightning.post_mortem import PostMortem
from sm_tiered_lightning.report import Report
from sm_tiered_lightning.resume import loaders_made, resume
from sm_tiered_lightning.serving import shards
from sm_tiered_lightning.session import Session, Snapshot
from sm_tiered_lightning.snapshot import snapshot
from sm_tiered_lightning.uri import step_uri

__all__ = ["Fit"]


class Fit:
    """One training, from its start to its end."""

    def __init__(self, trainer: Trainer, session: Session, paths: Paths, report: Report) -> None:
        """Serve *trainer*, which is about to train."""
        self._trainer, self._session, self._paths, self._report = trainer, session, paths, report
        self._metrics = Metrics(trainer, session.checkpointer.metrics)
        self.stopped = False
        """Whether a SIGTERM ends the training, and everything is saved."""
        self._moments = Moments(trainer, self._ask, self._finish)
        self._lookahead = Lookahead(trainer)
        self._asked = trainer.global_step
        self._resuming = Overrides()
        self._shards = shards(trainer.strategy)

    def begin(self) -> None:
        """Take up where the checkpoint that was loaded left off, and begin to ask the policies."""
        own, self._session.own = self._session.own, None
        if own is None:
            self._check_start()
        else:
            self._resuming = resume(self._trainer, own, rank=self._rank)
        self._moments.bind()
        self._lookahead.bind()

    def end(self) -> None:
        """Give Lightning's loops back; can be called many times."""
        self._moments.unbind()
        self._lookahead.unbind()
        self._resuming.take_off()

    @property
    def _rank(self) -> int:
        return self._session.checkpointer.rank

    def note_validation(self) -> None:
        """Say that a validation has ended."""
        step = self._trainer.global_step
        self._metrics.note_validation(step, decided=step == self._asked)

    def _ask(self, epochs_ended: int | None) -> None:
        step, session = self._trainer.global_step, self._session
        self._report.look(step)
        if step == self._asked and epochs_ended is None:
            return
        self._asked = step
        metrics = self._metrics.at(step)
        handle = session.maybe_save(step, partial(self._take, step, metrics), metrics, epochs_ended)
        self._note(handle)
        if session.checkpointer.preempted:
            self._stop()

    def _note(self, handle: SaveHandle | None) -> None:
        if handle is not None:
            self._paths.saved([tier for tier in handle.tiers if not left_out(handle, tier)])
            self._report.saved(handle)

    def _take(self, step: int, metrics: Mapping[str, float]) -> Snapshot:
        self._paths.begin(step_uri(step), metrics)
        checkpoint = snapshot(self._trainer, with_tensors=self._shards is None)
        return Snapshot(
            checkpoint=checkpoint,
            train=self._shards,
            rng_ahead=self._lookahead.correct(checkpoint),
            made=loaders_made(self._trainer),
        )

    def _stop(self) -> None:
        """End the training, with what was saved brought to safety."""
        self.stopped = True
        self._session.checkpointer.wait()
        stop(self._trainer)

    def _finish(self) -> None:
        """Save what waits for the end of the training, and wait for the drain."""
        self._report.waiting()
        self._note(self._session.checkpointer.finish())
        self._report.look(self._trainer.global_step)

    def rescue(self, post_mortem: PostMortem | None) -> None:
        """After a failure: bring the newest step in memory to safety, and keep the state for a look at it."""
        # What the training raised is what counts; what fails here must be heard of beside it, from whichever rank.
        try:
            self._session.checkpointer.promote_newest()
        except Exception as error:
            self._warn(f"the newest step in memory is not brought to the durable tiers: {error}")
        try:
            if post_mortem is not None:
                self._warn(f"the state as it failed is kept in {post_mortem.write(self._trainer)}")
        except Exception as error:
            self._warn(f"the state as it failed is not kept: {error}")

    def _warn(self, text: str) -> None:
        warnings.warn(f"sm_tiered: rank {self._trainer.global_rank}: {text}", stacklevel=2)

    def _check_start(self) -> None:
        """See that a training that begins with nothing restored is meant to.

        Lightning takes ``ckpt_path="last"`` for a fresh start where no `ModelCheckpoint` knows of a file.

        Raises:
            ConfigError: nothing was ever saved, and the trainer has the state of another training.
        """
        step = self._trainer.global_step
        if self._session.asked and step:
            raise ConfigError(
                f"nothing was ever saved to go on from, and this Trainer is at step {step} already",
                hint="Begin with a new Trainer and a new model, or go on with ckpt_path=None.",
            )
        if step or self._session.asked or self._rank:
            return
        try:
            newest = self._session.checkpointer.latest()
        except TieredError as error:
            rank_zero_warn(f"sm_tiered: it can't be told what an earlier training has saved: {error}")
            return
        if newest is not None:
            rank_zero_warn(
                f"sm_tiered: this training begins at step 0, though step {newest} of an earlier one can be restored: "
                "fit(ckpt_path='tiered://latest') goes on from there."
            )
