"""`sm-tiered doctor`: what it finds on real directories, a real S3 endpoint, and with what is broken there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner, Result

from sm_tiered import layout
from sm_tiered.cli.app import app
from sm_tiered.cli.findings import mount_of
from sm_tiered.locks import FileLock
from sm_tiered.policies.keep import Latest
from sm_tiered.settings import MemorySettings, S3Settings
from sm_tiered.testing.proxy import FaultProxy, Rule
from sm_tiered.tiers.memory import MemoryTier
from tests.unit.cli_checkpoints import NAMESPACE, checkpoint, memory_tier, write_checkpoint, write_recipe

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

S3_CHECKS = (
    "credentials",
    "ListBucket",
    "PutObject",
    "conditional PutObject",
    "GetObject",
    "CreateMultipartUpload",
    "ListMultipartUploads",
    "AbortMultipartUpload",
    "DeleteObjects",
    "clock",
)


def run(*arguments: object, columns: int = 80) -> Result:
    """Run ``doctor`` in this process."""
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)], env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def findings(recipe: Path, *, status: int = 0) -> dict[tuple[str, str], Any]:
    """What it finds, by area and check."""
    result = run(recipe, "--json")
    assert (result.exit_code, result.stderr) == (status, ""), result.output
    document = json.loads(result.stdout)
    assert document["ok"] is (status == 0)
    return {(finding["area"], finding["check"]): finding for finding in document["findings"]}


def levels(found: dict[tuple[str, str], Any], area: str) -> dict[str, str]:
    """The levels of one area, by check."""
    return {check: finding["level"] for (where, check), finding in found.items() if where == area}


@pytest.fixture
def s3_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe of an S3 tier, reached at another address maybe."""

    def make(settings: S3Settings, url: str | None = None) -> Path:
        more = (
            f"  s3: {{kind: s3, uri: 's3://{settings.bucket}/{settings.prefix}', region: us-east-1, "
            f"force_path_style: true, endpoint_url: '{url or settings.endpoint_url}'}}\n"
        )
        return write_recipe(tmp_path, more=more)

    return make


# ---- the machine


