"""The commands that change something, as processes, beside jobs that live, die and were killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from sm_tiered import crashpoints, drainer, layout
from sm_tiered.group import Group
from sm_tiered.locks import probe
from sm_tiered.recipe import Recipe
from sm_tiered.testing.plain import PlainEngine
from tests.faults.core_jobs import NAMESPACE, Job, killed, origin, state
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
TIMEOUT_SECS = 60


@pytest.fixture(autouse=True)
def quick_drainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end soon, and are not at the lowest priority while others use the machine."""
    monkeypatch.setenv("SM_TIERED_DRAINER_IDLE_SECS", "0.1")
    monkeypatch.setattr(drainer, "_NICE", 0)


def recipe(job: Job, node: int = 0, **changes: Any) -> Path:
    """Write the recipe of a rank on *node*."""
    path = job.root / f"recipe-{node}-{len(changes)}.yaml"
    path.write_text(yaml.safe_dump({**job.recipe(node), **changes}, sort_keys=False), encoding="utf-8")
    return path


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start a command."""
    return subprocess.Popen(
        [sys.executable, "-m", "sm_tiered.cli.app", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a command: its status, output and errors."""
    with process:
        out, err = process.communicate(timeout=TIMEOUT_SECS)
    assert "Traceback" not in err
    return process.returncode, out, err


def command(*arguments: object, **environment: str) -> tuple[int, str, str]:
    """Run a command to its end."""
    return ended(start(*arguments, **environment))


def save(engine: PlainEngine, *steps: int, tiers: list[str] | None = None) -> None:
    for step in steps:
        engine.save(step, state(0, step, engine.group.rank), tiers=tiers).wait("memory")


def drainer_pid(job: Job, node: int = 0) -> int | None:
    holder = probe(job.store_dir("memory", node) / layout.LOCKS / drainer.DRAINER_LOCK)
    return holder.pid if holder else None


def durable_steps(job: Job) -> list[int]:
    root = job.store_dir("durable")
    found = root.glob("step_*/manifest.json") if root.exists() else ()
    return sorted(int(path.parent.name[5:15]) for path in found if b'"tombstone"' not in path.read_bytes())


@contextmanager
def left_behind(job: Job, *steps: int) -> Generator[None]:
    """What a container that was killed leaves: all *steps* in memory, the last one queued, and nobody alive."""

    def work(group: Group) -> None:
        engine = job.open(group)
        save(engine, *steps[:-1], tiers=["memory"])
        save(engine, steps[-1])
        wait_until(lambda: len(job.queued(group.rank % job.nodes)) >= job.world // job.nodes, "nothing is queued")
        group.gather(None)
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        with job.no_drainer(0), job.no_drainer(1) if job.nodes > 1 else nullcontext():
            assert killed(job.run(work))
        yield
    finally:
        for node in range(job.nodes):
            pid = drainer_pid(job, node)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)


def with_index(job: Job, step: int, node: int = 0) -> None:
    """Make the files for other readers, as trainers do: a child with torch would take seconds."""
    directory = job.step_dirs("memory", node)[step]
    attempt = directory.name.partition("-")[2]
    (directory / layout.INDEX).write_text(json.dumps({"step": step, "attempt": attempt}), encoding="utf-8")
    (directory / layout.METADATA).write_bytes(b"for DCP")


def restored(job: Job, **changes: Any) -> list[list[int] | None]:
    """Lose all nodes, restore with a recipe that *changes* make of the job's; run and step of what each rank got."""
    for node in range(job.nodes):
        job.wipe(node)

    def work(group: Group) -> object:
        engine = PlainEngine(Recipe.parse({**job.recipe(group.rank), **changes}).settings(), group)
        try:
            found = engine.restore()
            return None if found is None else list(origin(found[1], group.rank))
        finally:
            engine.close()

    return [result.value for result in job.run(work)]


# ---- drain


