"""``sm-tiered import``: what it takes, what it refuses and why, and its exit statuses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sm_tiered.manifest import record_to_json
from sm_tiered.policies.keep import Latest
from sm_tiered.records import Attempt, CheckpointId, Record
from sm_tiered.settings import HyperPodSettings, S3Settings
from sm_tiered.testing.daemon import StandInDaemon, shard_meta
from sm_tiered.tiers import Share, ShareTier, open_tier
from sm_tiered.tiers.hyperpod_service import HyperPodService, Slot
from tests.integrations.predecessor_made import NAMESPACE, Made, imported, made, two_ranks
from tests.unit.acting import call, document

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


class Job:
    """A recipe with memory, a directory and an S3 tier, and what the predecessor left in a bucket."""

    def __init__(self, root: Path, settings: S3Settings, client: S3Client) -> None:
        self.root, self.settings, self.client = root, settings, client
        self.base = f"s3://{settings.bucket}/theirs"
        self.recipe = root / "recipe.yaml"
        self.recipe.write_text(
            "version: 1\nnamespace: ours\ntiers:\n"
            f"  memory: {{kind: memory, path: {root / 'memory'}, allow_disk: true}}\n"
            f"  local: {{kind: local, path: {root / 'local'}, fsync: false, keep: {{latest: 2}}}}\n"
            f"  s3: {{kind: s3, uri: s3://{settings.bucket}/ours, endpoint_url: {settings.endpoint_url}, "
            "region: us-east-1, force_path_style: true, retry: {attempts: 2, deadline_secs: 5}}\n"
            "  cluster: {kind: hyperpod, keep: {latest: 2}}\n",
            encoding="utf-8",
        )

    def put(self, step: int, found: Made | None = None, *, but: str = "", cut: int = 0) -> None:
        """Write a step to the bucket, without the files that end in *but*, shards without their last *cut* bytes."""
        found = found or two_ranks(step)
        files = {f"rank_{rank}/step_{step}/checkpoint.pt": data for rank, data in enumerate(found.shards)}
        files[f"rank_0/step_{step}/metadata.metadata"] = found.pickled()
        for name, data in files.items():
            if not (but and name.endswith(but)):
                body = data[: len(data) - cut] if name.endswith(".pt") else data
                self.client.put_object(Bucket=self.settings.bucket, Key=f"theirs/{NAMESPACE}/{name}", Body=body)

    def run(self, *arguments: object, status: int = 0) -> str:
        """Import from the bucket to the directory; return all that was said."""
        result = call("import", self.recipe, "--from", self.base, "--from-namespace", NAMESPACE, *arguments)
        assert result.exit_code == status, result.output
        return " ".join(result.output.split())

    def directory(self, step: int) -> Path:
        return imported(self.root / "local" / "ours", step)


@pytest.fixture
def job(tmp_path: Path, make_s3_settings: Callable[..., S3Settings], s3_client: S3Client) -> Job:
    return Job(tmp_path, make_s3_settings(), s3_client)


TO = ("--to", "local")


def test_the_latest_complete_step_is_taken_and_what_was_passed_over_is_said(job: Job) -> None:
    job.put(10)
    job.put(20)
    job.put(30, but="rank_1/step_30/checkpoint.pt")
    job.put(40, but="metadata.metadata")
    told = job.run(*TO, status=3)
    assert "step_40: its metadata is missing: the save never ended" in told
    assert "step_30: the shard of rank 1 is missing" in told
    assert "imported, read back, committed" in told
    assert "1 of 3 from" in told
    assert job.directory(20).is_dir()
    assert not list((job.root / "local" / "ours").glob("step_0000000010-*"))
    assert call("verify", job.recipe, "--tier", "local").exit_code == 0
    found = document(call("ls", job.recipe, "--json"))
    assert found is not None


@pytest.mark.parametrize("base", ["theirs/", ""])
def test_a_base_path_that_ended_in_a_slash_is_found(base: str, job: Job) -> None:
    found = two_ranks(10)
    files = {f"rank_{rank}/step_10/checkpoint.pt": data for rank, data in enumerate(found.shards)}
    for name, data in {**files, "rank_0/step_10/metadata.metadata": found.pickled()}.items():
        job.client.put_object(Bucket=job.settings.bucket, Key=f"{base}/{NAMESPACE}/{name}", Body=data)
    place = f"s3://{job.settings.bucket}/{base}"
    result = call("import", job.recipe, "--from", place, "--from-namespace", NAMESPACE, *TO)
    assert (result.exit_code, job.directory(10).is_dir()) == (0, True)


def test_a_save_that_never_ended_is_no_failure(job: Job) -> None:
    job.put(10)
    job.put(40, but="metadata.metadata")
    assert "1 of 2 from" in job.run(*TO, "--latest")


def test_a_dry_run_writes_nothing(job: Job) -> None:
    job.put(10)
    told = job.run(*TO, "--dry-run")
    assert "metadata and sizes are complete; contents were not read" in told
    assert "nothing was written" in told
    assert not (job.root / "local" / "ours").exists()


def test_all_of_them_to_s3_as_json(job: Job) -> None:
    job.put(10)
    job.put(20)
    base = ("import", job.recipe, "--from", job.base, "--from-namespace", NAMESPACE, "--to", "s3", "--all", "--json")
    found = document(call(*base))
    assert (found["ok"], found["to"], found["namespace"]) == (True, "s3", "ours")
    first = found["checkpoints"][0]
    assert (first["step"], first["ranks"], first["tensors"], first["values"]) == (10, 2, 2, 2)
    assert (first["ok"], first["already"], first["error"]) == (True, False, None)
    assert [each["already"] for each in document(call(*base))["checkpoints"]] == [True, True]


def test_what_the_keep_policy_will_give_up_is_said_and_can_be_pinned(job: Job) -> None:
    for step in (10, 20, 30):
        job.put(step)
    assert "the keep policy of local gives step 10 up at the next save there; --pin keeps them" in job.run(*TO, "--all")
    assert "gives" not in job.run(*TO, "--all", "--pin")
    assert "10" in call("pin", job.recipe, "--tier", "local").output


def test_saves_of_our_own_come_first_and_that_is_said(job: Job) -> None:
    job.put(10)
    own = job.root / "local/ours/attempts/a000003-1700000000-0123abcd.json"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"{}")
    assert "ours has saves of its own, of attempts up to a3: a restore takes those first" in job.run(*TO)


USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "two choices": (("--from", "s3://b", "--step", "1", "--all"), "--step, --latest and --all don't go together"),
    "no place": (("--from", "bucket/prefix"), "'bucket/prefix' is no place to import from"),
    "a directory": (("--from", "/checkpoints"), "is no place to import from"),
    "no bucket": (("--from", "s3://"), "--from: 's3://' names no bucket"),
    "a bad bucket": (("--from", "s3://Bad_Bucket/x"), "--from: 'Bad_Bucket' can't be the name of a bucket"),
    "capitals": (("--from", "S3://bucket"), "must start with s3:// in lower case"),
    "a namespace": (("--from", "s3://b", "--from-namespace", "../x"), "namespace '../x' has an illegal character"),
    "a namespace that spells a call": (
        ("--from", "http://127.0.0.1:9", "--from-namespace", "cluster/reset"),
        "namespace 'cluster/reset' has an illegal character",
    ),
    "a step": (("--from", "s3://bkt", "--step", "-1"), "--step -1 is out of range"),
    "no tier": (("--from", "s3://bkt", "--to", "fsx"), "--to: the recipe has no tier 'fsx'"),
    "the memory": (("--from", "s3://bkt", "--to", "memory"), "--to: memory is the memory tier"),
    "two tiers": (("--from", "s3://bkt"), "--to is missing: there are several durable tiers"),
    "credentials": (("--from", "http://me:secret@host", *TO), ""),
}


@pytest.mark.parametrize("kind", USAGE)
def test_bad_usage_is_told(kind: str, job: Job) -> None:
    arguments, told = USAGE[kind]
    to = () if "--to" in arguments or kind == "two tiers" else TO
    result = call("import", job.recipe, *arguments, *to)
    assert result.exit_code == 2
    assert told in result.output
    assert "secret" not in result.output


def test_what_is_not_there_is_told(job: Job) -> None:
    told = job.run(*TO, status=1)
    assert f"s3://{job.settings.bucket}/theirs/theirs holds no checkpoint of amzn-sagemaker-checkpointing" in told
    job.put(10)
    assert "has no step 11" in (told := job.run(*TO, "--step", 11, status=1))
    assert "It has 10." in told
    job.put(20, but="metadata.metadata")
    assert "no checkpoint there is complete: " in job.run(*TO, "--step", 20, status=1)
    assert "NoSuchBucket" in call("import", job.recipe, "--from", "s3://nobody-made-this", *TO).output


def test_damage_and_hostile_metadata_are_told_by_their_own_status(job: Job) -> None:
    job.put(10, cut=5)
    assert "bytes, the metadata says" in job.run(*TO, status=3)
    evil = two_ranks(20)
    evil.metadata.storage_meta = _Evil()  # type: ignore[assignment]
    job.put(20, evil)
    assert "which is no part of DCP's metadata" in job.run(*TO, "--step", 20, status=3)


class _Evil:
    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return exit, (77,)


def test_a_value_that_only_a_pickle_can_load_is_refused_by_name(job: Job) -> None:
    import fractions

    job.put(10, made({"half": fractions.Fraction(1, 2), "n": 1}))
    told = job.run(*TO, status=1)
    assert "half in " in told
    assert "add --allow-pickle" in told
    told = job.run(*TO, "--allow-pickle")
    assert "step 10: half: only a pickle can load it; restore with `allow_pickle: true`" in told


def test_credentials_that_are_missing_are_told(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    told = job.run(*TO, status=1)
    assert "redentials" in told


# ---- from the cluster's service


def filled(daemon: StandInDaemon, *steps: int) -> None:
    """Put steps where the predecessor puts them: shards at their ranks, the metadata in the slot behind."""
    service = HyperPodService(HyperPodSettings(name="cluster", save=None, keep=Latest(3), url=daemon.url))
    service.create(NAMESPACE, ranks=3, kept=3)
    for step in steps:
        found = two_ranks(step)
        for slot, data in enumerate([*found.shards, found.pickled()]):
            place = Slot(namespace=NAMESPACE, rank=slot, wire=step)
            service.put(place, lambda data=data: iter([memoryview(data)]), len(data), shard_meta(data))
    service.close()


def test_from_the_cluster_s_service(job: Job) -> None:
    with StandInDaemon() as daemon:
        filled(daemon, 10, 20)
        base = ("import", job.recipe, "--from", daemon.url, "--from-namespace", NAMESPACE, *TO)
        assert "2 of 2 from" in call(*base, "--all").output
        assert job.directory(20).is_dir()
        daemon.namespaces[NAMESPACE].blobs[1].clear()
        assert "the shard of rank 1 is missing" in (result := call(*base)).output
        assert result.exit_code == 3
        assert "holds no checkpoint" in call(*base[:-4], "--from-namespace", "nobody", *TO).output
    result = call(*base)
    assert result.exit_code == 1
    assert "does not answer" in result.output


def test_to_the_cluster_s_memory_unless_that_takes_the_place_of_saves_of_ours(job: Job) -> None:
    job.put(10)
    with StandInDaemon() as daemon:
        to = ("--to", "cluster", "--set", f"tiers.cluster.url={daemon.url}")
        assert "imported, read back, committed" in job.run(*to)
        assert "there already" in job.run(*to)
        refused = job.run(*to, "--pin", status=2)
        assert "can't keep a pin" in refused
    with StandInDaemon() as daemon:
        settings = HyperPodSettings(name="cluster", save=None, keep=Latest(2), url=daemon.url)
        own = CheckpointId(attempt=Attempt(ordinal=1, utc_secs=1700000000, nonce="0123abcd"), step=10)
        with closing(open_tier(settings, "ours")) as tier:
            assert isinstance(tier, ShareTier)
            record = record_to_json(Record(namespace="ours", checkpoint=own, rank=0, world=1, saved_at=1.0))
            tier.put_share(Share(checkpoint=own, rank=0, world=1, record=record))
        told = job.run("--to", "cluster", "--set", f"tiers.cluster.url={daemon.url}", status=1)
        assert "cluster holds saves of a000001-1700000000-0123abcd, whose places an import would take" in told
