"""The ranks of a job as a `sm_tiered.group.Group`: our own gloo group, never the trainer's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed

from sm_tiered import deadline
from sm_tiered.errors import ConfigError, DeadlineExceededError, RankFailedError
from sm_tiered.group import Group, SoloGroup

__all__ = ["GlooGroup", "open_group"]

_T = TypeVar("_T")

dist: Any = torch.distributed  # its functions are only partly typed


class GlooGroup:
    """Two gloo groups over all ranks, one for the engine and one for DCP's own collectives in `dcp.async_save`.

    They are two because the latter run in a background thread: collectives of two threads on one group would meet
    each other's.
    """

    def __init__(self, timeout_secs: float) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        limit = timedelta(seconds=timeout_secs)
        self._group, self.async_group = (
            self._run(lambda: dist.new_group(backend="gloo", timeout=limit)) for _ in range(2)
        )
        # Counters live in the job's own store, which torch hands out only under a private name.
        default = dist.distributed_c10d._get_default_store()
        serial = self.gather(id(self))[0]
        self._counters = _Counters(dist.PrefixStore(f"sm_tiered/{serial}", default), timeout_secs)

    def max(self, values: Sequence[int]) -> list[int]:
        """Return the element-wise maximum over all ranks."""
        tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
        self._run(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group))
        return cast("list[int]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]

    def gather(self, value: object) -> list[Any]:
        """Return every rank's *value*, in rank order."""
        found: list[Any] = [None] * self.world
        self._run(lambda: dist.all_gather_object(found, value, group=self._group))
        return found

    def gather_to_first(self, value: object) -> list[Any] | None:
        """Return every rank's *value* on rank 0, None elsewhere. Collective."""
        found: list[Any] | None = [None] * self.world if self.rank == 0 else None
        self._run(lambda: dist.gather_object(value, found, dst=0, group=self._group))
        return found

    def scatter_from_first(self, values: list[Any] | None) -> Any:
        """Return this rank's entry of rank 0's *values*. Collective."""
        found: list[Any] = [None]
        self._run(lambda: dist.scatter_object_list(found, values, src=0, group=self._group))
        return found[0]

    def add(self, key: str, amount: int) -> int:
        """Add to a counter in the job's store and return its new value.

        Raises:
            RankFailedError: the rank that hosts the store has ended, or hung for the group's timeout.
            DeadlineExceededError: no answer within a shorter deadline of the caller's.
        """
        return self._asked(lambda store: store.add(key, amount))

    def drop(self, key: str) -> None:
        """Forget a counter."""
        self._asked(lambda store: store.delete_key(key))

    def close(self) -> None:
        """Let go of both groups; can be called many times."""
        groups, self._group, self.async_group = (self._group, self.async_group), None, None
        for group in groups:
            # Without a group torch would destroy the training's; one that went with the job's own is unknown to it.
            if group is not None and dist.is_initialized():
                with suppress(ValueError):
                    dist.destroy_process_group(group)

    def _run(self, action: Callable[[], _T]) -> _T:
        return self._typed(action, f"a collective of {self.world} ranks did not end")

    def _asked(self, call: Callable[[Any], _T]) -> _T:
        return self._typed(lambda: self._counters.ask(call), "the job's store can't be asked")

    def _typed(self, action: Callable[[], _T], what: str) -> _T:
        try:
            return action()
        except (RuntimeError, ValueError, _HungError) as error:
            raise RankFailedError(
                f"{what}: {str(error)[:300]}",
                hint="Look at the other ranks' logs: one of them has ended or hangs."
                if dist.is_initialized()
                else "The process group was destroyed: close what uses it first.",
                rank=self.rank,
            ) from error


class _HungError(Exception):
    """The job's store is as good as gone."""


class _Counters:
    """The job's store, each call of which would wait forever while the process that hosts it is stopped."""

    def __init__(self, store: Any, limit_secs: float) -> None:
        self._store, self._limit_secs = store, limit_secs
        self._hung: tuple[deadline.Task[Any], float] | None = None
        """A call that nobody waits for any more, and when it is as good as lost: those after it stand behind it."""

    def ask(self, call: Callable[[Any], _T]) -> _T:
        """Return what *call* on the store returns."""
        hung = self._hung
        if hung is not None:
            self._await(*hung)
            self._hung = None
        task, end = deadline.Task(lambda: call(self._store)), time.monotonic() + self._limit_secs
        self._await(task, end)
        return task.result(0.0)

    def _await(self, task: deadline.Task[Any], end: float) -> None:
        left = end - time.monotonic()
        patience = deadline.remaining(left)
        if task.wait(patience):
            return
        self._hung = (task, end)
        if patience >= left:
            raise _HungError(f"no answer for {self._limit_secs:.1f} s")
        raise DeadlineExceededError("the job's store has not answered yet")


def open_group(timeout_secs: float) -> Group:
    """Return the group of all ranks of this job. Collective where torch.distributed is initialised.

    Raises:
        ConfigError: the backend can't do CPU collectives.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return SoloGroup()
    if not dist.is_gloo_available():
        raise ConfigError("this build of torch has no gloo backend", hint="Install a build of torch with gloo.")
    return GlooGroup(timeout_secs)
