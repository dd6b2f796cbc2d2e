"""One endpoint, one region and one credential chain for both clients; pages, batches, forks and credentials."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sm_tiered.errors import ConfigError, TierRefusedError
from sm_tiered.policies.keep import Latest
from sm_tiered.settings import LocalSettings, S3Settings, TierSettings
from sm_tiered.testing.contract import chunked, payload
from sm_tiered.tiers import abort_stale_uploads, open_tier, s3
from sm_tiered.tiers.s3 import S3Tier
from sm_tiered.tiers.s3_client import S3Connection, resolve_endpoint
from sm_tiered.tiers.wrappers import RetryingTier

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

MIB = 1024 * 1024


def test_the_recipe_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_endpoint(None) is None
    assert resolve_endpoint("") is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert resolve_endpoint(None) == "http://127.0.0.1:1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:2")
    assert resolve_endpoint(None) == "http://127.0.0.1:2"
    assert resolve_endpoint("http://127.0.0.1:3") == "http://127.0.0.1:3"
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert resolve_endpoint(None) is None


@pytest.mark.parametrize("endpoint", ["http://user:s3cr3t@host", "https://user@host/", "http://:s3cr3t@host"])
def test_an_endpoint_with_credentials_is_refused_without_repeating_them(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="user name or password") as caught:
        resolve_endpoint(endpoint)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://host", "http://", "s3://bucket"])
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint_url"):
        resolve_endpoint(endpoint)


@pytest.mark.parametrize("where", ["environment", "profile"])
def test_both_clients_find_an_endpoint_that_the_recipe_does_not_name(
    make_s3_settings: Callable[..., S3Settings],
    s3_endpoint: str,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    settings = make_s3_settings(endpoint_url=None, region=None)
    if where == "environment":
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    else:
        config = tmp_path / "config"
        config.write_text(f"[profile mine]\nendpoint_url = {s3_endpoint}\nregion = us-east-1\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        monkeypatch.setenv("AWS_PROFILE", "mine")
    tier, data = S3Tier(settings, "run-1"), payload(2 * MIB)
    tier.put("small", b"by boto3")
    tier.put_part("large", chunked(data), len(data))
    assert [(entry.key, entry.size) for entry in tier.list("")] == [("large", 2 * MIB), ("small", 8)]


def test_both_clients_use_the_profile_that_the_recipe_names(
    make_s3_settings: Callable[..., S3Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    credentials = tmp_path / "credentials"
    credentials.write_text("[mine]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    tier, data = S3Tier(make_s3_settings(profile="mine"), "run-1"), payload(2 * MIB)
    tier.put_part("large", chunked(data), len(data))
    assert tier.get("large").data == data


def test_no_credentials_is_a_refusal_that_names_the_chain(
    s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    tier = S3Tier(s3_settings, "run-1")
    for attempt in (lambda: tier.put("k", b"x"), lambda: tier.put_part("p", chunked(payload(2 * MIB)), 2 * MIB)):
        with pytest.raises(TierRefusedError, match="AWS_PROFILE"):
            attempt()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "now")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "there")
    tier.put("k", b"x")  # asked again after a refusal


def test_an_unknown_profile_is_a_refusal(make_s3_settings: Callable[..., S3Settings]) -> None:
    with pytest.raises(TierRefusedError, match="ProfileNotFound"):
        S3Tier(make_s3_settings(profile="nobody"), "run-1").list("")


def test_a_missing_bucket_is_a_refusal_that_says_what_to_do(make_s3_settings: Callable[..., S3Settings]) -> None:
    settings = make_s3_settings()
    tier = S3Tier(S3Settings(**{**_fields(settings), "bucket": "nobody-made-this"}), "run-1")
    for attempt in (tier.probe, lambda: tier.list(""), lambda: tier.put_part("p", chunked(payload(2 * MIB)), 2 * MIB)):
        with pytest.raises(TierRefusedError, match="Create the bucket"):
            attempt()


def _fields(settings: S3Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in S3Settings.__dataclass_fields__}


def test_listings_go_on_over_many_pages(s3_settings: S3Settings) -> None:
    tier = S3Tier(s3_settings, "run-1")
    names = [f"d{i}/k" for i in range(7)]
    for name in names:
        tier.put(name, b"x")
    events: Any = tier._connection.client().meta.events
    events.register("provide-client-params.s3.ListObjectsV2", lambda params, **_: {**params, "MaxKeys": 2})
    assert [entry.key for entry in tier.list("")] == names
    assert list(tier.list_dirs("")) == [f"d{i}" for i in range(7)]


def test_deletions_go_in_batches(s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = S3Tier(s3_settings, "run-1")
    for index in range(7):
        tier.put(f"k{index}", b"x")
    monkeypatch.setattr(s3, "_BATCH", 3)
    tier.delete(f"k{index}" for index in range(1, 7))
    assert [entry.key for entry in tier.list("")] == ["k0"]


def test_namespaces_in_one_prefix_do_not_see_each_other(s3_settings: S3Settings) -> None:
    one, ten = S3Tier(s3_settings, "run-1"), S3Tier(s3_settings, "run-10")
    one.put("k", b"1")
    ten.put("k", b"10")
    assert [entry.key for entry in one.list("")] == ["k"]
    one.delete(["k"])
    assert ten.get("k").data == b"10"


def test_markers_of_the_console_are_no_objects(s3_settings: S3Settings, s3_client: S3Client) -> None:
    for key in ("some/prefix/run-1/", "some/prefix/run-1/step/"):
        s3_client.put_object(Bucket=s3_settings.bucket, Key=key, Body=b"")
    assert S3Tier(s3_settings, "run-1").list("") == []


def test_a_forked_child_has_a_connection_of_its_own(s3_settings: S3Settings) -> None:
    tier = S3Tier(s3_settings, "run-1")
    tier.put("parent", b"x")
    parents = tier._connection.client()
    child = os.fork()
    if child == 0:
        try:
            tier.put("child", b"y")
            os._exit(0 if tier._connection.client() is not parents else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert [entry.key for entry in tier.list("")] == ["child", "parent"]


@pytest.mark.parametrize("namespace", ["", "../up", "a/b", ".hidden", "x" * 129])
def test_a_namespace_is_checked_before_it_builds_a_key(s3_settings: S3Settings, namespace: str) -> None:
    with pytest.raises(ConfigError):
        S3Tier(s3_settings, namespace)


def test_the_control_plane_loads_no_torch(s3_settings: S3Settings) -> None:
    code = f"""
