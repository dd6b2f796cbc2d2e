"""EC2 tells a spot instance two minutes before it takes it away, in its metadata; this makes a SIGTERM of that.

One rank that hears it is enough: where a recipe says `on_preemption`, all ranks save the same step and stop.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

__all__ = ["noticed", "watch"]

EVERY_SECS = 5.0
"""As often as AWS advises."""

_ENDPOINT = "http://169.254.169.254"
_TIMEOUT_SECS = 2.0
_PATIENCE = 12
"""So many looks in a row without an answer, and this is no EC2 instance, or its metadata is out of reach."""
_log = logging.getLogger("spot_notice")
_ask = build_opener(ProxyHandler({})).open  # the address is the machine's own: no proxy knows it


def noticed() -> str | None:
    """Return what the notice says, e.g. ``{"action": "terminate", "time": "…"}``; None where there is none yet.

    Raises:
        OSError: the metadata did not answer. In a container IMDSv2 needs a hop limit of 2.
    """
    # The variable is AWS's own, for metadata that is somewhere else.
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _ENDPOINT).rstrip("/")
    session = Request(f"{base}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    with _ask(session, timeout=_TIMEOUT_SECS) as answer:
        key = answer.read(4096).decode("ascii", "replace")
    look = Request(f"{base}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": key})
    try:
        with _ask(look, timeout=_TIMEOUT_SECS) as answer:
            return answer.read(4096).decode("utf-8", "replace")
    except HTTPError as error:
        with error:
            if error.code == 404:
                return None
        raise


def watch(
    then: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGTERM), *, every_secs: float = EVERY_SECS
) -> threading.Thread:
    """Look in the background; call *then*, once, when the notice is there: by default a SIGTERM to this process."""
    thread = threading.Thread(target=_watch, args=(then, every_secs), name="spot-notice", daemon=True)
    thread.start()
    return thread


def _watch(then: Callable[[], object], every_secs: float) -> None:
    unanswered = 0
    while unanswered < _PATIENCE:
        try:
            notice = noticed()
        except OSError as error:
            unanswered += 1
            _log.info("no answer from the instance's metadata: %s", error)
        else:
            unanswered = 0
            if notice is not None:
                _log.warning("spot interruption notice: %s", notice)
                then()
                return
        time.sleep(every_secs)
    _log.warning("the instance's metadata does not answer: spot interruption notices are not heeded")
