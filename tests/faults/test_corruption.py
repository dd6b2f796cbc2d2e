"""Damage of every kind in every tier: a restore gives what was saved, or something older that was saved, or raises.

Never other bytes, never a silent fresh start; and whenever the newest is passed over, an event says why.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sm_tiered import layout
from sm_tiered.errors import NothingRestorableError
from sm_tiered.events import CandidateRefused, CopyRefused, Event
from sm_tiered.group import SoloGroup
from sm_tiered.resolve import survey
from sm_tiered.restore import walk
from sm_tiered.settings import S3Settings
from sm_tiered.store import Store
from sm_tiered.testing.plain import PlainEngine, PlainLoader
from tests.faults.core_jobs import NAMESPACE, Job, s3_fields, state

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

STEPS = (10, 20, 30)
WORLD = 2
WHOLE = {step: state(0, step, 0) + state(0, step, 1) for step in STEPS}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root in which three steps by two ranks stand in both tiers, the second one also of an attempt that was left."""
    shm = Path("/dev/shm")
    root = (shm if os.access(shm, os.W_OK) else tmp_path_factory.mktemp("x")) / f"sm_tiered-saved-{os.getpid()}"
    root.mkdir(mode=0o700)
    job = Job(root, world=WORLD, keep=3, durable_keep=9)

    def left_behind(engine: PlainEngine) -> None:
        for step in (10, 20):
            engine.save(step, state(9 if step == 20 else 0, step, engine.group.rank), urgent=True).wait("memory")

    def kept(engine: PlainEngine) -> None:
        engine.restore(10)
        for step in (20, 30):
            engine.save(step, state(0, step, engine.group.rank), urgent=True).wait("memory")

    with job.no_drainer():
        job.work(left_behind)
    assert job.drain() == 0
    with job.no_drainer():
        job.work(kept)
    assert job.drain() == 0
    yield root
    shutil.rmtree(root)


@dataclass
class Rig:
    """A copy of what was saved, and an engine over it that restores again and again."""

    root: Path
    tier: str
    """Which one is damaged."""
    only: bool
    """Whether the other one is empty."""
    store: Store
    told: list[Event] = field(default_factory=list[Event])

    @property
    def directory(self) -> Path:
        return self.root / ("memory-0" if self.tier == "memory" else "durable") / NAMESPACE

    def step_dir(self, step: int) -> Path:
        found = [c for c in map(layout.parse_checkpoint_dir, os.listdir(self.directory)) if c and c.step == step]
        return self.directory / layout.checkpoint_dir(max(found))

    def restore(self) -> tuple[int, bytes] | None:
        self.told.clear()
        group, loader = SoloGroup(), PlainLoader(SoloGroup())
        seen = survey(group, self.store.tiers)
        room, events = self.store.room, self.store.events
        found = walk(group, self.store.tiers, seen, loader, step=None, events=events, room=room, use_memory=False)
        return None if found is None else (found.step, b"".join(data for _, data in sorted(loader.parts.items())))

    def judge(self, what: str, *, newest: bool) -> int | None:
        """Restore and fail unless the answer is right; *newest*: the damage is where it can't pass unnoticed."""
        try:
            found = self.restore()
        except NothingRestorableError:
            return None
        assert found is not None, f"{what}: a silent fresh start"
        step, data = found
        assert data == WHOLE[step], f"{what}: step {step} is given other bytes than were saved"
        if newest and self.only:
            assert step < STEPS[-1], f"{what}: not noticed"
            assert any(isinstance(event, CandidateRefused) for event in self.told), f"{what}: nothing was said"
        if not self.only:
            assert step == STEPS[-1], f"{what}: the other tier was not used"
            if newest and self.tier == "memory":
                assert any(isinstance(event, CopyRefused) for event in self.told), f"{what}: nothing was said"
        return step


@contextmanager
def opened(saved: Path, root: Path, tier: str, *, only: bool, s3: dict[str, Any] | None = None) -> Iterator[Rig]:
    for name in ("memory-0", "durable"):
        if not only or name.startswith(tier):
            shutil.copytree(saved / name, root / name)
    job = Job(root, keep=3, s3=s3)
    store = Store(job.settings(), SoloGroup())
    rig = Rig(root, tier, only, store)
    store.events.emit = rig.told.append  # type: ignore[method-assign]
    try:
        yield rig
    finally:
        store.close()


PLACES = [("memory", True), ("durable", True), ("memory", False), ("durable", False)]


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0]}{'-only' if place[1] else ''}")
def rig(request: pytest.FixtureRequest, saved: Path, memory_dir: Path) -> Iterator[Rig]:
    tier, only = request.param
    with opened(saved, memory_dir, tier, only=only) as found:
        yield found


def stored(directory: Path) -> list[Path]:
    """Return every file that is part of a checkpoint or tells of an attempt."""
    return sorted(path for pattern in ("step_*/*", "attempts/*") for path in directory.glob(pattern))


