"""Which permission an S3 request needs, by the request's own name; and that name, of a request on the wire."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from sm_tiered.testing.proxy import Recorded

ACTIONS = {
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "CompleteMultipartUpload": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "DeleteObjects": "s3:DeleteObject",
    "GetObject": "s3:GetObject",
    "HeadBucket": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListObjectsV2": "s3:ListBucket",
    "ListParts": "s3:ListMultipartUploadParts",
    "PutObject": "s3:PutObject",
    "UploadPart": "s3:PutObject",
}
"""As AWS's service authorization reference has them. If-Match also needs s3:GetObject."""

_ON_BUCKETS = {
    "GET": (("uploads", "ListMultipartUploads"), ("list-type", "ListObjectsV2")),
    "HEAD": (("", "HeadBucket"),),
    "POST": (("delete", "DeleteObjects"),),
}
_ON_OBJECTS = {
    "GET": (("uploadId", "ListParts"), ("", "GetObject")),
    "HEAD": (("", "HeadObject"),),
    "PUT": (("partNumber", "UploadPart"), ("", "PutObject")),
    "POST": (("uploads", "CreateMultipartUpload"), ("uploadId", "CompleteMultipartUpload")),
    "DELETE": (("uploadId", "AbortMultipartUpload"),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one request wants."""

    operation: str
    resource: str
    """As an ARN: of the object, or of the bucket."""
    prefix: str | None
    """Of a listing."""

    @classmethod
    def of(cls, request: Recorded) -> Asked:
        """Read it from the wire; the bucket stands first in the path."""
        parts = urlsplit(request.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        known = (_ON_OBJECTS if key else _ON_BUCKETS).get(request.method, ())
        operation = next(name for parameter, name in known if not parameter or parameter in query)
        resource = f"arn:aws:s3:::{bucket}/{key}" if key else f"arn:aws:s3:::{bucket}"
        return cls(operation=operation, resource=resource, prefix=query.get("prefix", [None])[0])


class Policy:
    """A policy of plain Allow statements: of a role, or, with a *principal*, of a bucket."""

    def __init__(self, path: Path, *, principal: str | None = None) -> None:
        text = json.loads(path.read_text())
        assert text["Version"] == "2012-10-17"
        self.statements: list[dict[str, object]] = text["Statement"]
        facts = {"Sid", "Effect", "Action", "Resource"} | ({"Principal"} if principal else set())
        assert all(set(one) == facts for one in self.statements)
        assert all(one.get("Principal") == ({"AWS": principal} if principal else None) for one in self.statements)
        assert all(one["Effect"] == "Allow" for one in self.statements)

    @property
    def actions(self) -> set[str]:
        """All that it allows, somewhere."""
        return {action for one in self.statements for action in _several(one["Action"])}

    def allows(self, asked: Asked) -> bool:
        """Whether it allows what is *asked*; a batch of deletions is asked by its bucket and allowed by its objects."""
        action = ACTIONS[asked.operation]
        return any(
            action in _several(one["Action"]) and any(_fits(asked, resource) for resource in _several(one["Resource"]))
            for one in self.statements
        )


def _fits(asked: Asked, resource: str) -> bool:
    if asked.operation == "DeleteObjects":
        return resource.startswith(f"{asked.resource}/")
    return fnmatchcase(asked.resource, resource)


def _several(value: object) -> Iterable[str]:
    assert isinstance(value, (str, list))
    return [value] if isinstance(value, str) else value
