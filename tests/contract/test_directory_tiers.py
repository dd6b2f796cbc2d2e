"""The contract over the wrappers around directory tiers. The bare tiers' own tests run it too."""

from __future__ import annotations

from pathlib import Path

import pytest

from sm_tiered.policies.keep import Latest
from sm_tiered.settings import LocalSettings, MemorySettings
from sm_tiered.testing.contract import TierContract
from sm_tiered.testing.faults import FaultyTier
from sm_tiered.tiers import Tier, open_tier
from sm_tiered.tiers.wrappers import MeteredTier, RetryingTier


class DirectoryContract(TierContract):
    """The contract with a look into the directory past the tier."""

    root: Path

    def raw_read(self, tier: Tier, key: str) -> bytes | None:
        path = self.root / key
        return path.read_bytes() if path.is_file() else None

    def raw_keys(self, tier: Tier) -> list[str]:
        found = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        own = {".arena", ".queue", ".locks", ".replace"}  # what the tier keeps for itself, and never lists
        return sorted(str(path) for path in found if not own & set(path.parts))

    def raw_write(self, tier: Tier, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o600)


def wrapped(tier: Tier) -> Tier:
    """Wrappers that have nothing to do change nothing."""
    return RetryingTier(MeteredTier(FaultyTier(tier)))


class TestWrappedLocalTier(DirectoryContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Tier:
        self.root = tmp_path / "shared" / "run-1"
        settings = LocalSettings(name="d", save=None, keep=Latest(1), path=str(tmp_path / "shared"))
        return wrapped(open_tier(settings, "run-1"))


class TestWrappedMemoryTier(DirectoryContract):
    @pytest.fixture
    def tier(self, memory_dir: Path) -> Tier:
        self.root = memory_dir / "run-1"
        settings = MemorySettings(
            name="memory", save=None, keep=Latest(1), path=str(memory_dir), budget_bytes=None, allow_disk=True
        )
        return wrapped(open_tier(settings, "run-1"))
