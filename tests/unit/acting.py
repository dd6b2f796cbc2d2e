"""A run on memory, local and S3 tiers, for tests of the commands that change something, and how to call these."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner, Result

from sm_tiered import layout
from sm_tiered.cli.app import app
from sm_tiered.inventory import list_checkpoints, read_manifest
from sm_tiered.policies.keep import Latest
from sm_tiered.records import CheckpointId
from sm_tiered.settings import LocalSettings, S3Settings
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.files import DirectoryTier
from tests.unit.cli_checkpoints import NAMESPACE, checkpoint, write_attempt, write_checkpoint


def call(*arguments: object) -> Result:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def document(result: Result) -> Any:
    """The JSON document that is all of standard output."""
    return json.loads(result.stdout)


@dataclass(frozen=True)
class Run:
    """One namespace."""

    root: Path
    s3_settings: S3Settings | None = None
    """None: there is no S3 tier."""
    namespace: str = NAMESPACE
    keep: int = 2
    _opened: dict[str, Tier] = field(default_factory=dict[str, Tier])

    @property
    def memory(self) -> DirectoryTier:
        """What the files of the memory tier look like, without locks."""
        return DirectoryTier(name="memory", base=str(self.root / "memory"), namespace=self.namespace, fsync=False)

    @property
    def local(self) -> Tier:
        """The local tier."""
        settings = LocalSettings(name="local", save=None, keep=Latest(1), path=str(self.root / "local"), fsync=False)
        return open_tier(settings, self.namespace)

    @property
    def s3(self) -> Tier:
        """The S3 tier."""
        if "s3" not in self._opened:  # each client costs a tenth of a second
            assert self.s3_settings is not None
            self._opened["s3"] = open_tier(self.s3_settings, self.namespace)
        return self._opened["s3"]

    def tier(self, name: str) -> Tier:
        """Return the tier of that name."""
        return self.s3 if name == "s3" else self.local if name == "local" else self.memory

    @property
    def durable(self) -> list[str]:
        """The names of its durable tiers."""
        return ["local", "s3"] if self.s3_settings else ["local"]

    def recipe(self, name: str = "recipe.yaml", *, tiers: Sequence[str] | None = None) -> Path:
        """Write the recipe with those *tiers*; None: all."""
        tiers = tiers or ["memory", *self.durable]
        s3 = self.s3_settings
        known: dict[str, Any] = {
            "memory": {"kind": "memory", "path": str(self.root / "memory"), "allow_disk": True, "keep": {"latest": 2}},
            "local": {"kind": "local", "path": str(self.root / "local"), "fsync": False, "keep": {"latest": self.keep}},
        }
        if s3 is not None:
            known["s3"] = {
                "kind": "s3",
                "uri": f"s3://{s3.bucket}/{s3.prefix}",
                "endpoint_url": s3.endpoint_url,
                "region": s3.region,
                "force_path_style": True,
                "keep": {"latest": self.keep},
                "retry": {"attempts": 2, "deadline_secs": 10},
            }
        given = {"version": 1, "namespace": self.namespace, "tiers": {name: known[name] for name in tiers}}
        path = self.root / name
        path.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
        return path

    def fill(self, *steps: int, on: Sequence[str] | None = None, ordinal: int = 1, **facts: Any) -> None:
        """Write whole checkpoints on those tiers (None: all durable ones), and the record of their attempt."""
        for name in on or self.durable:
            tier = self.tier(name)
            if name == "memory":
                (self.root / "memory").mkdir(mode=0o700, exist_ok=True)
                (self.root / "memory" / self.namespace).mkdir(mode=0o700, exist_ok=True)
            write_attempt(tier, ordinal)
            for step in steps:
                write_checkpoint(tier, checkpoint(step, ordinal), durable=name != "memory", **facts)

    def steps(self, name: str) -> list[int]:
        """Return the steps that are committed on a durable tier, oldest first."""
        tier = self.tier(name)
        found = [c for c in list_checkpoints(tier) if (m := read_manifest(tier, c)) is not None and not m.tombstone]
        return [c.step for c in found]


def names_of(tier: Tier, which: CheckpointId) -> list[str]:
    """Return the files of a checkpoint."""
    prefix = f"{layout.checkpoint_dir(which)}/"
    return [entry.key.removeprefix(prefix) for entry in tier.list(prefix)]
