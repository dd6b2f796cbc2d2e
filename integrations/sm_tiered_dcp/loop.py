"""What a training loop asks for: saves by policy, the end of a training, waiting and closing. Whatever is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from sm_tiered import layout
from sm_tiered.errors import ConfigError, TieredError
from sm_tiered.events import Preempted, SaveFailed, SaveRequested
from sm_tiered.figures import left_out
from sm_tiered.handle import SaveHandle
from sm_tiered.policies.context import Need, check_metrics
from sm_tiered.pulse import Pulse
from sm_tiered.restore import Restored
from sm_tiered.schedule import Due
from sm_tiered_dcp.engine import Engine, RecipeLike, open_engine

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ContentSaver", "SaveLoop"]

_Content = TypeVar("_Content")
_Saved = TypeVar("_Saved", contravariant=True)


class ContentSaver(Protocol[_Saved]):
    """What knows how to save one kind of content."""

    def save(
        self,
        step: int,
        state: _Saved,
        *,
        tiers: Sequence[str] | None = None,
        metrics: Mapping[str, float] | None = None,
        urgent: bool = False,
    ) -> SaveHandle:
        """Save *state* as *step*; when this returns it may change. Collective."""
        ...


class SaveLoop(Generic[_Content]):
    """The collective life of one job's checkpoints. What is saved, and how it is restored, its children say.

    ``from_recipe``, ``maybe_save`` where something may be due, ``save`` and ``finish`` are collective; ``latest``,
    ``wait``, ``close`` and handles never are. As a context manager it calls `finish` at a normal end where the recipe
    saves ``on_end``, and always `close`.
    """

    def __init__(self, engine: Engine) -> None:
        """Use `from_recipe`."""
        self._engine: Engine | None = engine
        self._saver = self._make_saver(engine)
        self._pulse = Pulse(engine.group.rank)
        self._last: tuple[int, _Content, Mapping[str, float]] | None = None
        self._ended: SaveHandle | None = None
        """What `finish` saved: the end of a block, after it, saves that no more."""
        self.restored: Restored | None = None
        """What the last `restore` took: step, tier, seconds; None when nothing was ever saved."""

    def _make_saver(self, engine: Engine) -> ContentSaver[_Content]:
        raise NotImplementedError

    @classmethod
    def from_recipe(cls, recipe: RecipeLike) -> Self:
        """Open the tiers of *recipe*: a path, a mapping or a `sm_tiered.recipe.Recipe`. Collective.

        Raises:
            ConfigError: the recipe can't be used, ranks have different ones, or a directory tier is not shared.
            NamespaceInUseError: trainers of another launch are alive in this memory directory.
        """
        return cls(open_engine(recipe))

    @property
    def preempted(self) -> bool:
        """Whether a SIGTERM had come to any rank by the last `maybe_save` or `ask`: the same on every rank.

        So all can stop on it. False for ever where no policy of the recipe waits for one.
        """
        return self._open.schedule.preempted

    @property
    def notices_sigterm(self) -> bool:
        """Whether a policy of the recipe waits for a SIGTERM."""
        return Need.SIGNAL in self._open.schedule.needs

    @property
    def waits_for_metrics(self) -> bool:
        """Whether a policy of the recipe looks at metrics before it saves."""
        return Need.METRICS in self._open.schedule.needs

    @property
    def rank(self) -> int:
        """Of this process among those that save together."""
        return self._open.group.rank

    @property
    def metrics(self) -> frozenset[str]:
        """The names of the metrics that keep policies rank checkpoints by."""
        return self._open.schedule.metrics

    @property
    def _open(self) -> Engine:
        if self._engine is None:
            raise ConfigError(
                f"this {type(self).__name__} is closed", hint="Open another one with from_recipe(recipe)."
            )
        return self._engine

    def maybe_save(
        self,
        step: int,
        state: _Content,
        *,
        metrics: Mapping[str, float] | None = None,
        epochs_ended: int | None = None,
    ) -> SaveHandle | None:
        """Save *state* to the tiers whose policy wants *step*; None when none does. Collective.

        Call it once a step, on every rank. Where it costs something to have the state, give a function that returns
        it: it is called only where something is due, and again by `finish`.

        Args:
            step: of the training, 0 <= step < 10**10.
            state: see `save`.
            metrics: by name; those that keep policies rank by must be among them, or none.
            epochs_ended: where an epoch ends with this step, how many are over; the same on every rank.

        Raises:
            SaveError: see `save`; with ``on_error: raise`` also what an earlier save failed of.
        """
        engine = self._open
        step, found = layout.check_step(step), check_metrics(metrics or {}, wanted=engine.schedule.ranked_by)
        self._last = (step, state, found)
        due = self.ask(step, metrics=found, epochs_ended=epochs_ended)
        return self.save_due(step, state, due, metrics=found)

    def ask(
        self,
        step: int,
        *,
        metrics: Mapping[str, float] | None = None,
        epochs_ended: int | None = None,
        ending: bool = False,
    ) -> Due:
        """Return the tiers whose policy wants *step*: for a loop that has its state only later. Collective.

        Call it once a step, on every rank, in the place of `maybe_save`, and `save_due` where a tier is due. What is
        asked about so, `finish` does not know: *ending* says that the training ends with this step.
        """
        engine = self._open
        step, found = layout.check_step(step), check_metrics(metrics or {}, wanted=engine.schedule.ranked_by)
        ended = layout.check_step(epochs_ended, name="epochs_ended") if epochs_ended is not None else None
        due = engine.schedule.due(step, metrics=found, epochs_ended=ended, ending=ending)
        if due.preempted:
            engine.store.events.emit(Preempted(step=step))
        if due.requested:
            engine.store.events.emit(SaveRequested(step=step))
        self._pulse.beat(step, engine.store.events)
        return due

    def save_due(
        self,
        step: int,
        state: _Content,
        due: Due,
        *,
        metrics: Mapping[str, float] | None = None,
        urgent: bool = False,
    ) -> SaveHandle | None:
        """Save *state* as *step* to the tiers that are *due*, as `ask` said; None when none is. Collective.

        *urgent*: durable tiers are queued even behind a step that is still draining, as they are after a SIGTERM.

        Raises: see `save`.
        """
        engine = self._open
        step, found = layout.check_step(step), check_metrics(metrics or {}, wanted=engine.schedule.ranked_by)
        if not due.tiers:
            return None
        return self._save(step, state, tuple(sorted(due.tiers)), found, urgent=urgent or due.preempted)

    def save(
        self,
        step: int,
        state: _Content,
        tiers: Sequence[str] | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> SaveHandle:
        """Save *state* as *step* to *tiers* (None: all) and return a handle; the state may change at once. Collective.

        Durable tiers that are named are queued even behind a step that is still draining; with ``tiers=None`` a busy
        drain makes the newest step win, as with `maybe_save`. A step is written once in an attempt: a second save of
        it adds the tiers and metrics that the first lacked.

        Raises:
            ConfigError: the step, a tier's name or a metric can't be used.
            StructureError: ranks disagree, or the state can't be one checkpoint.
            UnsafeValueError: a value that only a pickle could store.
            RankFailedError: another rank could not read its state.
            SaveError: with ``on_error: raise``, what an earlier save failed of.
        """
        named = tuple(sorted(self._open.tiers(tiers)))
        step, found = layout.check_step(step), check_metrics(metrics or {}, wanted=self._open.schedule.ranked_by)
        self._last = (step, state, found)
        return self._save(step, state, named, found, urgent=tiers is not None)

    def _save(
        self, step: int, state: _Content, tiers: tuple[str, ...], metrics: Mapping[str, float], *, urgent: bool
    ) -> SaveHandle:
        handle = self._saver.save(step, state, tiers=tiers, metrics=metrics, urgent=urgent)
        self._open.schedule.note_saved(
            step,
            tiers,
            metrics=metrics,
            blocked_secs=handle.blocked_secs,
            left_out=[tier for tier in tiers if left_out(handle, tier)],
        )
        return handle

    def finish(self) -> SaveHandle | None:
        """End the training: save what ``on_end`` wants of the last step seen, and wait for the drain. Collective.

        Where nothing was left to train after a `restore`, what was restored from memory is what ``on_end`` wants: an
        earlier launch may have died before its last save. Returns the handle of what was saved.

        Raises:
            DeadlineExceededError: the drain took longer than ``drain_timeout_secs``; it goes on without us.
            SaveError: with ``on_error: raise``, what a save failed of.
        """
        handle = self._save_at_end()
        self.wait()
        self._pulse.end("finished", self._open.store.events)
        return handle

    def _save_at_end(self) -> SaveHandle | None:
        engine = self._open
        if self._last is None:
            if self.restored is not None:
                due = engine.schedule.due(self.restored.step, metrics={}, ending=True)
                engine.saver.promote_restored(self.restored, due.tiers)
            return None
        step, state, metrics = self._last
        due = engine.schedule.due(step, metrics=metrics, ending=True)
        if self._ended is None or self._ended.step != step:
            tiers = tuple(sorted(due.tiers))
            self._ended = self._save(step, state, tiers, metrics, urgent=True) if tiers else None
        return self._ended

    def promote_newest(self) -> int | None:
        """After a failure: bring the newest step that this process knows whole in memory to the durable tiers.

        Return the step; None where there is none, or where it is on its way to all of them already, or there. Nothing
        is captured, for the state may be half updated. Not collective. The drainer does the work, and goes on without
        this process.

        Raises:
            TieredError: the drainer could not be told.
        """
        return self._open.saver.promote_newest()

    def latest(self) -> int | None:
        """Return the newest step that this process sees complete on any tier, or None. Not collective.

        Raises:
            TierUnavailableError: a durable tier did not answer.
        """
        return self._open.store.latest()

    def unused_step(self) -> int:
        """Return a step above all that any rank sees on any tier, complete or not. Collective.

        Raises:
            TierUnavailableError: a durable tier did not answer.
        """
        return self._open.store.unused_step()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every save has ended on every tier it was due for. Not collective.

        Args:
            timeout: in seconds; None: ``drain_timeout_secs`` of the recipe.

        Raises:
            DeadlineExceededError: one has not; it goes on in the background.
            SaveError: with ``on_error: raise``, what a save failed of.
        """
        engine = self._open
        engine.saver.wait(engine.settings.drain_timeout_secs if timeout is None else timeout)

    def close(self) -> None:
        """Wait for the drain as `wait` does, then let go of everything. Not collective; can be called many times."""
        if self._engine is None:
            return
        try:
            self.wait()
        finally:
            self._let_go("closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is None:
            return
        if error is not None:
            # What the training raised counts; nothing of ours may hide it or make it wait.
            try:
                self._rescue()
            finally:
                self.abandon()
            return
        try:
            if self._engine.schedule.saves_on_end:
                self.finish()
        except BaseException:
            self.abandon()  # it has waited for the drain already, or can't
            raise
        self.close()

    def abandon(self) -> None:
        """Let go at once, after the training has failed: nothing is waited for, and what the drainer has goes on."""
        self._let_go("failed")

    def _let_go(self, how: str) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            self._pulse.end(how, engine.store.events)
            engine.close(patient=False)

    def _rescue(self) -> None:
        """Bring the newest whole step to the tiers that save ``on_exception``."""
        engine, last = self._open, self._last
        step = last[0] if last is not None else 0
        try:
            tiers = engine.schedule.after_exception(step)
            if tiers:
                engine.saver.promote_newest(tiers)
        except (TieredError, OSError) as error:
            engine.store.events.emit(SaveFailed(step=step, tier="memory", error=error))
