"""Ranks as forked processes over socket pairs: a real `Group` without torch, cheap enough to kill at every step."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sm_tiered.errors import RankFailedError
from sm_tiered.group import Group

__all__ = ["RankResult", "run_ranks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """How one rank ended."""

    status: int
    """As `os.waitpid` tells: 0, or what killed it."""
    value: Any
    """What its function returned; None when it did not get that far."""


class _Channel:
    """Length-prefixed JSON over one socket."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, message: object) -> None:
        data = json.dumps(message).encode()
        self.socket.sendall(struct.pack("!I", len(data)) + data)

    def receive(self) -> Any:
        (length,) = struct.unpack("!I", self._exactly(4))
        return json.loads(self._exactly(length))

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            if not more:
                raise EOFError
            data += more
        return data


class _ForkedGroup:
    """One forked rank's end."""

    def __init__(self, rank: int, world: int, collective: _Channel, counter: _Channel) -> None:
        self.rank, self.world = rank, world
        self._collective, self._counter = collective, counter
        self._lock = threading.Lock()

    def max(self, values: Sequence[int]) -> list[int]:
        return [max(column) for column in zip(*self.gather(list(values)), strict=True)]

    def gather(self, value: object) -> list[Any]:
        try:
            self._collective.send(value)
            reply = self._collective.receive()
        except (EOFError, OSError) as error:
            raise RankFailedError("the group is gone", rank=self.rank) from error
        if reply["lost"] is not None:
            raise RankFailedError("a rank ended", rank=reply["lost"])
        return reply["values"]

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            self._counter.send([key, amount])
            return int(self._counter.receive())

    def drop(self, key: str) -> None:
        """Counters live as long as the parent's hub."""

    def close(self) -> None:
        self._collective.socket.close()
        self._counter.socket.close()


@dataclass
class _Hub:
    """The parent's end: gathers, and counts."""

    collectives: list[_Channel]
    counters: list[_Channel]
    sums: dict[str, int] = field(default_factory=dict[str, int])
    pending: dict[int, Any] = field(default_factory=dict[int, Any])
    lost: int | None = None

    def run(self) -> None:
        alive = {c.socket.fileno(): (rank, c) for rank, c in enumerate(self.collectives)}
        counting = {c.socket.fileno(): c for c in self.counters}
        while alive or counting:
            for ready in select.select([*alive, *counting], [], [])[0]:
                if ready in counting:
                    self._count(counting, ready)
                else:
                    self._collect(alive, ready)

    def _count(self, counting: dict[int, _Channel], ready: int) -> None:
        try:
            key, amount = counting[ready].receive()
            self.sums[key] = self.sums.get(key, 0) + amount
            counting[ready].send(self.sums[key])
        except (EOFError, OSError):
            del counting[ready]

    def _collect(self, alive: dict[int, tuple[int, _Channel]], ready: int) -> None:
        rank, channel = alive[ready]
        try:
            self.pending[rank] = channel.receive()
        except (EOFError, OSError):
            del alive[ready]
            self.lost = rank if self.lost is None else self.lost
        if self.lost is None and len(self.pending) < len(self.collectives):
            return
        values = [self.pending.get(other) for other in range(len(self.collectives))]
        for other in list(self.pending):
            try:
                self.collectives[other].send({"lost": self.lost, "values": values})
            except OSError:
                continue
        self.pending.clear()


def run_ranks(
    world: int, work: Callable[[Group], object], *, env: dict[int, dict[str, str]] | None = None
) -> list[RankResult]:
    """Fork *world* processes, run *work* in each with its group, and return how each ended.

    A rank that dies makes the collectives of the others raise `RankFailedError`, as a lost peer does with gloo.
    *env* is set in the child of that rank before *work* runs. A rank whose work raises ends with status 1 and its
    traceback on stderr.
    """
    pairs = [(socket.socketpair(), socket.socketpair(), socket.socketpair()) for _ in range(world)]
    pids = [_fork(rank, world, pairs, work, (env or {}).get(rank, {})) for rank in range(world)]
    for (_, theirs), (_, counter), (_, result) in pairs:
        for end in (theirs, counter, result):
            end.close()
    hub = _Hub([_Channel(pair[0][0]) for pair in pairs], [_Channel(pair[1][0]) for pair in pairs])
    thread = threading.Thread(target=hub.run, daemon=True)
    thread.start()
    results = [_await(pid, _Channel(pair[2][0])) for pid, pair in zip(pids, pairs, strict=True)]
    thread.join(10)
    for pair in pairs:
        for ours, _ in pair:
            ours.close()
    return results


def _fork(rank: int, world: int, pairs: Sequence[Any], work: Callable[[Group], object], env: dict[str, str]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for other, pair in enumerate(pairs):
            for ours, theirs in pair:
                ours.close()
                if other != rank:
                    theirs.close()
        os.environ.update(env)
        collective, counter, result = (pair[1] for pair in pairs[rank])
        value = work(_ForkedGroup(rank, world, _Channel(collective), _Channel(counter)))
        _Channel(result).send(value)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _await(pid: int, channel: _Channel) -> RankResult:
    value: Any = None
    try:
        value = channel.receive()
    except (EOFError, OSError):
        value = None
    _, status = os.waitpid(pid, 0)
    return RankResult(status=status, value=value)
