"""What each key of a recipe means, with its unit and its range, as fragments of JSON Schema: editors show them."""

from __future__ import annotations

from collections.abc import Mapping

from sm_tiered.layout import MAX_STEP
from sm_tiered.recipe_fields import MAX_SECS

__all__ = ["HELP"]


def _text(description: str, **rules: object) -> dict[str, object]:
    return {"description": description, **rules}


def _secs(description: str, most: float | None = MAX_SECS) -> dict[str, object]:
    limit = {} if most is None else {"maximum": most}
    return {"description": f"{description} In seconds.", "exclusiveMinimum": 0, **limit}


def _count(description: str) -> dict[str, object]:
    return {"description": description, "minimum": 1}


def _steps(description: str) -> dict[str, object]:
    return {"description": description, "items": {"minimum": 0, "maximum": MAX_STEP - 1}, "minItems": 1}


def _form(message: str, pattern: str) -> dict[str, str]:
    """A pattern with what VS Code's and other YAML editors say instead of it."""
    return {"pattern": pattern, "patternErrorMessage": message}


def _policies(description: str) -> dict[str, object]:
    return {"description": description, "minItems": 1}


_STEP = {"minimum": 0, "maximum": MAX_STEP - 1}
_SIZE = _form(
    "A number and one of B, KiB, MiB, GiB, TiB, e.g. 16GiB.",
    r"^\s*(?!0+(\.0+)? ?[A-Z])[0-9]{1,15}(\.[0-9]{1,6})? ?(B|KiB|MiB|GiB|TiB)\s*$",
)
_PATH = r"^(?!.*://)[^\x00-\x1f\x7f]*[^\x00-\x20\x7f][^\x00-\x1f\x7f]*$"
_URI = _form(
    "Write s3://bucket/prefix.",
    r"^s3://(?![0-9]+(\.[0-9]+){3}(/|$))(?![^/]*(\.\.|\.-|-\.))[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
    r"(/(?!\.{1,2}(/|$))[A-Za-z0-9!_.*'()=+@,:~-]+)*/?$",
)
_NAMESPACE = _form(
    "1 to 128 of A-Z a-z 0-9 _ -, beginning with a letter or digit.", "^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$"
)
_MODE = {"enum": ["min", "max"]}
_SAVE = (
    "When to save to this tier: one policy, or several under any, all and not. Without it only when a save names it."
)
_METRIC = "The name that is given with a save, e.g. val_loss."
_DIRECTORY = "A relative path begins where the recipe is loaded."

_RECIPE: dict[str, Mapping[str, object]] = {
    "version": _text("The version of the recipe language: 1."),
    "namespace": _text("The run's identity.", **_NAMESPACE),
    "tiers": _text("Where checkpoints live, fast to durable. At most one memory tier, and it comes first."),
    "on_error": _text("What a failed save does: warn and let the training go on, or raise at the next save or close."),
    "unreachable": _text("What a restore does when a durable tier does not answer."),
    "allow_pickle": _text("Whether values that only a pickle can store are saved and loaded. A pickle can run code."),
    "allow_partial": _text("Whether a state that asks for less than was stored may be restored."),
    "drain_timeout_secs": _secs("How long close() and the end of a training wait for the drainer."),
    "commit_deadline_secs": _secs("How long a durable save may be in flight."),
    "group_timeout_secs": _secs("How long one collective may take."),
    "in_use_wait_secs": _secs("How long a launch waits for the trainers of another attempt to end."),
    "stream_timeout_secs": _secs("How long a trainer may itself stream to a durable tier when memory can't be used."),
    "log": _text("Where log lines go besides the handlers that the application has."),
}

_LOG: dict[str, Mapping[str, object]] = {
    "LogSection.console": _text("Whether they go to standard error."),
    "LogSection.path": _text(f"A directory: each rank has a file of its own there. {_DIRECTORY}", pattern=_PATH),
    "LogSection.level": _text("What is less important than that is left out."),
    "LogSection.max_size": _text("A file that has grown so far is put aside, e.g. 16MiB.", **_SIZE),
    "LogSection.kept": _text("How many old files of each rank stay.", minimum=1, maximum=1000),
}

