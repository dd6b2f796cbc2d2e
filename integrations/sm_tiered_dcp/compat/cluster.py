"""Whether there is a cluster's in-memory service to save to: rank 0 looks once, all ranks do as it found."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed

from sm_tiered.errors import ConfigError, RankFailedError
from sm_tiered.recipe_fields import check_service
from sm_tiered.settings import HYPERPOD_URL

__all__ = ["URL_VARIABLE", "agree_on_service", "find_service"]

URL_VARIABLE = "SM_TIERED_HYPERPOD_URL"
"""The service's address, where it is not the usual one; empty: there is none."""

_POD = "KUBERNETES_SERVICE_HOST"
"""What Kubernetes sets in every pod: elsewhere the usual address means nothing."""

_PATIENCE_SECS = 5.0
"""How long a name that is not known is asked for again."""
_POLL_SECS = 1.0
_openings = itertools.count()
"""All ranks open in the same order, so their numbers agree."""

dist: Any = torch.distributed  # its functions are only partly typed
_logger = logging.getLogger("sm_tiered_dcp")


def agree_on_service(timeout_secs: float) -> str | None:
    """Return the service's address, or None without one. Collective where torch.distributed is initialised.

    Raises:
        ConfigError: rank 0's environment names an address that can't be used.
        RankFailedError: rank 0 has not told for *timeout_secs*.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return find_service(os.environ)
    # Through the job's own store, which torch hands out only under a private name: a group for one line is dear.
    store = dist.PrefixStore("sm_tiered/service", dist.distributed_c10d._get_default_store())
    key = str(next(_openings))
    if dist.get_rank() == 0:
        store.set(key, json.dumps(_looked()))
    try:
        store.wait([key], timedelta(seconds=timeout_secs))
        found, failure = json.loads(store.get(key))
    except RuntimeError as error:
        raise RankFailedError(f"rank 0 has not told where to save: {str(error)[:300]}", rank=0) from error
    if failure is not None:
        raise ConfigError(failure)
    return found


def _looked() -> tuple[str | None, str | None]:
    """The address, and why it can't be told: a rank 0 that left alone would let the others wait."""
    try:
        return find_service(os.environ), None
    except ConfigError as error:
        return None, str(error)


def find_service(environment: Mapping[str, str]) -> str | None:
    """Return the service's address, by name alone: one that only does not answer now may hold checkpoints.

    Raises:
        ConfigError: *environment* names an address that can't be used.
    """
    named = environment.get(URL_VARIABLE)
    if named is not None:
        try:
            return check_service(named) if named.strip() else None
        except ConfigError as error:
            raise ConfigError(f"{URL_VARIABLE}: {error.message}", hint=error.hint) from None
    if _POD not in environment:
        return None
    host = urlsplit(HYPERPOD_URL).hostname
    if host is not None and not _is_named(host):
        _logger.warning(
            "the cluster's in-memory service is not enabled: there is no %s. Checkpoints go to this node's memory "
            "and to S3 alone, and what the service may hold is not looked for; enable it with TieredStorageConfig "
            "{Mode: Enable} of the HyperPod cluster, or set %s: '' to have this line no more, its address where this "
            "name is only late",
            host,
            URL_VARIABLE,
        )
        return None
    return HYPERPOD_URL


def _is_named(host: str) -> bool:
    """Whether there is such a name; only no for an answer, some seconds long, means that there is none.

    The name goes while none of the service's pods is ready, and they may start together with this one.
    """
    end = time.monotonic() + _PATIENCE_SECS
    while True:
        try:
            socket.getaddrinfo(host, None)
        except socket.gaierror as error:
            if error.errno != socket.EAI_NONAME:
                return True
        else:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_SECS)