def test_what_a_killed_container_left_is_drained(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2)
    with left_behind(job, 1, 2):
        status, out, err = command("drain", recipe(job), "--json")
        assert (status, err) == (0, "")
        found = json.loads(out)
        assert (found["version"], found["ok"], found["bytes"]) == (1, True, 40_000)
        assert [(p["step"], p["tier"], p["committed"]) for p in found["promotions"]] == [(2, "durable", True)]
        assert (job.queued(), durable_steps(job)) == ([], [2])
        assert drainer_pid(job) is None, "the one that it started has said its last words"
        assert list(job.store_dir("durable").glob("events/*")), "events are beside the checkpoints"
        status, out, err = command("drain", recipe(job))
        assert (status, out, err) == (0, "nothing is queued here\n", "")
    assert restored(job) == [[0, 2], [0, 2]]


def test_where_nothing_was_ever_saved_nothing_is_made(memory_dir: Path) -> None:
    job = Job(memory_dir)
    assert command("drain", recipe(job))[0] == 0
    assert not job.memory().exists()


def test_killed_half_way_it_is_gone_on_with(memory_dir: Path) -> None:
    """The drainer dies by SIGKILL behind each part that it sent, as often as it is started; then it may live."""
    job = Job(memory_dir)
    with left_behind(job, 1):
        status, out, err = command("drain", recipe(job), **{crashpoints.VARIABLE: "promote.after_part"})
        assert status == 1
        assert "the drainer died 3 times, at last with status -9" in err
        assert "drainer.log" in err
        assert (len(job.queued()), durable_steps(job), out) == (1, [], "")
        assert [path.name for path in job.step_dirs("durable")[1].iterdir()] == ["__0_0.distcp"]
        status, out, _ = command("drain", recipe(job))
        assert status == 0
        assert "1 of 1 committed" in out
    assert restored(job) == [[0, 1]]


@pytest.mark.long
def test_it_waits_for_other_nodes_says_whom_and_gives_up_in_time(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2, nodes=2)
    with left_behind(job, 1):
        status, out, err = command("drain", recipe(job), "--timeout", 6)
        assert status == 1
        assert "step 1 to durable: sent; waits for rank 1" in err
        assert "The drainer goes on with it" in err
        assert "0 of 1 committed" in out
        pid = drainer_pid(job)
        assert pid is not None, "the drainer was ended with work to do"
        first = start("drain", recipe(job))
        assert command("drain", recipe(job, 1))[0] == 0
        assert ended(first)[0] == 0
        assert durable_steps(job) == [1]
    assert restored(job) == [[0, 1], [0, 1]]


def test_ctrl_c_ends_the_watching_and_not_the_drain(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2, nodes=2)
    with left_behind(job, 1):
        process = start("drain", recipe(job))
        wait_until(lambda: any(name.startswith("commit-") for name in job.queued()), "rank 0's part is not sent")
        pid = drainer_pid(job)
        process.send_signal(signal.SIGINT)
        status, out, err = ended(process)
        assert (status, out) == (130, "")
        assert f"the drainer (pid {pid}) goes on" in err
        assert err.endswith("interrupted\n")
        assert command("drain", recipe(job, 1))[0] == 0
        wait_until(lambda: durable_steps(job) == [1], "the drain was interrupted with it")


@pytest.mark.long
def test_what_can_t_be_promoted_is_told_with_its_reason(memory_dir: Path) -> None:
    job = Job(memory_dir, keep=2, options={"commit_deadline_secs": 1})
    with left_behind(job, 1):
        part = job.step_dirs()[1] / "__0_0.distcp"
        data = bytearray(part.read_bytes())
        data[100] ^= 1
        part.write_bytes(bytes(data))
        status, out, err = command("drain", recipe(job))
        assert status == 3
        assert "has XXH3-128" in err
        assert "0 of 1 committed" in out
        assert (job.queued(), durable_steps(job)) == ([], [])


# ---- promote


