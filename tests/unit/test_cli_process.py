"""The command line as a process of its own: what it loads, and how it ends when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sm_tiered import layout
from sm_tiered.inventory import list_checkpoints
from sm_tiered.tiers.files import DirectoryTier
from sm_tiered.verify import State, verify_checkpoint
from tests.unit.cli_checkpoints import (
    checkpoint,
    local_tier,
    memory_tier,
    write_checkpoint,
    write_recipe,
)

ROOT = Path(__file__).parents[2]
TIMEOUT_SECS = 30

_LOADED = """
import json, sys
from sm_tiered.cli.app import main
try:
    main()
except SystemExit as ended:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
    raise
"""


def environment() -> dict[str, str]:
    """This process's, with the package on the path."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}


def call(arguments: Sequence[object], *, program: Sequence[str] = ("-m", "sm_tiered.cli.app")) -> subprocess.Popen[str]:
    """Start the command line."""
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd="/"
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with a checkpoint on a memory and on a local tier."""
    write_checkpoint(memory_tier(tmp_path / "memory"), checkpoint(20), durable=False)
    write_checkpoint(local_tier(tmp_path / "local"), checkpoint(20), durable=True)
    return write_recipe(tmp_path, memory=tmp_path / "memory", local=tmp_path / "local")


_PLAN = ["plan", "--steps", "20", "--step-secs", "1", "--state-bytes", "1GiB"]
_LOOKS = [["ls"], ["ls", "--json"], ["show"], ["verify"], ["why"], ["watch", "--once"], ["doctor"], _PLAN]


@pytest.mark.parametrize("arguments", _LOOKS, ids=" ".join)
def test_looking_loads_no_torch_no_pickle_of_ours_and_no_aws(recipe: Path, arguments: list[str]) -> None:
    with call([arguments[0], recipe, *arguments[1:]], program=("-c", _LOADED)) as process:
        out, err = process.communicate(timeout=TIMEOUT_SECS)
    assert process.returncode == 0, err
    loaded = set(json.loads(err.splitlines()[-1]))
    assert {"typer", "pydantic", "sm_tiered"} <= loaded
    assert not loaded & {"torch", "numpy", "boto3", "botocore", "s3torchconnector", "tenacity"}
    assert ("rich" in loaded) == ("--json" not in arguments)
    assert ("checks" if arguments == ["doctor"] else "20") in out


def test_a_pipe_that_closes_ends_it_quietly(recipe: Path) -> None:
    with call(["ls", recipe]) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(TIMEOUT_SECS) == 128 + signal.SIGPIPE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_output_is_an_error_without_a_traceback(recipe: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sm_tiered.cli.app", "ls", str(recipe)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            timeout=TIMEOUT_SECS,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "Error: standard output can't be written: No space left on device\n"


def test_output_that_cannot_show_a_sign_is_written_all_the_same(recipe: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "sm_tiered.cli.app", "ls", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**environment(), "PYTHONIOENCODING": "ascii"},
    ) as process:
        out, err = process.communicate(timeout=TIMEOUT_SECS)
    assert (process.returncode, err) == (0, b"")
    assert b"> a restore takes step 20 now" in out


@pytest.fixture
def mute_server() -> Iterator[tuple[int, threading.Event]]:
    """A port that accepts connections and never says a word; the event tells of the first request."""
    asked = threading.Event()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                held.append(connection)
                asked.set()

        thread = threading.Thread(target=accept)
        thread.start()
        yield server.getsockname()[1], asked
        server.shutdown(socket.SHUT_RDWR)
        thread.join(TIMEOUT_SECS)
        for connection in held:
            connection.close()


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_ctrl_c_ends_it_at_once_with_130(
    tmp_path: Path, mute_server: tuple[int, threading.Event], command: str
) -> None:
    port, asked = mute_server
    more = (
        "  s3: {kind: s3, uri: 's3://bucket/prefix', region: us-east-1, force_path_style: true, "
        f"endpoint_url: 'http://127.0.0.1:{port}', request_timeout_secs: 60}}\n"
    )
    with call([command, write_recipe(tmp_path, local=tmp_path / "local", more=more)]) as process:
        assert asked.wait(TIMEOUT_SECS)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT
    assert (out, err) == ("", "interrupted\n")


def _recycle(tier: DirectoryTier, step: int) -> None:
    """What the arena does: the record first, then the part, by renaming it out of the directory."""
    which = checkpoint(step)
    for rank in (0, 1):
        tier.delete([layout.in_dir(which, layout.record_name(rank))])
        part = tier.root / layout.in_dir(which, layout.part_name(rank, 0))
        freed = tier.root / ".arena" / f"{step}-{rank}"
        os.rename(part, freed)
        freed.write_bytes(b"\0" * 64)
    rest = [entry.key for entry in tier.list(f"{layout.checkpoint_dir(which)}/")]
    tier.delete(rest)


def test_verifying_while_a_job_saves_and_recycles_finds_no_damage(tmp_path: Path) -> None:
    tier = memory_tier(tmp_path / "memory")
    recipe = write_recipe(tmp_path, memory=tmp_path / "memory")
    tier.put(".arena/x", b"")
    write_checkpoint(tier, checkpoint(0), durable=False, size=65536)
    stop = threading.Event()
    saved: list[int] = []

    def save() -> None:
        while not stop.is_set():
            step = len(saved) + 1
            saved.append(step)
            write_checkpoint(tier, checkpoint(step), durable=False, size=65536)
            _recycle(tier, step - 1)

    job = threading.Thread(target=save)
    job.start()
    try:
        states: Counter[State] = Counter()
        for _ in range(60):
            for which in list_checkpoints(tier):
                report = verify_checkpoint(tier, which, durable=False)
                assert report.problems == ()
                states[report.state] += 1
        for command in ("verify", "ls"):
            with call([command, recipe, "--json"]) as process:
                out, err = process.communicate(timeout=TIMEOUT_SECS)
            # Nothing may have held still for long enough to be looked at; damage there is none.
            assert process.returncode in (0, 1), out + err
            assert "Traceback" not in err
    finally:
        stop.set()
        job.join(TIMEOUT_SECS)
    assert states[State.WHOLE]
    assert states.keys() - {State.WHOLE}
