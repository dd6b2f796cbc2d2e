"""Damage where the arena has no room: a part is read chunk by chunk into the state itself, and each is verified first.

No byte that was not saved may come into the state, not even for a moment; what is wrong once is read again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import RestoreIncompleteError
from sm_tiered.events import CandidateRefused, Event
from sm_tiered.group import SoloGroup
from sm_tiered.resolve import Candidate, survey
from sm_tiered.restore import walk
from sm_tiered.sources import Span
from sm_tiered.store import Store
from sm_tiered.testing.faults import Fault, FaultPlan, FaultyTier, Kind
from sm_tiered.voted_load import Read
from tests.faults.core_jobs import Job, state

STEPS = (10, 20)
CHUNKS = 3
SIZE = (CHUNKS - 1) * CHUNK_BYTES + 1024 * 1024
PIECE = 3 * 1024 * 1024 + 7
"""What a read asks for: hardly ever a chunk, and often of two."""


@pytest.fixture(scope="module")
def whole() -> Mapping[int, bytes]:
    """What was saved, by step."""
    return {step: state(0, step, 0, SIZE) for step in STEPS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, whole: Mapping[int, bytes]) -> Iterator[Job]:
    """Two steps on a durable tier, streamed there by a job without memory."""
    shm = Path("/dev/shm")
    root = (shm if os.access(shm, os.W_OK) else tmp_path_factory.mktemp("x")) / f"sm_tiered-in-place-{os.getpid()}"
    root.mkdir(mode=0o700)
    job = Job(root, in_memory=False)
    try:
        job.work(lambda engine: [engine.save(step, whole[step]).wait("durable") for step in STEPS])
        yield job
    finally:
        shutil.rmtree(root)


@dataclass
class InPlaceLoader:
    """Reads a part of one rank into a state that was there before, piece by piece."""

    state: bytearray = field(default_factory=lambda: bytearray(SIZE))
    tried: list[int] = field(default_factory=list[int])

    def plan(self, candidate: Candidate) -> Mapping[tuple[int, str], Sequence[Span]]:
        """Read everything."""
        self.tried.append(candidate.checkpoint.step)
        return {(0, "__0_0.distcp"): [(0, SIZE)]}

    def check(self, read: Read) -> None:
        """Nothing to refuse."""

    def place(self, read: Read) -> None:
        """Read it."""
        view = memoryview(self.state)
        for offset in range(0, SIZE, PIECE):
            read(0, "__0_0.distcp", offset, view[offset : offset + PIECE])

    def finish(self) -> None:
        """Nothing is left."""


@dataclass
class Rig:
    """A job that has no room, and restores what another one saved."""

    job: Job
    store: Store
    whole: Mapping[int, bytes]
    plan: FaultPlan = field(default_factory=FaultPlan)
    told: list[Event] = field(default_factory=list[Event])
    loader: InPlaceLoader = field(default_factory=InPlaceLoader)

    def restore(self, *faults: Fault) -> int:
        """Restore with *faults*, see that nothing came into the state that was not saved, and return the step."""
        self.told.clear()
        self.loader, self.plan = InPlaceLoader(), FaultPlan(faults=faults)
        group, durable = SoloGroup(), FaultyTier(self.store.tiers.durable["durable"], self.plan)
        tiers = replace(self.store.tiers, durable={"durable": durable})
        seen, room, events = survey(group, tiers), self.store.room, self.store.events
        try:
            found = walk(group, tiers, seen, self.loader, step=None, events=events, room=room, use_memory=False)
        finally:
            # Told by number: pytest would take minutes to show where megabytes differ.
            strange = [i for i in range(CHUNKS) if self.chunk(self.loader.state, i) not in self.allowed(i)]
            assert strange == [], "these chunks of the state were never saved"
        assert found is not None, "a silent fresh start"
        whole = self.whole[found.step]
        other = [i for i in range(CHUNKS) if self.chunk(self.loader.state, i) != self.chunk(whole, i)]
        assert other == [], f"these chunks are not those of step {found.step}"
        return found.step

    def chunk(self, data: bytes | bytearray, index: int) -> bytes:
        """Return one chunk of *data*."""
        return bytes(memoryview(data)[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])

    def allowed(self, index: int) -> list[bytes]:
        """Return what a chunk of the state may be: untouched, or that of a step that was tried."""
        steps = [self.whole[step] for step in self.loader.tried]
        return [self.chunk(data, index) for data in (bytes(SIZE), *steps)]

    @property
    def reads(self) -> int:
        """How many times a part was read from."""
        return [operation for operation, _ in self.plan.calls].count("read_into")

    def part(self, step: int) -> Path:
        """Return where the part of *step* is."""
        return self.job.step_dirs("durable")[step] / "__0_0.distcp"

    def refused(self) -> list[str]:
        """Return why candidates were refused."""
        return [event.reason for event in self.told if isinstance(event, CandidateRefused)]


@pytest.fixture(params=["no memory tier", "no room"])
def rig(request: pytest.FixtureRequest, saved: Job, memory_dir: Path, whole: Mapping[int, bytes]) -> Iterator[Rig]:
    in_memory = request.param == "no room"
    settings = replace(saved, in_memory=in_memory).settings(memory=memory_dir / "memory")
    store = Store(settings, SoloGroup())
    found = Rig(saved, store, whole)
    store.events.emit = found.told.append  # type: ignore[method-assign]
    if in_memory:
        store.room = lambda size: None
    try:
        yield found
    finally:
        store.close()


Place = Literal["first", "last"]


@contextmanager
def flipped(path: Path, chunk: int, place: Place = "first") -> Generator[None]:
    """Change one bit of the first or the last byte of a chunk meanwhile."""
    byte = chunk * CHUNK_BYTES if place == "first" else min((chunk + 1) * CHUNK_BYTES, SIZE) - 1
    with path.open("r+b") as file:
        before = os.pread(file.fileno(), 1, byte)[0]
        os.pwrite(file.fileno(), bytes([before ^ 32]), byte)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), bytes([before]), byte)


def test_without_room_each_chunk_is_read_once_and_by_itself(rig: Rig) -> None:
    """Or the other tests would look at another way of reading."""
    assert rig.restore() == 20
    assert rig.reads == CHUNKS
    assert rig.refused() == []


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_flipped_bit_in_any_chunk_is_found_and_the_step_before_is_used(rig: Rig, place: Place) -> None:
    for chunk in range(CHUNKS):
        with flipped(rig.part(20), chunk, place):
            assert rig.restore() == 10
            (reason,) = rig.refused()
            assert f"chunk {chunk} has XXH3-128" in reason
            assert rig.reads == chunk + 2 + CHUNKS, "a bad chunk is read twice, those after it not at all"
    assert rig.restore() == 20


def test_where_no_step_is_whole_the_state_is_said_to_be_spoilt(rig: Rig) -> None:
    for newer, older in ((0, 2), (2, 0), (1, 1)):
        with ExitStack() as stack:
            stack.enter_context(flipped(rig.part(20), newer))
            stack.enter_context(flipped(rig.part(10), older))
            with pytest.raises(RestoreIncompleteError) as caught:
                rig.restore()
        for step, chunk in ((20, newer), (10, older)):
            assert f"step {step} of" in caught.value.message
            assert f"chunk {chunk} has XXH3-128" in caught.value.message


@pytest.mark.parametrize("length", [0, CHUNK_BYTES, SIZE - 1])
def test_a_part_that_was_cut_is_found_and_the_step_before_is_used(rig: Rig, length: int) -> None:
    path = rig.part(20)
    aside = path.with_name("aside")
    shutil.copyfile(path, aside)
    try:
        os.truncate(path, length)
        assert rig.restore() == 10
        assert len(rig.refused()) == 1
    finally:
        aside.replace(path)


# ---- what is wrong in transfer


def strike(kind: Kind, number: int, times: int) -> Fault:
    """Let the reads from *number* on go wrong."""
    return Fault(kind=kind, operations=frozenset({"read_into"}), first=number, times=times)


@pytest.mark.parametrize("number", range(1, CHUNKS + 1))
def test_a_read_that_is_wrong_once_is_done_again(rig: Rig, number: int) -> None:
    assert rig.restore(strike("flip", number, 1)) == 20
    assert len(rig.plan.fired) == 1
    assert rig.reads == CHUNKS + 1
    assert rig.refused() == []


@pytest.mark.parametrize("number", range(1, CHUNKS + 1))
def test_a_read_that_is_wrong_twice_is_refused(rig: Rig, number: int) -> None:
    assert rig.restore(strike("flip", number, 2)) == 10
    assert len(rig.plan.fired) == 2
    assert rig.reads == number + 1 + CHUNKS
    (reason,) = rig.refused()
    assert f"chunk {number - 1} has XXH3-128" in reason


@pytest.mark.parametrize("number", range(1, CHUNKS + 1))
def test_a_read_that_gives_nothing_is_not_taken_for_the_chunk_before(rig: Rig, number: int) -> None:
    """The buffer is the same for all chunks, and what it holds is older."""
    assert rig.restore(strike("silent", number, 2)) == 10
    assert len(rig.refused()) == 1