def test_without_a_recipe_it_looks_at_the_machine_and_versions() -> None:
    result = run("--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["namespace"], found["ok"]) == (0, None, True)
    named = {finding["check"]: finding["text"] for finding in found["findings"]}
    assert "free" in named["/dev/shm"]
    assert {"python", "torch", "boto3", "s3torchconnector"} <= named.keys()


def test_a_package_that_is_too_old_or_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from sm_tiered.cli import doctor_machine

    monkeypatch.setattr(
        metadata, "requires", lambda name: ["torch>=99", "no-such-thing>=1; python_version>'3'", "x; extra == 'test'"]
    )
    found = {finding.check: finding for finding in doctor_machine.version_findings()}
    assert found["torch"].level.value == found["no-such-thing"].level.value == "fail"
    assert "is not >=99" in found["torch"].text
    assert found["no-such-thing"].fix == "pip install 'no-such-thing>=1'"
    assert "x" not in found


def test_the_memory_tier_is_measured_by_what_stands_there(memory_dir: Path, tmp_path: Path) -> None:
    write_checkpoint(memory_tier(memory_dir), checkpoint(20), durable=False, size=65536)
    found = findings(write_recipe(tmp_path, memory=memory_dir))
    assert set(levels(found, "memory").values()) == {"ok"}
    assert "are needed (keep.latest + 2 = 4 ×" in found["memory", "room"]["text"]
    recipe = write_recipe(tmp_path, memory=memory_dir)
    recipe.write_text(recipe.read_text().replace("allow_disk", "budget: 100KiB, allow_disk"))
    found = findings(recipe, status=1)
    assert found["memory", "room"]["level"] == "fail"
    assert "Raise budget to" in found["memory", "room"]["fix"]


def test_a_small_tmpfs_and_its_huge_pages_are_told(make_tmpfs: Callable[[str, int], Path], tmp_path: Path) -> None:
    place = make_tmpfs("small", 4)
    write_checkpoint(memory_tier(place), checkpoint(20), durable=False, size=800_000)
    found = findings(write_recipe(tmp_path, memory=place), status=1)
    assert found["memory", "room"]["level"] == "fail"
    assert "--shm-size" in found["memory", "room"]["fix"]
    assert f"remount,huge=within_size {place}" in found["memory", "huge pages"]["fix"]


def test_a_memory_tier_that_is_no_private_tmpfs_fails(tmp_path: Path) -> None:
    mount = mount_of(tmp_path)
    if mount is None or mount.kind == "tmpfs":
        pytest.skip("the directory for tests is in memory")
    (tmp_path / "memory").mkdir(mode=0o755)
    os.chmod(tmp_path / "memory", 0o755)
    recipe = write_recipe(tmp_path, memory=tmp_path / "memory")
    found = findings(recipe, status=1)
    assert levels(found, "memory")["file system"] == "warn"
    assert found["memory", "owner and mode"]["level"] == "fail"
    assert "others can get in" in found["memory", "owner and mode"]["text"]
    recipe.write_text(recipe.read_text().replace("allow_disk: true, ", ""))
    found = findings(recipe, status=1)
    assert found["memory", "file system"]["level"] == "fail"
    assert "below /dev/shm" in found["memory", "file system"]["fix"]


def test_who_works_in_the_memory_tier_is_told(memory_dir: Path, tmp_path: Path) -> None:
    settings = MemorySettings(
        name="memory", save=None, keep=Latest(n=2), path=str(memory_dir), budget_bytes=None, allow_disk=True
    )
    recipe = write_recipe(tmp_path, memory=memory_dir)
    assert "no job of run-1" in findings(recipe)["memory", "job"]["text"]
    memory = MemoryTier(settings, NAMESPACE)
    with memory.trainer_lock("launch-1", 0), FileLock(memory.lock_path("drainer")) as drainer:
        assert drainer.acquire()
        found = findings(recipe)
        assert f"1 alive here (pid {os.getpid()})" in found["memory", "trainers"]["text"]
        assert f"alive (pid {os.getpid()})" in found["memory", "drainer"]["text"]
    entry = {
        "checkpoint": layout.checkpoint_dir(checkpoint(20)),
        **{"rank": 0, "tier": "local", "world": 1, "recipe": "0" * 32, "finisher": "", "deadline_at": 1.0},
    }
    name = f"promote-{layout.checkpoint_dir(checkpoint(20))}-00000-local.json"
    memory.put(f"{layout.QUEUE}/{name}", json.dumps(entry).encode())
    before = sorted(memory_dir.rglob("*"))
    found = findings(recipe)
    assert sorted(memory_dir.rglob("*")) == before
    assert levels(found, "memory")["trainers"] == levels(found, "memory")["drainer"] == "warn"
    assert "1 ended without letting go" in found["memory", "trainers"]["text"]
    assert "sm-tiered drain" in found["memory", "drainer"]["fix"]
    assert "past commit_deadline_secs" in found["memory", "queue"]["text"]


# ---- a directory


def test_a_directory_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, local=tmp_path / "deep" / "local")
    found = findings(recipe)
    del found["local", "file system"]
    found.pop(("local", "durable"), None)  # where the directory for tests is in memory
    assert levels(found, "local") == dict.fromkeys(("room", "writing", "exclusive writes", "deleting"), "ok")
    assert sorted(os.listdir(tmp_path)) == ["recipe.yaml"]
    (tmp_path / "deep" / "local" / NAMESPACE).mkdir(parents=True, mode=0o700)
    findings(recipe)
    assert set(os.listdir(tmp_path / "deep" / "local" / NAMESPACE)) <= {".replace"}


