"""Methods of Lightning's objects that are ours for a while: it has no hook in their place."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

__all__ = ["Overrides"]


class Overrides:
    """Puts methods on objects, never on classes, and takes them off again; a ``with`` block does so at its end."""

    def __init__(self) -> None:
        self._put: list[tuple[Any, str]] = []

    def put(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        """Let *method* be *owner*'s method *name*."""
        setattr(owner, name, method)
        self._put.append((owner, name))

    def take_off(self) -> None:
        """Give all objects their own methods back. Can be called many times."""
        while self._put:
            delattr(*self._put.pop())

    def __enter__(self) -> Overrides:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.take_off()
