"""What several files share: a plain terminal and a command run in this process; the HyperPod service and its tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner, Result

from sm_tiered.cli.app import app
from sm_tiered.testing.daemon import SMALL_STEPS, StandInDaemon
from sm_tiered.tiers.hyperpod import HyperPodTier
from tests.unit.hyperpod_sharing import bare


@pytest.fixture
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, no colours."""
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run a command."""

    def call(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "Traceback" not in result.output
        return result

    return call


# ---- the HyperPod service; a file of tests may have a tier of its own


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    """Serve the stand-in for the service."""
    with StandInDaemon() as daemon:
        yield daemon


@pytest.fixture
def small(daemon: StandInDaemon) -> StandInDaemon:
    """Return one that takes no steps that begin with an attempt."""
    daemon.memory.max_step = SMALL_STEPS
    return daemon


@pytest.fixture
def tier(daemon: StandInDaemon) -> Iterator[HyperPodTier]:
    """Give a tier that repeats nothing."""
    tier = bare(daemon.url)
    yield tier
    tier.close()


@pytest.fixture
def other(daemon: StandInDaemon) -> Iterator[HyperPodTier]:
    """A tier of another process: it remembers nothing of what this one wrote."""
    tier = bare(daemon.url)
    yield tier
    tier.close()