def test_a_step_in_memory_is_promoted_by_the_drainer_while_the_job_goes_on(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2, keep=2)

    def work(engine: PlainEngine) -> None:
        save(engine, 1, 2, tiers=["memory"])
        if engine.group.rank == 0:
            with_index(job, 1)
            status, out, _ = command("promote", recipe(job), "--step", 1, "--json")
            assert status == 0
            found = json.loads(out)
            assert (found["by"], found["from"], found["to"]) == ("drainer", "memory", "durable")
            assert (found["ranks"], found["ranks_elsewhere"], found["bytes"]) == ([0, 1], [], 40_000)
            assert durable_steps(job) == [1]
        engine.group.gather(None)
        save(engine, 3, 4, 5, tiers=["memory"])
        engine.save(6, state(0, 6, engine.group.rank)).wait("durable")

    job.work(work)
    assert durable_steps(job) == [1, 6]
    status, out, _ = command("promote", recipe(job), "--step", 6)
    assert (status, "is on durable already" in out) == (0, True)
    assert restored(job) == [[0, 6], [0, 6]]


@pytest.mark.long
def test_a_node_brings_its_share_and_says_whose_are_missing(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2, nodes=2)
    job.work(lambda engine: save(engine, 1, tiers=["memory"]))
    for node in (0, 1):
        with_index(job, 1, node)
    status, out, err = command("promote", recipe(job), "--step", 1, "--timeout", 6)
    assert status == 1
    assert "this node's memory holds rank 0 of step 1; for rank 1 run the same command on their nodes" in err
    assert "waits for rank 1" in err
    assert "step 1 of a1 is not on durable" in out
    found = json.loads(command("promote", recipe(job, 1), "--step", 1, "--json")[1])
    assert (found["ok"], found["ranks"], found["ranks_elsewhere"]) == (True, [1], [0])
    assert durable_steps(job) == [1]
    wait_until(lambda: drainer_pid(job) is None, "the drainer of the first node has not ended")
    assert restored(job) == [[0, 1], [0, 1]]


# ---- pin and prune beside a job


def test_what_is_pinned_stays_while_a_job_prunes(memory_dir: Path) -> None:
    job = Job(memory_dir, durable_keep=1)

    def work(engine: PlainEngine) -> None:
        for step in range(1, 5):
            engine.save(step, state(0, step, 0)).wait("durable")
            if step == 1:
                assert command("pin", recipe(job), "--step", 1, "--reason", "first")[0] == 0
        wait_until(lambda: durable_steps(job) == [1, 4], f"retention left {durable_steps(job)}")

    job.work(work)
    assert command("pin", recipe(job), "--step", 1, "--remove")[0] == 0
    assert command("prune", recipe(job), "--yes")[0] == 0
    assert durable_steps(job) == [4]


@pytest.mark.long
def test_pruning_by_hand_beside_a_job_s_own_retention_harms_nothing(memory_dir: Path) -> None:
    job = Job(memory_dir, durable_keep=1)

    def work(engine: PlainEngine) -> str:
        processes: list[subprocess.Popen[str]] = []
        for step in range(1, 7):
            handle = engine.save(step, state(0, step, 0))
            processes.append(start("prune", recipe(job), "--yes", "--json"))
            handle.wait("durable")
        found = [ended(process) for process in processes]
        assert [status for status, _, _ in found] == [0] * len(found), found
        return found[-1][1]

    last = json.loads(job.work(work)[0])
    assert last["live_pids"], "the job's trainers are told of"
    wait_until(lambda: durable_steps(job) == [6], f"retention left {durable_steps(job)}")
    assert restored(job) == [[0, 6]]


# ---- copy


