"""The two clients of an S3 tier, resolved alike: boto3 for control and reads, s3torchconnector for part bodies."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from botocore.exceptions import IncompleteReadError
from botocore.loaders import Loader, create_loader

from sm_tiered import deadline
from sm_tiered.errors import ConfigError, TierError, TierRefusedError
from sm_tiered.tiers.s3_errors import FAILURES, translate

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from s3torchconnector._s3client import S3Client as CrtClient

    from sm_tiered.settings import S3Settings

__all__ = ["S3Connection"]

_T = TypeVar("_T")
_CONNECTIONS = 16
_CRT_ATTEMPTS = 4
"""CRT repeats single part uploads itself; the whole part is repeated by `RetryingTier`."""


def resolve_endpoint(configured: str | None) -> str | None:
    """Return the endpoint for both clients: the recipe's, else the one that AWS's own variables name.

    Raises:
        ConfigError: it is no http(s) address, or holds a user name or password.
    """
    ignored = os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true"
    named = None if ignored else os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    endpoint = configured or named or None
    if endpoint is None:
        return None
    parts = urlsplit(endpoint)
    if parts.username is not None or parts.password is not None:
        hint = "Credentials come from AWS's own chain only."
        raise ConfigError("endpoint_url holds a user name or password", hint=hint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        hint = "Use e.g. http://127.0.0.1:9000."
        raise ConfigError(f"endpoint_url {endpoint!r} is no http:// or https:// address", hint=hint)
    return endpoint


@functools.cache
def _models() -> Loader:
    """Return the API descriptions that all sessions of this process share."""
    return create_loader(os.environ.get("AWS_DATA_PATH"))


def _refuse_cut_answer(response_dict: Mapping[str, Any] | None = None, **_: object) -> None:
    """Raise when an answer is shorter than announced: botocore reads an empty one as a bucket without objects."""
    if response_dict is None or response_dict["context"]["operation_name"].startswith("Head"):
        return
    body, announced = response_dict["body"], response_dict["headers"].get("content-length")
    if isinstance(body, bytes) and announced is not None and len(body) != int(announced):
        raise IncompleteReadError(actual_bytes=len(body), expected_bytes=int(announced))


class S3Connection:
    """Clients of one bucket, below the key *root*.

    They are made when first needed, and anew after a fork, a refusal or `close`.
    """

    def __init__(self, settings: S3Settings, root: str) -> None:
        self.settings = settings
        self.root = root
        self.bucket = settings.bucket
        self.endpoint_url = resolve_endpoint(settings.endpoint_url)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._client: S3Client | None = None
        self._crt: dict[int, CrtClient] = {}
        self._region = "us-east-1"
        self._crt_endpoint: str | None = None

    def sse(self) -> dict[str, Any]:
        """Return the arguments that every request which creates an object carries."""
        key = self.settings.sse_kms_key_id
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {}

    def whole(self, key: str) -> str:
        """Return the whole key that the tier's *key* stands for."""
        return self.root + key

    def call(self, doing: str, key: str, send: Callable[[S3Client], _T], *, size: int = 0) -> _T:
        """Return what *send* returns, within the deadline; *size* is how many bytes it moves.

        Raises:
            TierError: as `s3_errors.translate` decides.
        """
        limit = deadline.remaining(self.settings.retry_deadline_secs + deadline.allowance(size))
        try:
            return deadline.run(lambda: send(self.client()), limit)
        except TierError:
            raise
        except FAILURES as error:
            failure = translate(error, doing=doing, where=self.where(key), tier=self.settings.name, key=key or None)
            if isinstance(failure, TierRefusedError):
                self.close()  # the next call asks the credential chain again: a person may have renewed them
            raise failure from error

    def where(self, key: str) -> str:
        """Return the ``s3://`` address of the tier's *key*, for messages."""
        return f"s3://{self.bucket}/{self.root}{key}"

    def client(self) -> S3Client:
        """Return the boto3 client."""
        with self._lock:
            self._forget_parent()
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> S3Client:
        import boto3
        import botocore.session
        from botocore.config import Config

        settings = self.settings
        core = botocore.session.get_session()
        core.register_component("data_loader", _models())  # else every session parses megabytes of JSON anew
        session: Any = boto3.Session(botocore_session=core, profile_name=settings.profile)
        config = Config(
            connect_timeout=min(10.0, settings.request_timeout_secs),
            read_timeout=settings.request_timeout_secs,
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=_CONNECTIONS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if settings.force_path_style else "auto"},
        )

        def make(region: str) -> S3Client:
            client = session.client("s3", endpoint_url=self.endpoint_url, region_name=region, config=config)
            client.meta.events.register("response-received.s3", _refuse_cut_answer)
            return client

        region: str | None = settings.region or session.region_name
        client = make(region or "us-east-1")
        if region is None and self.endpoint_url is None:
            found = client.head_bucket(Bucket=self.bucket).get("BucketRegion")
            region, client = (found, make(found)) if found and found != "us-east-1" else (found, client)
        self._region = region or "us-east-1"
        # boto3 also finds an endpoint in a profile, and knows those of other partitions; CRT is told.
        known = (urlsplit(client.meta.endpoint_url).hostname or "").endswith(".amazonaws.com")
        self._crt_endpoint = self.endpoint_url if known else client.meta.endpoint_url
        return client

    def crt(self, part_bytes: int) -> CrtClient:
        """Return the CRT client whose requests are *part_bytes* long. Imports torch."""
        from s3torchconnector._s3client import S3Client as CrtClient
        from s3torchconnector._s3client import S3ClientConfig

        self.client()  # resolves the region
        with self._lock:
            if part_bytes not in self._crt:
                settings = self.settings
                config = S3ClientConfig(
                    throughput_target_gbps=settings.throughput_gbps,
                    part_size=part_bytes,
                    force_path_style=settings.force_path_style,
                    max_attempts=_CRT_ATTEMPTS,
                    profile=settings.profile,
                )
                self._crt[part_bytes] = CrtClient(self._region, endpoint=self._crt_endpoint, s3client_config=config)
            return self._crt[part_bytes]

    def _forget_parent(self) -> None:
        """Sockets are not shared with the process that this one was forked from."""
        if self._pid != os.getpid():
            self._pid, self._client, self._crt = os.getpid(), None, {}

    def close(self) -> None:
        """Free both clients; the next call makes new ones."""
        with self._lock:
            client, self._client, self._crt = self._client, None, {}
        if client is not None and self._pid == os.getpid():
            cast(Any, client).close()
