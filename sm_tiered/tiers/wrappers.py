"""Wrappers that are tiers themselves: `RetryingTier` gives failures worth it a second chance, `MeteredTier` counts."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

import tenacity

from sm_tiered import deadline
from sm_tiered.errors import CorruptPartError, KeyExistsError, KeyNotFoundError, TierUnavailableError
from sm_tiered.manifest import MAX_BYTES
from sm_tiered.tiers.base import Blob, Chunks, Entry, Tier

__all__ = ["MeteredTier", "OperationCount", "Retry", "RetryingTier", "retrying"]

_T = TypeVar("_T")
_FIRST_WAIT_SECS = 0.2
_LONGEST_WAIT_SECS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """One try that failed and will be repeated."""

    tier: str
    operation: str
    key: str
    tries: int
    """How many have failed so far."""
    wait_secs: float
    """Until the next one."""
    error: TierUnavailableError


_random = random.Random()
"""Of our own: the user's is part of what a checkpoint holds, and no retry may draw from it, as tenacity's would."""


def _full_jitter(state: tenacity.RetryCallState) -> float:
    """Seconds to wait: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter."""
    exponent = min(state.attempt_number - 1, 30)
    return _random.uniform(0.0, min(_LONGEST_WAIT_SECS, _FIRST_WAIT_SECS * 2**exponent))


def retrying(
    limit: float, worth: Callable[[BaseException], bool], told: Callable[[tenacity.RetryCallState], None] | None = None
) -> tenacity.Retrying:
    """Return what repeats a call whose failure is *worth* it, with full jitter, for *limit* seconds."""
    retry, stop = tenacity.retry_if_exception(worth), tenacity.stop_before_delay(limit)
    return tenacity.Retrying(retry=retry, wait=_full_jitter, stop=stop, before_sleep=told, reraise=True)


class RetryingTier:
    """Repeats what failed with `TierUnavailableError`, and nothing else: full jitter, up to *attempts* tries.

    An operation ends within *deadline_secs*, plus a second for every 4 MiB that it moves, retries and waits included.
    The last error is raised, with the number of tries and the seconds in its message.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        attempts: int = 8,
        deadline_secs: float = 120.0,
        on_retry: Callable[[Retry], None] | None = None,
    ) -> None:
        self.inner = tier
        self._attempts, self._deadline_secs, self._on_retry = attempts, deadline_secs, on_retry

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        return self.inner.name

    def list(self, prefix: str) -> list[Entry]:
        """See `Tier.list`."""
        return self._run("list", prefix, lambda: self.inner.list(prefix))

    def list_dirs(self, prefix: str) -> Sequence[str]:
        """See `Tier.list_dirs`."""
        return self._run("list_dirs", prefix, lambda: self.inner.list_dirs(prefix))

    def get(self, key: str, *, max_bytes: int = MAX_BYTES) -> Blob:
        """See `Tier.get`."""
        return self._run("get", key, lambda: self.inner.get(key, max_bytes=max_bytes))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Tier.read_into`."""
        self._run("read_into", key, lambda: self.inner.read_into(key, offset, buffer), size=buffer.nbytes)

    def put(self, key: str, data: bytes) -> None:
        """See `Tier.put`."""
        self._run("put", key, lambda: self.inner.put(key, data), size=len(data))

    def put_if_absent(self, key: str, data: bytes) -> None:
        """See `Tier.put_if_absent`. An earlier try that was done, and whose answer was lost, counts as success."""
        self._conditional("put_if_absent", key, data, lambda: self.inner.put_if_absent(key, data))

    def replace(self, key: str, data: bytes, *, version: str) -> None:
        """See `Tier.replace`. An earlier try that was done, and whose answer was lost, counts as success."""
        self._conditional("replace", key, data, lambda: self.inner.replace(key, data, version=version))

    def put_part(self, key: str, chunks: Chunks, size: int) -> None:
        """See `Tier.put_part`; *chunks* is called again for each try."""
        self._run("put_part", key, lambda: self.inner.put_part(key, chunks, size), size=size)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Tier.delete`."""
        doomed = tuple(keys)
        self._run("delete", doomed[0] if doomed else "", lambda: self.inner.delete(doomed))

    def probe(self) -> None:
        """See `Tier.probe`."""
        self._run("probe", "", self.inner.probe)

    def close(self) -> None:
        """See `Tier.close`."""
        self.inner.close()

    def _conditional(self, operation: str, key: str, data: bytes, send: Callable[[], None]) -> None:
        unknown = False

        def once() -> None:
            nonlocal unknown
            try:
                send()
            except TierUnavailableError:
                unknown = True
                raise
            except KeyExistsError:
                if not unknown or not self._holds(key, data):
                    raise

        self._run(operation, key, once, size=len(data))

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.inner.get(key, max_bytes=len(data)).data == data
        except CorruptPartError:  # longer
            return False
        except KeyNotFoundError as error:
            raise TierUnavailableError(f"{key} was there and is gone", tier=self.name, key=key) from error

    def _run(self, operation: str, key: str, call: Callable[[], _T], *, size: int = 0) -> _T:
        began = time.monotonic()
        limit = deadline.remaining(self._deadline_secs + deadline.allowance(size))
        tries = 0

        def once() -> _T:
            nonlocal tries
            tries += 1
            return call()

        def worth(error: BaseException) -> bool:
            return isinstance(error, TierUnavailableError) and tries < self._attempts

        try:
            with deadline.within(limit):
                return retrying(limit, worth, lambda state: self._tell(operation, key, state))(once)
        except TierUnavailableError as error:
            if tries < 2:
                raise
            secs = time.monotonic() - began
            message = f"{error.message}; gave up after {tries} tries in {secs:.1f} s"
            raise TierUnavailableError(message, hint=error.hint, tier=self.name, key=error.key) from error

    def _tell(self, operation: str, key: str, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if self._on_retry is not None and isinstance(error, TierUnavailableError):
            wait = state.next_action.sleep if state.next_action else 0.0
            self._on_retry(
                Retry(
                    tier=self.name,
                    operation=operation,
                    key=key,
                    tries=state.attempt_number,
                    wait_secs=wait,
                    error=error,
                )
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationCount:
    """What one operation of a tier has cost so far."""

    calls: int = 0
    errors: int = 0
    """Calls that raised."""
    bytes: int = 0
    """Given to or received from the tier by calls that did not raise."""
    secs: float = 0.0


class MeteredTier:
    """Counts calls, errors, bytes and seconds of each operation. Threads may share it."""

    def __init__(self, tier: Tier) -> None:
        self.inner = tier
        self._lock = threading.Lock()
        self._counts: dict[str, OperationCount] = {}

    @property
    def counts(self) -> Mapping[str, OperationCount]:
        """The counts so far, by the name of the method."""
        with self._lock:
            return MappingProxyType(dict(self._counts))

    @contextmanager
    def _measured(self, operation: str, size: int = 0) -> Generator[list[int], None, None]:
        moved, began, failed = [size], time.monotonic(), 1
        try:
            yield moved
            failed = 0
        finally:
            secs = time.monotonic() - began
            with self._lock:
                old = self._counts.get(operation, OperationCount())
                self._counts[operation] = replace(
                    old,
                    calls=old.calls + 1,
                    errors=old.errors + failed,
                    bytes=old.bytes + (0 if failed else moved[0]),
                    secs=old.secs + secs,
                )

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        return self.inner.name

    def list(self, prefix: str) -> list[Entry]:
        """See `Tier.list`."""
        with self._measured("list"):
            return self.inner.list(prefix)

    def list_dirs(self, prefix: str) -> Sequence[str]:
        """See `Tier.list_dirs`."""
        with self._measured("list_dirs"):
            return self.inner.list_dirs(prefix)

    def get(self, key: str, *, max_bytes: int = MAX_BYTES) -> Blob:
        """See `Tier.get`."""
        with self._measured("get") as moved:
            blob = self.inner.get(key, max_bytes=max_bytes)
            moved[0] = len(blob.data)
            return blob

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Tier.read_into`."""
        with self._measured("read_into", buffer.nbytes):
            self.inner.read_into(key, offset, buffer)

    def put(self, key: str, data: bytes) -> None:
        """See `Tier.put`."""
        with self._measured("put", len(data)):
            self.inner.put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """See `Tier.put_if_absent`."""
        with self._measured("put_if_absent", len(data)):
            self.inner.put_if_absent(key, data)

    def replace(self, key: str, data: bytes, *, version: str) -> None:
        """See `Tier.replace`."""
        with self._measured("replace", len(data)):
            self.inner.replace(key, data, version=version)

    def put_part(self, key: str, chunks: Chunks, size: int) -> None:
        """See `Tier.put_part`."""
        with self._measured("put_part", size):
            self.inner.put_part(key, chunks, size)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Tier.delete`."""
        with self._measured("delete"):
            self.inner.delete(keys)

    def probe(self) -> None:
        """See `Tier.probe`."""
        with self._measured("probe"):
            self.inner.probe()

    def close(self) -> None:
        """See `Tier.close`."""
        self.inner.close()
