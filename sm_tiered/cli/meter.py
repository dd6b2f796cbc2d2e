"""How far bytes on their way are, on standard error: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from sm_tiered.cli.output import age, clean, rate, size

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

__all__ = ["Meter"]

_LINE_SECS = 5.0


class Meter:
    """Tells done, total, rate and an estimate of one thing after the other. *quiet*: tells nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar = _bar() if not quiet and sys.stderr.isatty() else None
        self._task: TaskID | None = None
        self._label = ""
        self._began = self._next_at = 0.0
        self._first = self._noted = -1

    def begin(self, label: str) -> None:
        """Say that from now on it is about *label*."""
        self.end()
        self._label, self._began = clean(label), time.monotonic()
        self._first = self._noted = -1
        self._next_at = self._began + _LINE_SECS
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=None)

    def tell(self, done: int, total: int) -> None:
        """Say that *done* of *total* bytes are over."""
        if self._first < 0:
            self._first = done  # what an earlier try did tells nothing of the rate
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif not self._quiet and done != self._noted and time.monotonic() >= self._next_at:
            self._next_at, self._noted = time.monotonic() + _LINE_SECS, done
            self.note(f"{self._label}: {self._state(done, total)}")

    def note(self, line: str) -> None:
        """Say something that stays."""
        if self._quiet:
            return
        if self._bar is not None and self._task is not None:
            self._bar.console.print(clean(line), markup=False, highlight=False)
            return
        sys.stderr.write(clean(line) + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Give the terminal back."""
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
            self._bar.stop()

    def _state(self, done: int, total: int) -> str:
        facts = [f"{size(done)} of {size(total)}"]
        secs, now = time.monotonic() - self._began, done - max(0, self._first)
        if speed := rate(now, secs):
            facts += [speed, f"about {age((total - done) * secs / now)} left"]
        return ", ".join(facts)


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Moved(ProgressColumn):
        """Bytes done, of how many, and how fast."""

        def render(self, task: Task) -> Text:
            whole = "" if task.total is None else f" of {size(int(task.total))}"
            speed = f"  {size(int(task.speed))}/s" if task.speed else ""
            return Text(f"{size(int(task.completed))}{whole}{speed}", style="cyan")

    label = TextColumn("{task.description}", markup=False)
    return Bar(label, BarColumn(), Moved(), TimeRemainingColumn(), console=Console(stderr=True), transient=True)