@contextmanager
def flipped(path: Path, byte: int, bit: int) -> Generator[None]:
    with path.open("r+b") as file:
        before = os.pread(file.fileno(), 1, byte)[0]
        os.pwrite(file.fileno(), bytes([before ^ 1 << bit]), byte)
        yield
        os.pwrite(file.fileno(), bytes([before]), byte)


def flip_many(rig: Rig, count: int, seed: int) -> None:
    chance, files = random.Random(seed), stored(rig.directory)
    newest = rig.step_dir(STEPS[-1])
    for _ in range(count):
        path = chance.choice(files)
        byte, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        with flipped(path, byte, bit):
            what = f"seed {seed}: {path.parent.name}/{path.name}, bit {bit} of byte {byte}"
            rig.judge(what, newest=path.parent == newest)
    assert rig.judge("undamaged", newest=False) == STEPS[-1]


def test_no_flipped_bit_is_restored(rig: Rig) -> None:
    flip_many(rig, 110, seed=1)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_flipped_bit_out_of_thousands_is_restored(rig: Rig) -> None:
    flip_many(rig, 5000, seed=int.from_bytes(os.urandom(4), "big"))


def test_no_flipped_bit_of_a_record_or_a_manifest_is_believed(rig: Rig) -> None:
    """Every 17th byte of them: no field may be one that nobody checks."""
    for path in sorted(rig.step_dir(STEPS[-1]).glob("*.json")):
        for byte in range(0, path.stat().st_size, 17):
            with flipped(path, byte, byte % 8):
                rig.judge(f"{path.name}, byte {byte}", newest=True)


# ---- damage that is not a single bit


def cut(length: Callable[[int], int]) -> Callable[[Rig, Path], None]:
    return lambda _, path: os.truncate(path, length(path.stat().st_size))


