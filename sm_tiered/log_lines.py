"""One line for each log record: ``[timestamp] [namespace] [logger] [LEVEL] [file:line] [Rank r] Step n: message``.

A record of any logger becomes one; what it does not say is ``-``, and without a step there is no ``Step n:``.
"""

from __future__ import annotations

import logging
from datetime import datetime, timezone

__all__ = ["LineFormatter", "printable"]

_INDENT = "    "


def printable(text: str) -> str:
    """Return *text* with what could forge a line or steer a terminal escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class LineFormatter(logging.Formatter):
    """The lines of the module's docstring. Times are UTC, to the millisecond; a traceback follows, indented.

    *namespace* and *rank* are for records that have none. The drainer's rank, and one that nobody knows, is ``-``.
    """

    def __init__(self, *, namespace: str | None = None, rank: int | None = None) -> None:
        super().__init__()
        self._namespace, self._rank = namespace, rank

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of *record*, and those of its traceback and stack below it."""
        when = datetime.fromtimestamp(record.created, tz=timezone.utc).isoformat(timespec="milliseconds")
        namespace = getattr(record, "namespace", self._namespace)
        rank = getattr(record, "rank", self._rank)
        fields = (
            when.replace("+00:00", "Z"),
            namespace if isinstance(namespace, str) else "-",
            record.name,
            record.levelname,
            f"{record.filename}:{record.lineno}",
            f"Rank {rank if isinstance(rank, int) else '-'}",
        )
        line = "".join(f"[{field}] " for field in fields) + _with_step(record)
        return "\n".join([printable(line), *(f"{_INDENT}{printable(below)}" for below in self._below(record))])

    def _below(self, record: logging.LogRecord) -> list[str]:
        trace = self.formatException(record.exc_info) if record.exc_info else record.exc_text or ""
        return [*trace.splitlines(), *(record.stack_info or "").splitlines()]


def _with_step(record: logging.LogRecord) -> str:
    message, step = record.getMessage(), getattr(record, "step", None)
    if not isinstance(step, int):
        return message
    return f"Step {step}: {message.removeprefix(f'step {step}: ')}"