def test_a_directory_that_cannot_be_used_fails(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / NAMESPACE).symlink_to(tmp_path / "elsewhere")
    found = findings(write_recipe(tmp_path, local=tmp_path / "local"), status=1)
    assert found["local", "writing"]["level"] == "fail"
    assert ("local", "exclusive writes") not in found
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_durable_tier_in_memory_is_warned_of(memory_dir: Path, tmp_path: Path) -> None:
    if (mount := mount_of(memory_dir)) is None or mount.kind != "tmpfs":
        pytest.skip("there is no tmpfs")
    assert findings(write_recipe(tmp_path, local=memory_dir / "local"))["local", "durable"]["level"] == "warn"


def test_a_mount_is_the_deepest_and_the_last(tmp_path: Path) -> None:
    table = tmp_path / "mounts"
    lines = [f"a {tmp_path} ext4 rw 0 0", "b / btrfs ro 0 0", f"c {tmp_path}/sub\\040dir tmpfs rw,huge=always 0 0"]
    table.write_text("\n".join([*lines, f"d {tmp_path} nfs4 rw 0 0", "broken"]) + "\n")
    (tmp_path / "sub dir").mkdir()
    found = [mount_of(path, table=str(table)) for path in (tmp_path / "sub dir" / "x", tmp_path / "new", Path("/"))]
    assert [mount.kind for mount in found if mount is not None] == ["tmpfs", "nfs4", "btrfs"]
    assert found[0] is not None
    assert found[0].option("huge") == "always"


# ---- S3


def test_each_permission_is_tried_on_s3_and_nothing_is_left(
    s3_settings: S3Settings, s3_client: S3Client, s3_recipe: Callable[..., Path]
) -> None:
    found = findings(s3_recipe(s3_settings))
    assert levels(found, "s3") == dict.fromkeys(S3_CHECKS, "ok")
    assert found["s3", "credentials"]["text"] == "from env"
    assert s3_client.list_objects_v2(Bucket=s3_settings.bucket)["KeyCount"] == 0
    assert "Uploads" not in s3_client.list_multipart_uploads(Bucket=s3_settings.bucket)


@pytest.mark.parametrize(
    ("check", "match", "also"),
    [
        ("ListBucket", ("GET ", "list-type=2"), {}),
        ("PutObject", ("PUT ",), {"conditional PutObject": "warn", "GetObject": "warn", "DeleteObjects": "warn"}),
        ("GetObject", ("GET ", "/.doctor-"), {}),
        ("CreateMultipartUpload", ("POST ", "?uploads"), {}),
        ("ListMultipartUploads", ("GET ", "?uploads"), {}),
        ("AbortMultipartUpload", ("DELETE ", "uploadId"), {}),
        ("DeleteObjects", ("POST ", "?delete"), {}),
    ],
)
def test_a_permission_that_is_missing_is_named(
    s3_settings: S3Settings, s3_recipe: Callable[..., Path], check: str, match: tuple[str, ...], also: dict[str, str]
) -> None:
    rule = Rule(kind="status", match=match, status=403, code="AccessDenied")
    with FaultProxy(str(s3_settings.endpoint_url), rules=[rule]) as proxy:
        found = findings(s3_recipe(s3_settings, proxy.url), status=1)
    bad = {check: level for check, level in levels(found, "s3").items() if level != "ok"}
    assert bad == {check: "fail", **also}
    assert "AccessDenied" in found["s3", check]["text"]
    assert "Allow s3:" in found["s3", check]["fix"]


@pytest.mark.parametrize(("header", "word"), [("if-none-match", "If-None-Match"), ("if-match", "If-Match")])
def test_a_store_that_ignores_conditions_fails(
    s3_settings: S3Settings, s3_recipe: Callable[..., Path], header: str, word: str
) -> None:
    rule = Rule(kind="strip", match=(header,), headers=((header, ""),))
    with FaultProxy(str(s3_settings.endpoint_url), rules=[rule]) as proxy:
        found = findings(s3_recipe(s3_settings, proxy.url), status=1)
    assert found["s3", "conditional PutObject"]["level"] == "fail"
    assert f"ignores {word}" in found["s3", "conditional PutObject"]["text"]


