"""Whether there is a cluster's in-memory service to save to: rank 0 looks once, all ranks do as it found."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from sm_tiered.errors import ConfigError
from sm_tiered.recipe_fields import check_service
from sm_tiered.settings import HYPERPOD_URL
from sm_tiered_dcp.group import open_group

__all__ = ["URL_VARIABLE", "agree_on_service", "find_service"]

URL_VARIABLE = "SM_TIERED_HYPERPOD_URL"
"""The service's address, where it is not the usual one; empty: there is none."""

_POD = "KUBERNETES_SERVICE_HOST"
"""What Kubernetes sets in every pod: elsewhere the usual address means nothing."""

_logger = logging.getLogger("sm_tiered_dcp")


def agree_on_service(timeout_secs: float) -> str | None:
    """Return the service's address, or None without one. Collective where torch.distributed is initialised.

    Raises:
        ConfigError: rank 0's environment names an address that can't be used.
    """
    group = open_group(timeout_secs)
    try:
        found: str | None = None
        failure: str | None = None
        if group.rank == 0:
            try:
                found = find_service(os.environ)
            except ConfigError as error:
                failure = str(error)
        found, failure = group.gather((found, failure))[0]
    finally:
        group.close()
    if failure is not None:
        raise ConfigError(failure)
    return found


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
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            _logger.warning(
                "the cluster's in-memory service is not enabled: there is no %s. Checkpoints go to this node's memory "
                "and to S3 alone; enable it with TieredStorageConfig {Mode: Enable} of the HyperPod cluster, or set "
                "%s='' to have this line no more",
                host,
                URL_VARIABLE,
            )
            return None
    return HYPERPOD_URL
