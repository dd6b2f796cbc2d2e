"""What both releases of the predecessor wrote, in S3 and in the cluster's service, read by us and by stock DCP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sm_tiered import layout
from sm_tiered.settings import S3Settings
from sm_tiered.testing.daemon import DaemonFault, StandInDaemon
from sm_tiered.verify import State, verify_checkpoint
from sm_tiered_dcp import TieredCheckpointer, TieredStorageReader, TieredStorageWriter
from sm_tiered_dcp.predecessor import Source, import_step
from sm_tiered_dcp.predecessor.origins import open_daemon
from tests.distributed.dcp_jobs import NAMESPACE, run
from tests.distributed.dcp_jobs import recipe as jobs_recipe
from tests.integrations import predecessor_job
from tests.integrations.predecessor_made import directory
from tests.integrations.predecessor_place import BASE, STEPS, Place, empty_state, same, wanted_state
from tests.predecessor import DOCUMENTED, NEWEST, running_server

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

pytestmark = [
    pytest.mark.xdist_group("predecessor"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


@pytest.fixture(scope="module")
def place(make_s3_settings: Callable[..., S3Settings]) -> Iterator[Place]:
    with StandInDaemon() as daemon:
        yield Place(make_s3_settings(prefix=BASE), daemon)


@pytest.fixture(autouse=True)
def no_faults(place: Place) -> None:
    place.daemon.restart()


@pytest.fixture(scope="module")
def saved(place: Place, s3_client: S3Client) -> dict[str, tuple[str, int]]:
    """Namespaces, with the release and the number of ranks that wrote them."""
    del s3_client
    made = {"documented": (DOCUMENTED, 1), "newest-2": (NEWEST, 2)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}.items():
            patch.setenv(name, value)
        for namespace, (version, world) in made.items():
            place.save(version, namespace, world)
    return made


def check(source: Source, version: str, world: int, tmp_path: Path) -> None:
    """Import all of *source*; stock DCP and we load every step, equal to the bit."""
    del version
    target = directory(tmp_path / "out", "ours")
    listed = source.listed()
    assert [found.step for found in listed] == sorted(STEPS, reverse=True)
    for found in listed:
        imported = import_step(source, found, target, namespace="ours")
        assert (imported.world, imported.already) == (world, False)
        assert verify_checkpoint(target, imported.checkpoint, durable=True).state is State.WHOLE
        state = empty_state(world)
        where = tmp_path / "out" / "ours" / layout.checkpoint_dir(imported.checkpoint)
        dcp.load(state, storage_reader=dcp.FileSystemReader(where), no_dist=True)
        same(state, wanted_state(found.step, world))
    again = import_step(source, listed[0], target, namespace="ours")
    assert again.already
    source.close()


@pytest.mark.parametrize("namespace", ["documented", "newest-2"])
@pytest.mark.parametrize("kind", ["s3", "service"])
def test_every_value_is_what_was_saved(
    kind: str, namespace: str, place: Place, saved: dict[str, tuple[str, int]], tmp_path: Path
) -> None:
    source = place.s3(namespace) if kind == "s3" else place.service(namespace)
    check(source, *saved[namespace], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("version", "by_step"), [(DOCUMENTED, False), (NEWEST, False), (NEWEST, True)], ids=["1.0", "1.1", "1.1-ray"]
)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_releases_layouts_and_worlds(version: str, by_step: bool, world: int, place: Place, tmp_path: Path) -> None:
    namespace = f"all-{version.replace('.', '-')}-{by_step}-{world}"
    place.save(version, namespace, world, by_step=by_step)
    check(place.s3(namespace), version, world, tmp_path / "s3")
    check(place.service(namespace), version, world, tmp_path / "service")


@pytest.mark.long
@pytest.mark.parametrize("version", [DOCUMENTED, NEWEST])
def test_from_its_own_test_server(version: str, place: Place, tmp_path: Path) -> None:
    with running_server() as server:
        place.save(version, "own-server", 2, daemon=server.url, base="")
        check(open_daemon(replace(place.service_settings(), url=server.url), "own-server"), version, 2, tmp_path)


def recipe(tmp_path: Path, memory: Path, namespace: str, tier: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"version: 1\nnamespace: {namespace}\ntiers:\n"
        f"  memory: {{kind: memory, path: {memory}, allow_disk: true, keep: {{latest: 2}}}}\n  {tier}\n",
        encoding="utf-8",
    )
    return path


def test_a_job_goes_on_from_it_and_its_own_saves_come_first(
    place: Place, saved: dict[str, tuple[str, int]], tmp_path: Path, memory_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SM_TIERED_DRAINER_IDLE_SECS", "0.1")
    world = saved["newest-2"][1]
    target = directory(tmp_path / "out", "ours")
    source = place.s3("newest-2")
    newest, older = source.listed()
    first = import_step(source, newest, target, namespace="ours").checkpoint
    text = f"local: {{kind: local, path: {tmp_path / 'out'}, fsync: false, keep: {{latest: 2}}}}"
    ours = recipe(tmp_path, memory_dir, "ours", text)
    with TieredCheckpointer.from_recipe(ours) as checkpointer:
        state = empty_state(world)
        assert checkpointer.restore(state) == 20
        same(state, wanted_state(20, world))
        assert checkpointer.restored is not None
        assert checkpointer.restored.checkpoint == first
        state["step"] = 25
        checkpointer.save(25, state, tiers=["local"]).wait("local")
    (record,) = [path for path in (tmp_path / "out/ours/attempts").iterdir() if str(first.attempt) not in path.name]
    assert record.name.startswith("a000002-")
    assert json.loads(record.read_text())["parent"] == layout.checkpoint_dir(first)
    import_step(source, older, target, namespace="ours")  # late, and below all of ours
    with TieredCheckpointer.from_recipe(ours) as checkpointer:
        assert checkpointer.latest() == 25
        assert checkpointer.restore(state) == 25
        assert checkpointer.restore(empty_state(world), step=20) == 20


# ---- by other numbers of ranks, and by other readers


def _load(rank: int, which: dict[str, Any], directory: str, world: int) -> list[str]:
    """Load step 20, saved by two ranks, with our checkpointer, our reader and stock DCP."""
    ours, wanted = predecessor_job.state(999, sharded=True), predecessor_job.state(20, sharded=True)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        assert checkpointer.restore(ours) == 20
    found = {"checkpointer": ours}
    for name in ("reader", "stock"):
        reader = TieredStorageReader(which) if name == "reader" else dcp.FileSystemReader(directory)
        state = found[name] = predecessor_job.state(999, sharded=True)
        dcp.load(state, storage_reader=reader)
        if isinstance(reader, TieredStorageReader):
            reader.close()
    for name, state in found.items():
        assert torch.equal(state["sharded"].full_tensor(), predecessor_job.whole(20)), name
        same({**state, "sharded": 0}, {**wanted, "sharded": 0}, name)
    return sorted(found)


@pytest.mark.parametrize("world", [3, pytest.param(1, marks=pytest.mark.long)])
def test_what_two_ranks_saved_is_loaded_by_another_number(
    world: int, place: Place, saved: dict[str, tuple[str, int]], tmp_path: Path, memory_dir: Path
) -> None:
    assert saved["newest-2"][1] == 2
    target, source = directory(tmp_path / "disk", NAMESPACE), place.s3("newest-2")
    checkpoint = import_step(source, source.listed()[0], target, namespace=NAMESPACE).checkpoint
    where = tmp_path / "disk" / NAMESPACE / layout.checkpoint_dir(checkpoint)
    which = jobs_recipe(tmp_path, memory_dir)
    assert run(world, _load, which, str(where), world) == [["checkpointer", "reader", "stock"]] * world


def _write(rank: int, which: dict[str, Any]) -> None:
    """Save with our drop-in, as a script of the predecessor's does."""
    writer = TieredStorageWriter(which, step=20, tiers=("disk", "s3"))
    dcp.save(predecessor_job.state(20, sharded=True), storage_writer=writer)
    assert writer.handle is not None
    for tier in ("disk", "s3"):
        writer.handle.wait(tier)
    writer.close()


