"""Looks at the HyperPod service: many at once, and none twice where one pass needs an answer in several places.

Each costs a round trip, and a checkpoint has as many as ranks.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar, cast

from sm_tiered import deadline
from sm_tiered.errors import TierUnavailableError

__all__ = ["LOOK_BYTES", "THREADS", "asking_once", "each", "once", "unsay"]

THREADS = 8
"""As many requests are under way at the most; the client keeps as many connections."""

LOOK_BYTES = deadline.MIN_BYTES_PER_SEC // 16
"""What a look counts as where a deadline allows for bytes: a sixteenth of a second."""

_GRACE_SECS = 1.0

_T = TypeVar("_T")
_R = TypeVar("_R")

_answers: ContextVar[dict[Hashable, object] | None] = ContextVar("answers", default=None)
"""What was asked since the pass began, in whichever thread of it; None: there is no pass."""


@contextmanager
def asking_once() -> Generator[None, None, None]:
    """Within it, `once` asks each question once. It begins with no answers, so nothing older is believed.

    One within another is part of it: what either changes, both must see.
    """
    if _answers.get() is not None:
        yield
        return
    token = _answers.set({})
    try:
        yield
    finally:
        _answers.reset(token)


def once(question: Hashable, ask: Callable[[], _T]) -> _T:
    """Return the answer that *question* had in this pass, else that of *ask*."""
    answers = _answers.get()
    if answers is None:
        return ask()
    if question not in answers:
        answers[question] = ask()
    return cast(_T, answers[question])


def unsay(question: Hashable) -> None:
    """Ask *question* anew the next time: who asks has changed what the answer was about."""
    answers = _answers.get()
    if answers is not None:
        answers.pop(question, None)


def each(
    call: Callable[[_T], _R], items: Sequence[_T], *, secs: float, enough: Callable[[_R], bool] | None = None
) -> list[_R]:
    """Return what *call* returns for each of *items*, in their order, asked in a few threads.

    *secs* is the longest that one call may take. After an answer that is *enough*, or an error, no further item is
    begun, and the answers of those that were not are left out.

    Raises:
        TierUnavailableError: the calls did not end.
        BaseException: what the first of the calls that failed raised.
    """
    if len(items) < 2:
        return [call(item) for item in items]
    # What the threads share changes in single steps that are atomic: there is no lock that a fork could leave locked.
    answers, errors = dict[int, _R](), dict[int, BaseException]()
    left, ended = iter(range(len(items))), threading.Event()

    def turn() -> None:
        while not ended.is_set() and (index := next(left, None)) is not None:
            try:
                answers[index] = call(items[index])
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors[index] = error
                ended.set()
                return
            if enough is not None and enough(answers[index]):
                ended.set()

    _run(turn, min(THREADS, len(items)), secs * -(-len(items) // THREADS), ended)
    if errors:
        raise errors[min(errors)]
    return [answers[index] for index in sorted(answers)]


def _run(turn: Callable[[], None], threads: int, secs: float, ended: threading.Event) -> None:
    """Run *turn* in *threads*, in which the deadline of who asks holds too."""
    # A context can be entered once at a time.
    contexts = [contextvars.copy_context() for _ in range(threads)]
    tasks = [deadline.Task(lambda context=context: context.run(turn)) for context in contexts]
    try:
        for task in tasks:
            task.result(deadline.remaining(secs) + _GRACE_SECS)
    except TimeoutError as error:
        raise TierUnavailableError(f"no answers to all requests within {secs:.1f} s") from error
    finally:
        ended.set()
