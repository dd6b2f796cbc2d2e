"""Loading one candidate on all ranks together, each step voted on.

A rank votes once when it has verified all that its own plan touches, and once when the bytes are placed; whatever one
raises is its vote, so that no rank is left waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn, Protocol

from sm_tiered.crashpoints import crashpoint
from sm_tiered.errors import (
    CorruptPartError,
    RestoreError,
    RestoreIncompleteError,
    TieredError,
    TierUnavailableError,
    error_from_json,
    error_to_json,
)
from sm_tiered.group import Group
from sm_tiered.resolve import Candidate, Tiers
from sm_tiered.sources import PartSourceReader, Room, Span, open_part, touched_chunks

__all__ = ["Loaded", "Loader", "Opened", "Read", "Walk", "load"]


class Read(Protocol):
    """The parts that a plan names, open and verified."""

    def __call__(self, rank: int, part: str, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with the bytes of that rank's part from *offset* on."""
        ...

    def file(self, rank: int, part: str) -> str | None:
        """Return the path of the file in memory that is this part, or None where it comes from elsewhere.

        Of it are verified the bytes that the plan names. It stays as it is until the load is over.
        """
        ...


class Loader(Protocol):
    """What an integration does with a candidate. Each method may raise on any rank: all ranks then act alike."""

    def plan(self, candidate: Candidate) -> Mapping[tuple[int, str], Sequence[Span]]:
        """Return what this rank will read: spans by (rank, part). The first time that the state may be looked at.

        Raises:
            MismatchError: the state does not fit; no older candidate is tried then.
        """
        ...

    def check(self, read: Read) -> None:
        """Read what may be refused for what it holds, such as a pickle, and keep it. Nothing is placed yet."""
        ...

    def place(self, read: Read) -> None:
        """Copy the bytes into the state. Nothing of the user's is called."""
        ...

    def finish(self) -> None:
        """Hand the filled state over (``load_state_dict``): every rank has placed all its bytes."""
        ...


class Loaded(NamedTuple):
    """What was read of the candidate that was taken."""

    tiers: str
    """Those that any rank read from, joined with ``+``, in recipe order."""
    bytes: int
    """That this rank read."""


@dataclass(slots=True, kw_only=True)
class Walk:
    """What the candidates of one restore share."""

    group: Group
    tiers: Tiers
    loader: Loader
    room: Room
    use_memory: bool
    placed: bool = False
    silent: TierUnavailableError | None = None
    """What a tier said that did not answer. From then on only memory counts, on all ranks alike."""
    skipped: dict[str, str] = field(default_factory=dict[str, str])
    """Optional tiers that did not answer, with the reason: the restore goes on without them, on all ranks alike."""
    passed_over: list[str] = field(default_factory=list[str])
    """Why parts of the present candidate did not come from the nearest tier."""

    def skip(self, silent: Mapping[str, str]) -> None:
        """Go on without these optional tiers, which did not answer, for the reason given."""
        self.skipped |= silent
        self.tiers = self.tiers.without(silent)

    def without_durable(self, error: TierUnavailableError) -> None:
        """Go on from memory alone if the recipe allows it, for an older checkpoint would silently lose steps."""
        if not self.use_memory:
            self.give_up(error)
        self.silent = error
        self.tiers = replace(self.tiers, durable={})

    def give_up(self, error: TieredError) -> NoReturn:
        """Raise *error*, or what says that the state is no longer what it was."""
        if not self.placed or isinstance(error, RestoreIncompleteError):
            raise error
        raise RestoreIncompleteError(
            f"after bytes were placed: {error.message}",
            hint="The state must not be used: build it anew.",
            step=error.step,
            rank=error.rank,
        ) from error


def load(state: Walk, candidate: Candidate) -> Loaded | str:
    """Load one candidate; return what was read, or why it was refused. Collective."""
    with ExitStack() as stack:
        opened, error = _prepare(state, candidate, stack)
        crashpoint("restore.before_vote")
        refused = _voted(state, error)
        crashpoint("restore.after_vote")
        if refused is not None:
            return refused
        state.placed = True
        placed = _guard(lambda: state.loader.place(opened))
        refused = _voted(state, placed)
        if refused is not None:
            return refused
        _finish(state, candidate)
        used = {name for names in state.group.gather(sorted(opened.tiers)) for name in names}
    order = [state.tiers.memory.name] if state.tiers.memory else []
    order += list(state.tiers.durable)
    return Loaded("+".join(name for name in order if name in used), opened.bytes)


