"""Errors travel between ranks and processes as JSON and arrive as what they were."""

from __future__ import annotations

import json

import pytest

from sm_tiered import errors
from sm_tiered.errors import NamespaceInUseError, TieredError, error_from_json, error_to_json

KINDS = [
    kind for name in errors.__all__ if isinstance(kind := getattr(errors, name), type) and issubclass(kind, TieredError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_arrives_as_what_it_was(kind: type[TieredError]) -> None:
    sent = kind("no room", hint="make some")
    sent.step, sent.tier, sent.rank, sent.key = 7, "s3", 3, "a/b"
    arrived = error_from_json(json.loads(json.dumps(error_to_json(sent))))
    assert type(arrived) is kind
    assert str(arrived) == str(sent)
    assert arrived.facts() == sent.facts()


def test_the_pids_of_those_who_use_a_namespace_travel_too() -> None:
    arrived = error_from_json(json.loads(json.dumps(error_to_json(NamespaceInUseError("in use", pids=(1, 2))))))
    assert isinstance(arrived, NamespaceInUseError)
    assert arrived.pids == (1, 2)


def test_an_error_of_a_newer_release_arrives_as_the_root() -> None:
    assert type(error_from_json({"kind": "QuotaError", "message": "full"})) is TieredError
    assert type(error_from_json({"kind": "Mapping", "message": "full"})) is TieredError
