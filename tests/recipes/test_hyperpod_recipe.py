"""SageMaker HyperPod on EKS: the pods' manifest, their role's policy and the recipe say the same, and it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from sm_tiered.errors import TieredError
from sm_tiered.recipe import Recipe
from sm_tiered.settings import S3Settings
from sm_tiered.testing.proxy import FaultProxy
from sm_tiered.tiers import s3_upload, s3_window
from sm_tiered.tiers.s3 import S3Tier
from sm_tiered.tiers.s3_client import S3Connection
from tests.recipes.launching import RECIPES, launched, lose_memory, s3_steps
from tests.recipes.s3_permissions import ACTIONS, Asked, Policy

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

FOLDER = RECIPES / "hyperpod"
RECIPE = FOLDER / "recipe.yaml"
MANIFEST = (FOLDER / "job.yaml").read_text()
POLICY = Policy(FOLDER / "iam_policy.json")
MIB = 2**20


def pod(text: str = MANIFEST) -> dict[str, Any]:
    """The pods' spec."""
    return yaml.safe_load(text)["spec"]["replicaSpecs"][0]["template"]["spec"]


def environment() -> dict[str, str]:
    """What the pod sets."""
    (container,) = pod()["containers"]
    return {entry["name"]: entry["value"] for entry in container["env"]}


def gib(text: str) -> float:
    """A size of Kubernetes or of a recipe."""
    found = re.fullmatch(r"(\d+)Gi(B?)", text)
    assert found is not None, text
    return float(found[1])


def test_the_manifest_is_a_job_of_the_operator_that_runs_the_script_with_the_recipe() -> None:
    job = yaml.safe_load(MANIFEST)
    assert (job["apiVersion"], job["kind"]) == ("sagemaker.amazonaws.com/v1", "HyperPodPyTorchJob")
    (container,) = pod()["containers"]
    command: list[str] = container["command"]
    (nodes,) = job["spec"]["replicaSpecs"]
    assert command[0] == "hyperpodrun", "as the first process, or it hears no SIGTERM"
    assert f"--nnodes={nodes['replicas']}" in command
    assert f"--nproc-per-node={job['spec']['nprocPerNode']}" in command
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
    script = command.index("/opt/recipes/train_with_dcp.py")
    assert (RECIPES / "train_with_dcp.py").is_file()
    assert f"--recipe=/opt/recipes/{RECIPE.relative_to(RECIPES)}" in command[script:]
    assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_end_of_a_pod_leaves_time_for_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = pod()["containers"]
    timeout = int(next(word for word in container["command"] if word.startswith("--shutdown-timeout=")).split("=")[1])
    assert "--shutdown-signal=SIGTERM" in container["command"]
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    settings = Recipe.load(RECIPE).settings()
    assert settings.drain_timeout_secs < timeout < pod()["terminationGracePeriodSeconds"]


def other_volume() -> str:
    """The manifest with the volume that its comment offers."""
    used = re.search(r"\n( +)emptyDir: .*", MANIFEST)
    offered = re.search(r"\n +# (hostPath: .*)", MANIFEST)
    assert used is not None
    assert offered is not None
    return MANIFEST.replace(used[0], f"\n{used[1]}{offered[1]}")


def test_shared_memory_is_a_volume_with_room_for_the_budget() -> None:
    (container,) = pod()["containers"]
    (mount,) = container["volumeMounts"]
    (volume,) = pod()["volumes"]
    assert mount["mountPath"] == "/dev/shm", "the tier's default is below it"
    assert mount["name"] == volume["name"]
    assert volume["emptyDir"]["medium"] == "Memory"
    budget, size = gib(environment()["MEMORY_BUDGET"]), gib(volume["emptyDir"]["sizeLimit"])
    assert budget < size < gib(container["resources"]["limits"]["memory"]), "the volume counts against the limit"

    (outliving,) = pod(other_volume())["volumes"]
    assert outliving == {"name": "shm", "hostPath": {"path": "/dev/shm", "type": "Directory"}}