_TIERS: dict[str, Mapping[str, object]] = {
    "MemoryTier.kind": _text("This node's RAM, as a directory on tmpfs."),
    "MemoryTier.path": _text(
        f"A directory on tmpfs, /dev/shm/sm_tiered-<uid> where none is given. {_DIRECTORY}", pattern=_PATH
    ),
    "MemoryTier.budget": _text(
        "Room that the memory tier may take on this node, e.g. 16GiB; else what tmpfs and the cgroup allow.",
        **_SIZE,
    ),
    "MemoryTier.save": _text(_SAVE),
    "MemoryTier.keep": _text("What to keep: {latest: n}, for memory recycles a fixed number of checkpoints."),
    "MemoryTier.allow_disk": _text("Whether a path that is not on tmpfs is taken too."),
    "LocalTier.kind": _text("A directory that all ranks share: FSx for Lustre, NFS, or one node's disk on one node."),
    "LocalTier.path": _text(f"The directory. {_DIRECTORY}", pattern=_PATH),
    "LocalTier.save": _text(_SAVE),
    "LocalTier.keep": _text("What to keep: one policy, or several under any, all and not."),
    "LocalTier.fsync": _text("Whether a commit waits until the disk has it."),
    "S3Tier.kind": _text("A prefix of an S3 bucket, or of one in a store that is compatible."),
    "S3Tier.uri": _text("s3://bucket/prefix.", **_URI),
    "S3Tier.save": _text(_SAVE),
    "S3Tier.keep": _text("What to keep: one policy, or several under any, all and not."),
    "S3Tier.endpoint_url": _text(
        "The address of an S3-compatible store, https://host:port.", pattern=r"^https?://[^@?#\s]+$"
    ),
    "S3Tier.allow_http": _text("Whether endpoint_url may be plain http to another machine."),
    "S3Tier.region": _text("E.g. us-east-1; AWS's own configuration where none is given.", pattern="^[a-z0-9-]{1,63}$"),
    "S3Tier.profile": _text("The name of a profile in ~/.aws/config.", pattern=r"^[^\x00-\x1f\x7f]{1,128}$"),
    "S3Tier.force_path_style": _text("Whether the bucket stands in the path and not in the name of the host."),
    "S3Tier.sse": _text("Server-side encryption with a key of one's own."),
    "S3Tier.part_size": _text("Of one part of an upload, 5MiB to 5GiB.", **_SIZE),
    "S3Tier.throughput_gbps": _text(
        "What the client aims at. In Gbit/s, 10^9 bits.", exclusiveMinimum=0, maximum=10_000
    ),
    "S3Tier.reader": _text("The client that loads: boto3, or s3torchconnector's CRT."),
    "S3Tier.request_timeout_secs": _secs("How long one request may stand still."),
    "S3Tier.retry": _text("The budget of one operation with all its retries."),
    "HyperPodTier.kind": _text("The in-memory checkpoint service of a SageMaker HyperPod cluster with tiered storage."),
    "HyperPodTier.url": _text("The address of the service, http://host:port.", pattern=r"^https?://[^@?#\s/]+/?$"),
    "HyperPodTier.save": _text(_SAVE),
    "HyperPodTier.keep": _text("What to keep: a policy with a limit, like {latest: 3}."),
    "HyperPodTier.unreachable": _text(
        "What a restore does when the service does not answer: skip it where other tiers have something, or raise."
    ),
    "HyperPodTier.connect_timeout_secs": _secs("How long a connection may take."),
    "HyperPodTier.request_timeout_secs": _secs("How long one request may stand still."),
    "HyperPodTier.retry": _text("The budget of one operation with all its retries."),
    "HyperPodTier.commit_deadline_secs": _secs("How long a save may be in flight there."),
    "ServiceRetry.attempts": _text("How often an operation is tried; 1 means no retry.", minimum=1, maximum=100),
    "ServiceRetry.deadline_secs": _secs("How long an operation may take with all its retries."),
    "Encryption.kms_key_id": _text("A KMS key id, an alias/… or an ARN.", pattern="^[A-Za-z0-9:/_-]{1,2048}$"),
    "Retry.attempts": _text("How often an operation is tried; 1 means no retry.", minimum=1, maximum=100),
    "Retry.deadline_secs": _secs("How long an operation may take with all its retries."),
}