def test_a_copy_in_another_namespace_is_restored_there(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2)

    def work(engine: PlainEngine) -> None:
        for step in (1, 2):
            engine.save(step, state(0, step, engine.group.rank)).wait("durable")

    job.work(work)
    there = recipe(job, namespace="run-2")
    status, out, _ = command("copy", recipe(job), "--all", "--from", "durable", "--to", "durable", "--to-recipe", there)
    assert status == 0
    assert "2 of 2 from durable" in out
    assert restored(job, namespace="run-2") == [[0, 2], [0, 2]]

    def goes_on(group: Group) -> int:
        engine = PlainEngine(Recipe.parse({**job.recipe(group.rank), "namespace": "run-2"}).settings(), group)
        found = engine.restore()
        assert found is not None
        engine.save(found[0] + 1, state(1, found[0] + 1, group.rank)).wait("durable")
        engine.close()
        return found[0]

    assert [result.value for result in job.run(goes_on)] == [2, 2]
    assert restored(job, namespace="run-2") == [[1, 3], [1, 3]]
    assert restored(job) == [[0, 2], [0, 2]], "the one that was copied is as it was"


def test_a_copy_that_was_killed_shows_nothing_and_is_gone_on_with(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2)
    job.work(lambda engine: engine.save(1, state(0, 1, engine.group.rank)).wait("durable"))
    arguments = ("copy", recipe(job), "--step", 1, "--from", "durable", "--to", "durable", "--namespace", "run-2")
    environment = {crashpoints.VARIABLE: "commit.before_manifest"}
    assert start(*arguments, **environment).wait(TIMEOUT_SECS) == -signal.SIGKILL
    there = job.durable / "run-2"
    assert not list(there.glob("step_*/manifest.json"))
    assert len(list(there.glob("step_*/record-*.json"))) == 2
    found = json.loads(command(*arguments, "--json")[1])
    assert [(c["ok"], c["bytes_sent"], c["bytes_found"]) for c in found["checkpoints"]] == [(True, 0, 40_000)]
    assert restored(job, namespace="run-2") == [[0, 1], [0, 1]]


# ---- interrupts and pipes


@pytest.mark.parametrize("arguments", [["prune", "--yes"], ["copy", "--all", "--from", "durable", "--to", "s3"]])
def test_ctrl_c_ends_it_at_once_with_130(memory_dir: Path, arguments: list[str]) -> None:
    job = Job(memory_dir)
    job.work(lambda engine: engine.save(1, state(0, 1, 0)).wait("durable"))
    before = {path: path.stat().st_mtime_ns for path in job.durable.rglob("step_*/*")}
    with socket.create_server(("127.0.0.1", 0)) as mute:  # it accepts, and never says a word
        given = job.recipe()
        s3 = {
            "kind": "s3",
            "uri": "s3://bucket/prefix",
            "endpoint_url": f"http://127.0.0.1:{mute.getsockname()[1]}",
            "region": "us-east-1",
            "force_path_style": True,
            "request_timeout_secs": 60,
        }
        process = start(arguments[0], recipe(job, tiers={**given["tiers"], "s3": s3}), *arguments[1:])
        connection, _ = mute.accept()
        assert connection.recv(1)
        process.send_signal(signal.SIGINT)
        assert ended(process) == (130, "", "interrupted\n")
        connection.close()
    assert {path: path.stat().st_mtime_ns for path in job.durable.rglob("step_*/*")} == before


@pytest.mark.parametrize("arguments", [["pin"], ["prune"], ["drain"]])
def test_a_pipe_that_closes_ends_it_quietly(memory_dir: Path, arguments: list[str]) -> None:
    job = Job(memory_dir)
    job.work(lambda engine: engine.save(1, state(0, 1, 0)).wait("durable"))
    with start(arguments[0], recipe(job), *arguments[1:]) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(TIMEOUT_SECS) == 128 + signal.SIGPIPE


def test_acting_commands_load_no_torch(memory_dir: Path) -> None:
    job = Job(memory_dir)
    program = (
        "import sys\nfrom sm_tiered.cli.app import main\ntry:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    for arguments in (["pin"], ["prune"], ["drain"], ["copy", "--all", "--from", "durable", "--to", "durable"]):
        done = subprocess.run(
            [sys.executable, "-c", program, arguments[0], str(recipe(job)), *arguments[1:]],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECS,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.stderr.splitlines()[-1] == "[]"
    assert job.settings().namespace == NAMESPACE