def _voted(state: Walk, error: TieredError | None) -> str | None:
    """`_vote`; what no candidate could mend is another error once bytes were placed."""
    try:
        return _vote(state, error)
    except RestoreError as verdict:
        state.give_up(verdict)


def _finish(state: Walk, candidate: Candidate) -> None:
    try:
        refused = _vote(state, _guard(state.loader.finish))
    except RestoreError as error:
        refused = error.message
    if refused is not None:
        raise RestoreIncompleteError(
            f"load_state_dict failed: {refused}",
            hint="The state must not be used: build it anew.",
            step=candidate.checkpoint.step,
        )


class Opened:
    """The parts that one rank reads, open and verified. A `Read`."""

    def __init__(self) -> None:
        self.parts: dict[tuple[int, str], PartSourceReader] = {}
        self.bytes = 0

    @property
    def tiers(self) -> set[str]:
        return {part.tier for part in self.parts.values()}

    def __call__(self, rank: int, part: str, offset: int, buffer: memoryview) -> None:
        self.parts[rank, part].read_into(offset, buffer)

    def file(self, rank: int, part: str) -> str | None:
        return self.parts[rank, part].path


def _prepare(state: Walk, candidate: Candidate, stack: ExitStack) -> tuple[Opened, TieredError | None]:
    """Plan, open and verify everything that this rank reads."""
    opened = Opened()

    def open_and_check() -> None:
        _open_all(state, candidate, opened, stack)
        state.loader.check(opened)

    return opened, _guard(open_and_check)


def _open_all(state: Walk, candidate: Candidate, opened: Opened, stack: ExitStack) -> None:
    """Open what is to be read. A damaged replica is only a second source: the same items stand whole farther away."""
    refused: list[str] = []
    while True:
        state.passed_over[:] = refused
        opened.parts.clear()
        opened.bytes = 0
        damaged = _open_each(state, candidate, opened, stack)
        if damaged is None:
            return
        rank, reason = damaged
        refused.append(reason)
        candidate = replace(candidate, near=candidate.near - {rank})


def _open_each(state: Walk, candidate: Candidate, opened: Opened, stack: ExitStack) -> tuple[int, str] | None:
    """Open the parts of one plan; return the rank whose replica is damaged, and how, if that is all that is wrong."""
    for (rank, name), spans in state.loader.plan(candidate).items():
        part = next(part for part in candidate.records[rank].parts if part.name == name)
        chunks = touched_chunks(spans)
        try:
            source = open_part(state.tiers, candidate, rank, part, chunks, state.room, state.passed_over)
        except CorruptPartError as error:
            if not part.replica or not candidate.durable:
                raise
            return rank, error.message
        stack.callback(source.close)
        opened.parts[rank, name] = source
        opened.bytes += sum(length for _, length in spans)
    return None


def _guard(action: Callable[[], None]) -> TieredError | None:
    """Run *action*; what it raises becomes this rank's vote, so that no rank is left waiting."""
    try:
        action()
    except TieredError as error:
        return error
    except Exception as error:  # A user's state_dict may raise anything; it must reach the vote.
        wrapped = RestoreError(f"{type(error).__name__}: {error}"[:500])
        wrapped.__cause__ = error
        return wrapped
    return None


def _vote(state: Walk, error: TieredError | None) -> str | None:
    """Return None when all ranks are well, else why not.

    A `RestoreError` on any rank (a state that does not fit, a ``state_dict`` that raises) is nothing that an older
    candidate could mend: it is raised on all ranks.
    """
    votes = state.group.gather(error_to_json(error) if error is not None else None)
    failed = {rank: error_from_json(vote) for rank, vote in enumerate(votes) if vote is not None}
    for rank, verdict in failed.items():
        if isinstance(verdict, RestoreError):
            if isinstance(error, RestoreError):
                raise error
            verdict.rank = rank if verdict.rank is None else verdict.rank
            raise verdict
    if not failed:
        return None
    rank, first = next(iter(failed.items()))
    more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    refused = f"rank {rank}: {first.message}{more}"
    silent = [verdict for verdict in failed.values() if isinstance(verdict, TierUnavailableError)]
    optional = {verdict.tier: verdict.message for verdict in silent if verdict.tier in state.tiers.optional}
    state.skip(optional)
    required = next((verdict for verdict in silent if verdict.tier not in optional), None)
    if required is not None:
        state.without_durable(required)
    return refused