import sys
from sm_tiered.policies.keep import Latest
from sm_tiered.settings import S3Settings
from sm_tiered.tiers import open_tier
assert "boto3" not in sys.modules and "botocore" not in sys.modules
settings = S3Settings(name="s3", save=None, keep=Latest(1), bucket={s3_settings.bucket!r}, prefix="",
                      endpoint_url={s3_settings.endpoint_url!r}, region="us-east-1", force_path_style=True)
tier = open_tier(settings, "run-1")
tier.probe()
tier.put_part("p", lambda: iter([memoryview(b"x" * 1000)]), 1000)
tier.read_into("p", 10, memoryview(bytearray(10)))
assert "torch" not in sys.modules and "s3torchconnector" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("reader", ["boto3", "crt"])
def test_a_large_read_over_many_ranges_is_whole(make_s3_settings: Callable[..., S3Settings], reader: str) -> None:
    from sm_tiered.tiers import s3_read

    tier, data = S3Tier(make_s3_settings(reader=reader), "run-1"), payload(9 * MIB + 5)
    tier.put_part("p", chunked(data), len(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3_read, "RANGE_BYTES", MIB)
        buffer = bytearray(len(data) - 3)
        tier.read_into("p", 3, memoryview(buffer))
    assert buffer == data[3:]
    tier.close()


def test_open_tier_gives_s3_its_retries_and_refuses_the_unknown(s3_settings: S3Settings, tmp_path: Path) -> None:
    tier = open_tier(s3_settings, "run-1")
    assert isinstance(tier, RetryingTier)
    assert isinstance(tier.inner, S3Tier)
    local = open_tier(LocalSettings(name="d", save=None, keep=Latest(1), path=str(tmp_path / "d")), "run-1")
    assert local.name == "d"
    assert abort_stale_uploads(local, 0.0) == 0
    with pytest.raises(ConfigError, match="TierSettings"):
        open_tier(TierSettings(name="x", save=None, keep=Latest(1)), "run-1")


def test_connections_are_used_again(s3_settings: S3Settings) -> None:
    tier = S3Tier(s3_settings, "run-1")
    tier.put_part("p", chunked(payload(100_000)), 100_000)
    before = len(os.listdir("/proc/self/fd"))
    for index in range(30):
        tier.read_into("p", index, memoryview(bytearray(5000)))
        tier.get("p")
        with pytest.raises(FileNotFoundError):
            tier.get("missing")
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    tier.close()
    assert isinstance(tier._connection, S3Connection)
    assert tier.get("p").data == payload(100_000)