def zeroed(_: Rig, path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def longer(_: Rig, path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def missing(_: Rig, path: Path) -> None:
    path.unlink()


def other_rank(_: Rig, path: Path) -> None:
    of_first = {"__1_0.distcp": "__0_0.distcp", "record-00001.json": "record-00000.json"}
    of_second = {"__0_0.distcp": "__1_0.distcp", "record-00000.json": "record-00001.json"}
    shutil.copyfile(path.with_name((of_first | of_second).get(path.name, "record-00000.json")), path)


def of_step_20(rig: Rig, path: Path) -> None:
    shutil.copyfile(rig.step_dir(20) / path.name, path)


def newer_format(_: Rig, path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"format":1', b'"format":2'))


def a_link(rig: Rig, path: Path) -> None:
    path.unlink()
    path.symlink_to(rig.step_dir(20) / path.name)


def a_directory(_: Rig, path: Path) -> None:
    path.unlink()
    path.mkdir()


def not_utf8(_: Rig, path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


DAMAGE: dict[str, Callable[[Rig, Path], None]] = {
    "cut to nothing": cut(lambda _: 0),
    "cut to one byte": cut(lambda _: 1),
    "cut in half": cut(lambda size: size // 2),
    "cut by one byte": cut(lambda size: size - 1),
    "zeroed": zeroed,
    "one byte longer": longer,
    "missing": missing,
    "that of another rank": other_rank,
    "that of another step": of_step_20,
    "of a newer format": newer_format,
    "a link": a_link,
    "a directory": a_directory,
    "not UTF-8": not_utf8,
}


HARMLESS = {
    ("durable", "__0_0.distcp", "one byte longer"),  # nothing that was recorded is read from there
    ("durable", "__1_0.distcp", "one byte longer"),
    ("durable", "manifest.json", "missing"),  # all records are there: whoever comes next commits
}


def put_back(path: Path, data: bytes) -> None:
    """Let *data* stand at *path* again, whatever does now."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_the_newest_step_is_noticed(rig: Rig, damage: str) -> None:
    for path in sorted(rig.step_dir(STEPS[-1]).iterdir()):
        before = path.read_bytes()
        DAMAGE[damage](rig, path)
        if path.exists() and path.is_file() and path.read_bytes() == before and not path.is_symlink():
            continue  # a part has no format of ours
        harmless = (rig.tier, path.name, damage) in HARMLESS
        found = rig.judge(f"{path.name} {damage}", newest=not harmless)
        assert found == (20 if rig.only and not harmless else 30)
        put_back(path, before)
    assert rig.judge("undamaged", newest=False) == 30


def test_a_whole_directory_of_another_step_is_noticed(rig: Rig) -> None:
    newest = rig.step_dir(30)
    shutil.rmtree(newest)
    shutil.copytree(rig.step_dir(20), newest)
    assert rig.judge("step 20 as step 30", newest=True) == (20 if rig.only else 30)


def test_a_part_of_the_same_step_of_an_abandoned_attempt_is_noticed(rig: Rig) -> None:
    newest, ours = rig.step_dir(30).name, rig.step_dir(20)
    for path in rig.root.glob(f"*/{NAMESPACE}/{newest}"):
        shutil.rmtree(path)
    stale = next(path for path in rig.directory.glob("step_0000000020-*") if path != ours)
    shutil.copyfile(stale / "__1_0.distcp", ours / "__1_0.distcp")
    step = 10 if rig.only else 20
    assert rig.restore() == (step, WHOLE[step])


def test_an_abandoned_step_does_not_come_back_when_the_record_of_the_choice_is_damaged(rig: Rig) -> None:
    """All steps of the newest attempt are gone, and so is what tells that it began at step 10, on both tiers."""
    for step in (30, 20):
        name = rig.step_dir(step).name
        for path in rig.root.glob(f"*/{NAMESPACE}/{name}"):
            shutil.rmtree(path)
    for path in rig.root.glob(f"*/{NAMESPACE}/attempts/a000002*"):
        path.write_bytes(path.read_bytes().replace(b"true", b"null"))
    with pytest.raises(NothingRestorableError, match="record of a000002"):
        rig.restore()


def test_when_everything_is_damaged_nothing_is_restored_and_all_is_named(rig: Rig) -> None:
    for path in rig.root.glob(f"*/{NAMESPACE}/step_*/*"):
        path.write_bytes(b"x")
    with pytest.raises(NothingRestorableError) as caught:
        rig.restore()
    for step in STEPS:
        assert f"step {step} of" in caught.value.message


# ---- S3, and what comes after


def test_no_flipped_bit_on_s3_is_restored(
    saved: Path, memory_dir: Path, s3_settings: S3Settings, s3_client: S3Client
) -> None:
    bucket, chance = s3_settings.bucket, random.Random(3)
    root = f"{s3_settings.prefix}/{NAMESPACE}/"
    objects = {
        str(path.relative_to(saved / "durable" / NAMESPACE)): path for path in stored(saved / "durable" / NAMESPACE)
    }
    for key, path in objects.items():
        s3_client.put_object(Bucket=bucket, Key=root + key, Body=path.read_bytes())
    newest = max(key for key in objects if key.startswith("step_")).split("/")[0]
    keys = [key for key in objects if key.startswith(newest)]
    with opened(saved, memory_dir, "s3", only=True, s3=s3_fields(s3_settings)) as rig:
        assert rig.restore() == (30, WHOLE[30])
        for key in [*keys, *chance.choices(keys, k=15)]:
            data = bytearray(objects[key].read_bytes())
            byte, bit = chance.randrange(len(data)), chance.randrange(8)
            data[byte] ^= 1 << bit
            s3_client.put_object(Bucket=bucket, Key=root + key, Body=bytes(data))
            assert rig.judge(f"{key}, bit {bit} of byte {byte}", newest=True) == 20
            s3_client.put_object(Bucket=bucket, Key=root + key, Body=objects[key].read_bytes())
        for data in (b"", objects[keys[0]].read_bytes()[:-1]):
            s3_client.put_object(Bucket=bucket, Key=root + keys[0], Body=data)
            assert rig.judge(f"{keys[0]} with {len(data)} bytes", newest=True) == 20


def test_a_flipped_bit_in_any_chunk_of_a_long_part_is_noticed(memory_dir: Path) -> None:
    size, root = 17 * 1024 * 1024, memory_dir
    job = Job(root)
    job.work(lambda engine: engine.save(1, state(0, 1, 0, size), tiers=["memory"]).wait("memory"))
    part = job.step_dirs()[1] / "__0_0.distcp"
    for byte in (0, 8 * 1024 * 1024 - 1, 8 * 1024 * 1024, size - 1):
        with flipped(part, byte, 5):
            store = Store(job.settings(), SoloGroup())
            with pytest.raises(NothingRestorableError, match=f"chunk {byte // (8 * 1024 * 1024)} "):
                store.restore(PlainLoader(SoloGroup()))
            store.close()


@pytest.mark.parametrize("loss", ["wiped", "damaged"])
def test_memory_is_used_again_after_a_restore_from_the_durable_tier(memory_dir: Path, loss: str) -> None:
    job = Job(memory_dir, world=2)
    with job.no_drainer():
        job.work(lambda engine: engine.save(1, state(0, 1, engine.group.rank)).wait("memory"))
    assert job.drain() == 0
    if loss == "wiped":
        job.wipe()
    else:
        for path in job.step_dirs()[1].glob("__*"):
            os.truncate(path, 100)

    def restored(engine: PlainEngine) -> tuple[int, str]:
        found = engine.restore()
        assert found is not None
        assert found[1] == state(0, found[0], engine.group.rank)
        assert engine.store.restored is not None
        engine.save(found[0] + 1, state(0, found[0] + 1, engine.group.rank), tiers=["memory"]).wait("memory")
        return found[0], engine.store.restored.tier

    assert job.work(restored) == [[1, "durable"]] * 2
    assert job.work(restored) == [[2, "memory"]] * 2
