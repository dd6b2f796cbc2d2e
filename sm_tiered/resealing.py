"""What of a checkpoint names its namespace, sealed anew for another one: records, the attempt's record, the index.

All else, the parts first of all, is the same bytes in every namespace.
"""

from __future__ import annotations

import json
from dataclasses import replace

from sm_tiered.errors import FormatError
from sm_tiered.manifest import (
    attempt_record_from_json,
    attempt_record_to_json,
    record_from_json,
    record_to_json,
)
from sm_tiered.sealed_json import dump, mapping

__all__ = ["reseal_attempt", "reseal_index", "reseal_record"]


def reseal_record(data: bytes, namespace: str) -> bytes:
    """Return the record file *data* as one of *namespace*; the same bytes when it is one already.

    Raises:
        FormatError: it is no record.
    """
    record = record_from_json(data)
    return data if record.namespace == namespace else record_to_json(replace(record, namespace=namespace))


def reseal_attempt(data: bytes, namespace: str) -> bytes:
    """Return the attempt record *data* as one of *namespace*; the same bytes when it is one already.

    Raises:
        FormatError: it is no attempt record.
    """
    record = attempt_record_from_json(data)
    return data if record.namespace == namespace else attempt_record_to_json(replace(record, namespace=namespace))


def reseal_index(data: bytes, namespace: str) -> bytes:
    """Return the `index.json` *data* as one of *namespace*; the same bytes when it is one already or names none.

    Raises:
        FormatError: it is no JSON object.
    """
    try:
        fields = mapping(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the index is no JSON: {str(error)[:120]}") from error
    if fields.get("namespace") in (None, namespace):
        return data
    return dump({**fields, "namespace": namespace}).encode()