def _read_stock(rank: int, directory: str, uri: str, endpoint: str) -> None:
    import s3torchconnector.dcp as connector
    from s3torchconnector import S3ClientConfig

    options: Any = {"s3client_config": S3ClientConfig(force_path_style=True)}
    for reader in (dcp.FileSystemReader(directory), connector.S3StorageReader("us-east-1", uri, **options)):
        state = predecessor_job.state(999, sharded=True)
        dcp.load(state, storage_reader=reader)
        assert torch.equal(state["sharded"].full_tensor(), predecessor_job.whole(20))
        same({**state, "sharded": 0}, {**predecessor_job.local_state(20), "sharded": 0})


@pytest.mark.parametrize("world", [1, pytest.param(3, marks=pytest.mark.long)])
def test_what_we_write_users_of_stock_dcp_can_read(
    world: int, s3_settings: S3Settings, s3_endpoint: str, tmp_path: Path, memory_dir: Path
) -> None:
    uri, env = f"s3://{s3_settings.bucket}/ours", {"AWS_ENDPOINT_URL": s3_endpoint}
    s3 = {"kind": "s3", "uri": uri, "endpoint_url": s3_endpoint, "force_path_style": True, "region": "us-east-1"}
    run(2, _write, jobs_recipe(tmp_path, memory_dir, tiers={"s3": s3}), env=env)
    (where,) = (tmp_path / "disk" / NAMESPACE).glob("step_*")
    run(world, _read_stock, str(where), f"{uri}/{NAMESPACE}/{where.name}/", s3_endpoint, env=env)


def test_a_service_that_stops_in_the_middle_is_asked_again(
    place: Place, saved: dict[str, tuple[str, int]], tmp_path: Path
) -> None:
    del saved
    source = place.service("documented")
    listed = source.listed()[0]
    place.daemon.restart(
        DaemonFault(kind="reset", method="GET", path="/documented/0/20", at=5000, first=2, times=1),
        DaemonFault(kind="flip", method="GET", path="/documented/0/20", at=800, first=3, times=1),
        DaemonFault(kind="status", method="GET", path="/documented/1/20", status=503, times=1),
    )
    found = import_step(source, listed, directory(tmp_path / "out", "ours"), namespace="ours")
    assert len(place.daemon.fired) == 3
    assert found.world == 1
