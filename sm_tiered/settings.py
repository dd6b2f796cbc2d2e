"""Everything that can be set, as frozen values. `sm_tiered.recipe` makes them from YAML; nothing else reads a file."""

from __future__ import annotations

from dataclasses import dataclass, field

from sm_tiered.policies.keep import KeepPolicy, Latest, most_kept
from sm_tiered.policies.save import SavePolicy

__all__ = [
    "HYPERPOD_URL",
    "HyperPodSettings",
    "LocalSettings",
    "LogSettings",
    "MemorySettings",
    "S3Settings",
    "Settings",
    "TierSettings",
]

HYPERPOD_URL = "http://ai-toolkit-gossip-headless.aws-hyperpod.svc.cluster.local:9200"
"""Where the in-memory checkpoint service of a SageMaker HyperPod cluster with tiered storage answers its pods."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSettings:
    """What all tiers have in common."""

    name: str
    save: SavePolicy | None
    """When to save there; None: only when a save names the tier."""
    keep: KeepPolicy

    @property
    def patient(self) -> bool:
        """Whether a save waits for the tier to come back."""
        return True

    @property
    def lane(self) -> int:
        """Tiers of one lane are promoted to one after the other, lanes beside each other."""
        return 0

    def in_flight_secs(self, most: float) -> float:
        """Return how long a save may be in flight there, in a job that allows *most*."""
        return most


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings(TierSettings):
    """This node's RAM, as a directory on tmpfs."""

    path: str
    """Absolute."""
    budget_bytes: int | None
    """Room that one rank's node may take in the memory tier; None: what tmpfs and the cgroup allow."""
    allow_disk: bool = False
    """Whether a path that is no tmpfs is taken too."""

    @property
    def generations(self) -> int:
        """How many checkpoints are kept, at least 1."""
        return self.keep.n if isinstance(self.keep, Latest) else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSettings(TierSettings):
    """A directory that all ranks share."""

    path: str
    """Absolute."""
    fsync: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings(TierSettings):
    """A prefix of an S3 bucket. Credentials come from AWS's own chain only."""

    bucket: str
    prefix: str
    """Without slashes at its ends; may be empty."""
    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    force_path_style: bool = False
    sse_kms_key_id: str | None = None
    part_bytes: int = 32 * 1024 * 1024
    throughput_gbps: float = 100.0
    """Target of the CRT client, in Gbit/s."""
    reader: str = "boto3"
    """Client for loads: ``boto3`` or ``crt`` (s3torchconnector)."""
    request_timeout_secs: float = 30.0
    """One request without progress."""
    retry_attempts: int = 8
    retry_deadline_secs: float = 120.0
    """One operation with all its retries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperPodSettings(TierSettings):
    """The in-memory checkpoint service of a SageMaker HyperPod cluster: RAM that outlives a node, not the cluster."""

    url: str = HYPERPOD_URL
    unreachable: str = "skip"
    """``skip`` or ``raise``: what a restore does when the service does not answer and other tiers have something."""
    connect_timeout_secs: float = 3.0
    request_timeout_secs: float = 30.0
    """One request without progress."""
    retry_attempts: int = 3
    retry_deadline_secs: float = 10.0
    """One operation with all its retries, and a second more for every 4 MiB that it moves."""
    commit_deadline_secs: float = 120.0
    """How long a save may be in flight: it is soon followed by the next one."""

    @property
    def patient(self) -> bool:
        """False: the next save soon takes the place of one that failed."""
        return False

    @property
    def lane(self) -> int:
        """One of its own: what goes from RAM to RAM often must not wait for what goes to storage for minutes."""
        return 1

    def in_flight_secs(self, most: float) -> float:
        """Return how long a save may be in flight there, in a job that allows *most*."""
        return min(most, self.commit_deadline_secs)

    @property
    def most_kept(self) -> int:
        """How many checkpoints the keep policy keeps at most."""
        return most_kept(self.keep) or 1

    @property
    def slots(self) -> int:
        """How many steps of a rank the service must hold before it drops the lowest.

        What is kept, the one that was restored from, one on its way, and one whose deletion failed.
        """
        return self.most_kept + 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """Where log lines go besides the handlers that the application has."""

    console: bool = False
    path: str | None = None
    """An absolute directory: each rank has a file in ``<path>/<namespace>``; None: no files."""
    level: str = "INFO"
    """``DEBUG``, ``INFO``, ``WARNING`` or ``ERROR``: the least that is told."""
    max_bytes: int = 16 * 1024 * 1024
    """A file that would grow beyond this is put aside."""
    kept: int = 4
    """How many of those stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One recipe, resolved."""

    namespace: str
    tiers: tuple[TierSettings, ...]
    """Fast → durable. At most one memory tier, and it comes first."""
    on_error: str = "warn"
    """``warn`` or ``raise``: what a failed save does."""
    unreachable: str = "raise"
    """``raise`` or ``use_memory``: what restore does when a durable tier does not answer."""
    allow_pickle: bool = False
    allow_partial: bool = False
    drain_timeout_secs: float = 1800.0
    """How long close() and on_end wait for the drainer."""
    commit_deadline_secs: float = 3600.0
    """How long a durable save may be in flight."""
    group_timeout_secs: float = 600.0
    """How long one collective may take."""
    in_use_wait_secs: float = 30.0
    """How long a launch waits for the trainers of another attempt to end."""
    stream_timeout_secs: float = 600.0
    """How long a trainer may itself stream to a durable tier when memory can't be used."""
    log: LogSettings | None = None
    """None: nothing of ours is added to `logging`."""
    source: str = "recipe"
    """Where it came from, for messages."""
    text: str = field(default="", repr=False)
    """The recipe as JSON, for the drainer; holds no secret."""

    @property
    def memory(self) -> MemorySettings | None:
        """The memory tier, when there is one."""
        return next((tier for tier in self.tiers if isinstance(tier, MemorySettings)), None)

    @property
    def durable(self) -> tuple[TierSettings, ...]:
        """The tiers that outlive a node, in recipe order: what the drainer promotes to."""
        return tuple(tier for tier in self.tiers if not isinstance(tier, MemorySettings))

    @property
    def optional(self) -> frozenset[str]:
        """The tiers that a restore goes on without, when they do not answer and others have something."""
        services = (tier for tier in self.tiers if isinstance(tier, HyperPodSettings))
        return frozenset(tier.name for tier in services if tier.unreachable == "skip")

    @property
    def arena_slots(self) -> int:
        """How many checkpoints memory must hold: what is kept, one being written, and one in flight in each lane."""
        kept = self.memory.generations if self.memory is not None else 0
        return kept + 1 + max(1, len({tier.lane for tier in self.durable}))

    def place_of(self, tier: str) -> int:
        """Return how many tiers of the recipe come before *tier*."""
        return [known.name for known in self.tiers].index(tier)

    def tier(self, name: str) -> TierSettings:
        """Return the tier called *name*, which the recipe has."""
        return self.tiers[self.place_of(name)]