def test_the_pod_sets_every_variable_that_the_recipe_needs_and_the_policy_is_for_its_prefix() -> None:
    needed = set(re.findall(r"\$\{(\w+)\}", RECIPE.read_text()))
    assert set(environment()) == needed
    assert environment()["TRAINING_JOB_NAME"] == yaml.safe_load(MANIFEST)["metadata"]["name"]
    place = environment()["CHECKPOINTS"].removeprefix("s3://")
    objects, listing = POLICY.statements
    assert objects["Resource"] == f"arn:aws:s3:::{place}/*"
    assert listing["Resource"] == f"arn:aws:s3:::{place.split('/')[0]}"
    assert pod()["serviceAccountName"]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of all S3 operations that boto3 sends from now on."""
    found = set[str]()
    connect = S3Connection._connect

    def watched(connection: S3Connection) -> S3Client:
        client = connect(connection)
        client.meta.events.register("before-call.s3", lambda model, **_: found.add(model.name))
        return client

    monkeypatch.setattr(S3Connection, "_connect", watched)
    return found


def test_the_policy_allows_what_the_tier_asks_for_and_nothing_else(
    names: set[str], s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An upload's window is watched from 128 MiB on: a smaller one shows the same requests.
    monkeypatch.setattr(s3_upload, "WINDOW_BYTES", 10 * MIB)
    monkeypatch.setattr(s3_window, "WINDOW_BYTES", 10 * MIB)
    assert s3_settings.endpoint_url is not None
    with FaultProxy(s3_settings.endpoint_url) as proxy:
        plain = replace(s3_settings, part_bytes=5 * MIB, endpoint_url=proxy.url)
        for settings in (plain, replace(plain, sse_kms_key_id="alias/checkpoints")):  # two ways to upload
            exercise(S3Tier(settings, "llama-run3"))
        on_the_wire = {Asked.of(request).operation for request in proxy.requests}
    # s3torchconnector's own requests are on the wire alone; they are of the same kinds.
    assert on_the_wire == names
    assert names | {"HeadBucket"} == set(ACTIONS), "HeadBucket asks AWS itself for the region that a recipe lacks"
    assert {ACTIONS[name] for name in ACTIONS} == POLICY.actions


def exercise(tier: S3Tier) -> None:
    """Do all that a tier can do."""
    body = bytes(24 * MIB)
    tier.probe()
    tier.put_part("a/part", lambda: iter([memoryview(body)]), len(body))
    with pytest.raises(TieredError, match="the source is gone"):
        tier.put_part("a/other", cut, len(body))
    tier.read_into("a/part", MIB, memoryview(bytearray(MIB)))
    tier.read_into("a/part", 0, memoryview(bytearray()))
    assert list(tier.list_dirs("")) == ["a"]
    tier.abort_stale_uploads(0.0)
    tier.delete(["a/part"])
    tier.close()


def cut() -> Iterator[memoryview]:
    """A source that fails in the middle."""
    yield memoryview(bytes(6 * MIB))
    raise TieredError("the source is gone")


def test_the_policy_of_another_accounts_bucket_allows_the_role_the_same() -> None:
    account = re.search(r"image: (\d{12})\.", MANIFEST)
    assert account is not None
    bucket = Policy(FOLDER / "bucket_policy.json", principal=f"arn:aws:iam::{account[1]}:role/training")
    for statement in bucket.statements:
        del statement["Principal"]
    assert bucket.statements == POLICY.statements


@pytest.mark.parametrize(
    ("operation", "resource"),
    [
        ("PutObject", "my-bucket/other/llama-run3/x"),
        ("GetObject", "my-bucket/checkpoints-of-another"),
        ("ListObjectsV2", "another-bucket"),
        ("DeleteObjects", "another-bucket"),
    ],
)
def test_the_policy_ends_at_its_prefix(operation: str, resource: str) -> None:
    assert not POLICY.allows(Asked(operation=operation, resource=f"arn:aws:s3:::{resource}", prefix=None))


@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(240)
def test_the_recipe_runs_in_such_a_pod_and_asks_s3_for_no_more_than_the_policy_allows(
    tmp_path: Path, memory_dir: Path, s3_client: S3Client, s3_endpoint: str, cluster: dict[str, str]
) -> None:
    given = environment()
    name = given["CHECKPOINTS"].removeprefix("s3://").split("/")[0]
    s3_client.create_bucket(Bucket=name)
    volume = memory_dir / "dev-shm"
    volume.mkdir()
    volume.chmod(0o1777)  # as Kubernetes mounts it
    with FaultProxy(s3_endpoint) as proxy:
        env = {**given, **cluster, "AWS_ENDPOINT_URL": proxy.url, "CHECKPOINT_MEMORY": str(volume / "sm_tiered-0")}
        with launched(tmp_path, "hyperpod/recipe.yaml", "--steps=12", env=env) as first:
            assert first.end() == [0, 0], first.text
        saved = s3_steps(s3_client, f"{given['CHECKPOINTS']}/{given['TRAINING_JOB_NAME']}")
        with launched(tmp_path, "hyperpod/recipe.yaml", "--steps=1000000", env=env) as second:
            second.reach(20)
            second.kill()
        requests = [Asked.of(request) for request in proxy.requests]
    assert first.text.endswith("ends at step 12\n")
    assert second.restored() == (12, "memory")
    assert saved == [12]
    assert {"PutObject", "ListObjectsV2", "GetObject"} <= {request.operation for request in requests}
    assert [request for request in requests if not POLICY.allows(request)] == []
    namespace = f"checkpoints/{given['TRAINING_JOB_NAME']}/"
    listings = [request.prefix for request in requests if ACTIONS[request.operation].startswith("s3:ListBucket")]
    assert [prefix for prefix in listings if not (prefix or "").startswith(namespace)] == []


@pytest.mark.long
@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(240)
def test_a_pod_that_is_lost_takes_its_memory_and_the_job_goes_on_from_s3(
    tmp_path: Path, memory_dir: Path, bucket: dict[str, str], s3_client: S3Client, cluster: dict[str, str]
) -> None:
    env = {**environment(), **cluster, **bucket}
    pods = [{"CHECKPOINT_MEMORY": str(memory_dir / f"pod-{number}")} for number in range(2)]
    with launched(tmp_path, "hyperpod/recipe.yaml", "--steps=12", env=env, ranks=pods) as first:
        assert first.end() == [0, 0], first.text
    assert s3_steps(s3_client, bucket["CHECKPOINTS"]) == [12]
    lose_memory(memory_dir / "pod-1", env["TRAINING_JOB_NAME"])
    with launched(tmp_path, "hyperpod/recipe.yaml", "--steps=14", env=env, ranks=pods) as second:
        assert second.end() == [0, 0], second.text
    assert second.restored() == (12, "memory+s3")
