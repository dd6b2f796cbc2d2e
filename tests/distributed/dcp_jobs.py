"""Jobs of real ranks with gloo, cheap enough for many in a test: forked from a server that has torch loaded already.

A rank is a process of its own from its first line on; it shares no thread, mapping or socket with the tests.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, cast

import pytest

from sm_tiered import layout
from sm_tiered.settings import S3Settings

ROOT = Path(__file__).parents[2]
LIMIT_SECS = 50.0
"""How long a job may take, all in all."""
NAMESPACE = "run-1"

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = (
    *("pytest", "torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("sm_tiered_dcp.checkpointer", "sm_tiered_dcp.writer", "sm_tiered_dcp.reader", "sm_tiered_dcp.state"),
    *("torch._dynamo", "sm_tiered.tiers.s3", "sm_tiered.recipe", "torch.distributed.checkpoint.format_utils"),
)


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    status: int
    """Exit code; minus the number of the signal that killed it."""
    value: Any = None
    """What its function returned."""
    trace: str | None = None
    """Of what it raised."""


@dataclass
class Job:
    """Ranks that are running."""

    processes: list[Any]
    pipes: list[Any]

    def pid(self, rank: int) -> int:
        """Return the process id of *rank*."""
        return self.processes[rank].pid

    def heard(self, rank: int) -> Any:
        """Return the next thing that *rank* told with `tell`."""
        assert self.pipes[rank].poll(LIMIT_SECS), f"rank {rank} told nothing in {LIMIT_SECS} s"
        kind, value = self.pipes[rank].recv()
        assert kind == "told", f"rank {rank} {kind}: {value}"
        return value

    def go(self, *ranks: int) -> None:
        """Let *ranks*, or all, go on from `pause`."""
        for rank in ranks or range(len(self.pipes)):
            self.pipes[rank].send("go")

    def kill(self, *ranks: int) -> None:
        """SIGKILL *ranks*, or all."""
        for rank in ranks or range(len(self.processes)):
            os.kill(self.pid(rank), signal.SIGKILL)

    def wait(self) -> list[Ended]:
        """Return how each rank ended, once all have."""
        end = time.monotonic() + LIMIT_SECS
        last: dict[int, tuple[str, Any]] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while waiting and time.monotonic() < end:
            for ready in connection.wait(list(waiting), timeout=max(0.0, end - time.monotonic())):
                pipe = cast(Any, ready)
                try:
                    last[waiting[pipe]] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    del waiting[pipe]
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hung:
            os.kill(self.pid(rank), signal.SIGABRT)  # faulthandler then shows where it hangs
            self.processes[rank].join(5.0)
            self.processes[rank].kill()
        ends = [_ended(process, *last.get(rank, ("", None))) for rank, process in enumerate(self.processes)]
        told = "\n".join(f"rank {rank}: {ended.trace}" for rank, ended in enumerate(ends) if ended.trace)
        assert not hung, f"ranks {hung} did not end in {LIMIT_SECS} s\n{told}"
        return ends


def _ended(process: Any, kind: str, value: Any) -> Ended:
    status = process.exitcode if process.exitcode is not None else -signal.SIGKILL
    return Ended(status, value if kind == "returned" else None, value if kind == "raised" else None)


@cache
def _start_server() -> None:
    """Start the process that ranks are forked from, where it finds what the tests find."""
    path, kept = os.pathsep.join(str(part) for part in (ROOT, ROOT / "integrations")), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path if kept is None else os.pathsep.join((path, kept))
    try:
        _CONTEXT.set_forkserver_preload(list(_PRELOADED))
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if kept is not None:
            os.environ["PYTHONPATH"] = kept


def start(world: int, work: Callable[..., Any], *arguments: Any, env: Mapping[str, str] | None = None) -> Job:
    """Start ``work(rank, *arguments)`` on *world* ranks of one job; *work* stands at the top of a test module.

    A world of 0 is one process without torch.distributed.
    """
    _start_server()
    count = max(1, world)
    pairs = [_CONTEXT.Pipe() for _ in range(count)]
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        processes: list[Any] = []
        for rank in range(count):
            store = listener if rank == 0 and world else None
            place = (rank, world, listener.getsockname()[1], store)
            process = _CONTEXT.Process(
                target=_rank, args=(place, pairs[rank][1], {**aws, **(env or {})}, work, arguments)
            )
            process.start()
            pairs[rank][1].close()
            processes.append(process)
    return Job(processes, [ours for ours, _ in pairs])


def run(world: int, work: Callable[..., Any], *arguments: Any, env: Mapping[str, str] | None = None) -> list[Any]:
    """Run ``work(rank, *arguments)`` on *world* ranks and return what each returned; none may fail."""
    ends = start(world, work, *arguments, env=env).wait()
    failed = [f"rank {rank} ended with {end.status}\n{end.trace or ''}" for rank, end in enumerate(ends) if end.status]
    assert not failed, "\n".join(failed)
    return [end.value for end in ends]


_pipe: Any = None


def tell(value: Any) -> None:
    """In a rank: tell the test *value*; see `Job.heard`."""
    _pipe.send(("told", value))


def pause() -> None:
    """In a rank: wait until the test says `Job.go`."""
    assert _pipe.poll(LIMIT_SECS), "the test did not say go"
    _pipe.recv()


def _rank(place: tuple[int, int, int, Any], pipe: Any, env: dict[str, str], work: Any, arguments: Any) -> None:
    global _pipe
    _pipe = pipe
    faulthandler.enable()
    os.environ.update(env)
    tempfile.tempdir = None  # what the server has loaded may have looked at its own TMPDIR
    import torch

    torch.set_num_threads(1)
    rank, world, port, listener = place
    try:
        if world:
            _join(rank, world, port, listener)
        value = work(rank, *arguments)
        if world and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        pipe.send(("returned", value))
    except BaseException:
        pipe.send(("raised", traceback.format_exc()))
        sys.stdout.flush()
        os._exit(1)  # at once: a group that is being destroyed would wait for the others


def _join(rank: int, world: int, port: int, listener: Any) -> None:
    import torch.distributed as dist

    limit = timedelta(seconds=LIMIT_SECS)
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        world,
        is_master=rank == 0,
        timeout=limit,
        master_listen_fd=listener.detach() if listener is not None else None,
        wait_for_workers=False,
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)


def async_save(state: dict[str, Any], writer: Any, **options: Any) -> Any:
    """Begin ``dcp.async_save`` as its documentation says, and return the future."""
    from torch.distributed import checkpoint

    return checkpoint.async_save(state, storage_writer=writer, process_group=writer.process_group, **options)


def recipe(folder: Path, memory: Path | None, /, **changes: Any) -> dict[str, Any]:
    """Return a recipe with a memory tier in *memory* (None: without one) and the tier ``disk`` in *folder*.

    Changes named ``memory`` and ``disk`` are fields of these tiers, others stand at the top; ``disk=None`` leaves it
    out.
    """
    tiers: dict[str, Any] = {}
    if memory is not None:
        given = {"kind": "memory", "path": str(memory), "keep": {"latest": 2}, "save": {"every_n_steps": 1}}
        given["allow_disk"] = not str(memory).startswith("/dev/shm")
        tiers["memory"] = {**given, **changes.pop("memory", {})}
    disk = changes.pop("disk", {})
    if disk is not None:
        tiers["disk"] = {"kind": "local", "path": str(folder / "disk"), "keep": {"latest": 3}, "fsync": False, **disk}
    tiers |= changes.pop("tiers", {})
    limits = {"group_timeout_secs": 30, "drain_timeout_secs": 60, "in_use_wait_secs": 5, "stream_timeout_secs": 30}
    return {"version": 1, "namespace": NAMESPACE, **limits, "tiers": tiers, **changes}


def s3_tier(settings: S3Settings) -> dict[str, Any]:
    """Return the tier of *settings* as a recipe has it."""
    return {
        "kind": "s3",
        "uri": f"s3://{settings.bucket}/{settings.prefix}",
        "endpoint_url": settings.endpoint_url,
        "allow_http": True,
        "region": settings.region,
        "force_path_style": True,
    }


def steps(root: Path, name: str = "*") -> dict[int, list[str]]:
    """Return the names of the files in each step's directory below *root*; those of one step together."""
    found: dict[int, list[str]] = {}
    for directory in sorted(root.glob(f"{NAMESPACE}/step_*")):
        checkpoint = layout.parse_checkpoint_dir(directory.name)
        assert checkpoint is not None
        found.setdefault(checkpoint.step, []).extend(sorted(path.name for path in directory.glob(name)))
    return found


def step_dir(root: Path, step: int) -> Path:
    """Return the newest directory of *step* below *root*."""
    return max(root.glob(f"{NAMESPACE}/step_{step:010d}-*"))


def raised(call: Callable[[], object]) -> tuple[str, str]:
    """Return class and text of what *call* raises; it must."""
    try:
        value = call()
    except Exception as error:
        return type(error).__name__, str(error)
    pytest.fail(f"nothing was raised; returned {value!r}")


def bits(value: Any) -> Any:
    """Return *value* with every tensor as (dtype, shape, bytes), so that NaN and -0.0 compare too."""
    import torch

    if isinstance(value, torch.Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value  # type: ignore[operator]
        own = local.detach().cpu().contiguous().clone().resolve_conj().resolve_neg()
        data = own.reshape(-1).view(torch.uint8).numpy().tobytes() if own.numel() else b""
        return str(own.dtype), tuple(own.shape), data
    if isinstance(value, Mapping):
        return {key: bits(entry) for key, entry in cast("Mapping[Any, Any]", value).items()}
    return [bits(entry) for entry in value] if isinstance(value, (list, tuple)) else value