_SAVE_POLICIES: dict[str, Mapping[str, object]] = {
    "every_n_steps": _count("At every multiple of n; or {n, offset, start, stop}."),
    "every_n_epochs": _count("At the end of every n-th epoch."),
    "every_secs": _secs("When so much time has passed since the last save to this tier.", None),
    "at_steps": _steps("At exactly these steps."),
    "when_improved": _text("Where a metric is better than in every checkpoint of this tier."),
    "max_overhead": _text(
        "As often as saving costs no more than this share of the training time: 0.01 is 1 %.",
        exclusiveMinimum=0,
        exclusiveMaximum=1,
    ),
    "optimal": _text("At the interval that loses the least time to saves and failures together (Young, Daly)."),
    "on_end": _text("When the training is over."),
    "on_exception": _text("When an exception has left the training: the newest step that is whole in memory."),
    "on_preemption": _text("Once any rank was told to stop, e.g. by SIGTERM."),
    "on_request": _text("When sm-tiered request asks for it, or a file that appears: {file: /a/path}."),
    "any": _policies("When at least one of these says so."),
    "all": _policies("When all of these say so."),
    "not": _text("When this one does not say so."),
}

_KEEP_POLICIES: dict[str, Mapping[str, object]] = {
    "latest": _count("The n newest."),
    "every_n_steps": _count("Those whose step is a multiple of n, for good."),
    "at_steps": _steps("Exactly these steps, for good."),
    "newer_than_secs": _secs("Those saved less than so long before the newest one.", None),
    "best": _text("The n best by a metric."),
    "any": _policies("What at least one of these keeps."),
    "all": _policies("What all of these keep."),
    "not": _text("What this one does not keep."),
}

_PARTS_OF_POLICIES: dict[str, Mapping[str, object]] = {
    "EveryNStepsSpec.n": _count("Multiples of n."),
    "EveryNStepsSpec.offset": _text("So many steps later than each multiple; below n.", **_STEP),
    "EveryNStepsSpec.start": _text("The first step that may be one.", **_STEP),
    "EveryNStepsSpec.stop": _text("The last step that may be one.", **_STEP),
    "ImprovedSpec.metric": _text(_METRIC, minLength=1),
    "ImprovedSpec.mode": _text("Which is better.", **_MODE),
    "ImprovedSpec.min_delta": _text("By how much, in the metric's own unit.", minimum=0),
    "RequestSpec.file": _text(
        f"Looked for at each step, and removed when its save begins. {_DIRECTORY}", pattern=_PATH
    ),
    "OptimalSpec.mtbf_secs": _secs("Mean time between failures of the whole job: 1/n of one node's on n nodes."),
    "OptimalSpec.observe": _text("Whether failures of this namespace correct mtbf_secs."),
    "BestSpec.metric": _text(_METRIC, minLength=1),
    "BestSpec.mode": _text("Which is better.", **_MODE),
    "BestSpec.n": _count("How many."),
}

HELP: Mapping[str, Mapping[str, object]] = {
    **{f"Recipe.{key}": help for key, help in _RECIPE.items()},
    **_LOG,
    **_TIERS,
    **{f"SaveSpec.{key}": help for key, help in _SAVE_POLICIES.items()},
    **{f"KeepSpec.{key}": help for key, help in _KEEP_POLICIES.items()},
    **_PARTS_OF_POLICIES,
}
"""By model and key, as a recipe writes it."""
