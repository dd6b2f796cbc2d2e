"""How far long work is, on standard error."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from sm_tiered.cli.output import age, clean, rate, size
from sm_tiered.records import CheckpointId
from sm_tiered.verify import Progress, Report

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

__all__ = ["Steps", "Timed", "Watch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A report, and how long it took."""

    report: Report
    secs: float


class Watch:
    """Tells how far verifying is: a bar with the rate on a terminal, a line for each checkpoint elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._lines = not quiet and not sys.stderr.isatty()
        self._bar = None if quiet or self._lines else _bar()
        self._task: TaskID | None = None

    def begin(self, tier: str, checkpoint: CheckpointId) -> Progress | None:
        """Return what is to be told the progress on *checkpoint*."""
        if self._bar is None:
            return None
        bar = self._bar
        bar.start()
        self.end()
        task = self._task = bar.add_task(f"{clean(tier)} step {checkpoint.step}", total=None)
        return lambda done, total: bar.update(task, completed=done, total=total)

    def done(self, timed: Timed) -> None:
        """Say what came out."""
        if self._lines:
            _note(timed)

    def end(self) -> None:
        """Take the bar of the checkpoint away."""
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self.end()
            self._bar.stop()


class Steps:
    """Tells on a terminal how many steps of many are done; elsewhere nothing, for they take seconds."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total = total
        self._bar = None if quiet or not sys.stderr.isatty() else _steps_bar()
        self._task: TaskID | None = None

    def tell(self, step: int) -> None:
        """Say how many are done."""
        if self._bar is None:
            return
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("steps", total=self._total)
        self._bar.update(self._task, completed=step)

    def __enter__(self) -> Steps:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()


def _steps_bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Bar(*columns, console=Console(stderr=True), transient=True)


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Read(ProgressColumn):
        """Bytes read, of how many, how fast, and for how long still."""

        def render(self, task: Task) -> Text:
            whole = "" if task.total is None else f" of {size(int(task.total))}"
            speed = f"  {size(int(task.speed))}/s" if task.speed else ""
            left = f"  {age(task.time_remaining)} left" if task.time_remaining else ""
            return Text(f"{size(int(task.completed))}{whole}{speed}{left}", style="cyan")

    label = TextColumn("{task.description}", markup=False)
    return Bar(label, BarColumn(), Read(), console=Console(stderr=True), transient=True)


def _note(timed: Timed) -> None:
    report = timed.report
    facts = [f"{report.tier} step {report.checkpoint.step}: {report.state.value}"]
    facts += [f"{size(report.bytes_read)} read"] if report.bytes_read else []
    facts += [speed] if (speed := rate(report.bytes_read, timed.secs)) else []
    sys.stderr.write(clean(", ".join(facts)) + "\n")
    sys.stderr.flush()