def test_uploads_that_never_ended_are_told(
    s3_settings: S3Settings, s3_client: S3Client, s3_recipe: Callable[..., Path]
) -> None:
    # moto says of every upload that it began in 2010.
    key = f"{s3_settings.prefix}/{NAMESPACE}/step_0/__0_0.distcp"
    s3_client.create_multipart_upload(Bucket=s3_settings.bucket, Key=key)
    found = findings(s3_recipe(s3_settings))
    assert found["s3", "unfinished uploads"]["level"] == "warn"
    assert found["s3", "unfinished uploads"]["text"] == "1 older than a day"


def test_no_credentials_tells_the_chain_that_was_tried(
    s3_settings: S3Settings, s3_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    found = findings(s3_recipe(s3_settings), status=1)
    assert levels(found, "s3") == {"credentials": "fail"}
    for provider in ("env", "shared-credentials-file", "container-role", "iam-role"):
        assert provider in found["s3", "credentials"]["text"]


def test_an_s3_that_is_not_there_is_told_once_and_without_secrets(
    s3_settings: S3Settings, s3_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sentinel-secret-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "sentinel-session-token")
    result = run(s3_recipe(replace(s3_settings, bucket="no-such-bucket")))
    assert result.exit_code == 1
    assert "Create the bucket" in " ".join(result.stdout.split())
    found = findings(s3_recipe(s3_settings, "http://127.0.0.1:9"), status=1)
    assert levels(found, "s3") == {"credentials": "ok", "ListBucket": "fail", "everything else": "warn"}
    assert "sentinel" not in result.output + json.dumps(list(found.values()))


@pytest.mark.parametrize(("secs", "level"), [(60, "warn"), (900, "fail")])
def test_a_clock_that_is_wrong_is_told(
    s3_settings: S3Settings, s3_recipe: Callable[..., Path], secs: int, level: str
) -> None:
    import time

    empty = "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    date = (("Date", formatdate(time.time() - secs, usegmt=True)),)
    rule = Rule(kind="status", match=("GET ", "list-type=2"), status=200, headers=date, text=empty)
    with FaultProxy(str(s3_settings.endpoint_url), rules=[rule]) as proxy:
        found = findings(s3_recipe(s3_settings, proxy.url), status=int(level == "fail"))
    assert found["s3", "clock"]["level"] == level
    assert "ahead of S3's" in found["s3", "clock"]["text"]


# ---- the text


@pytest.mark.parametrize("columns", [80, 120])
def test_the_text_fits_its_window_and_says_what_to_change(
    s3_settings: S3Settings, memory_dir: Path, tmp_path: Path, columns: int
) -> None:
    more = (
        f"  s3: {{kind: s3, uri: 's3://{s3_settings.bucket}/{s3_settings.prefix}', region: us-east-1, "
        f"force_path_style: true, endpoint_url: '{s3_settings.endpoint_url}'}}\n"
    )
    recipe = write_recipe(tmp_path, memory=memory_dir, local=tmp_path / "local", more=more)
    recipe.write_text(recipe.read_text().replace("allow_disk", "budget: 1B, allow_disk"))
    write_checkpoint(memory_tier(memory_dir), checkpoint(20), durable=False)
    result = run(recipe, columns=columns)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)
    assert [line for line in lines if line in ("memory", "local", "s3", "versions")] == [
        "memory",
        "local",
        "s3",
        "versions",
    ]
    assert any(line.startswith("fail  room") for line in lines)
    assert "→ Raise budget to" in result.stdout
    assert "1 of" in lines[-1]
    assert "checks failed" in lines[-1]
