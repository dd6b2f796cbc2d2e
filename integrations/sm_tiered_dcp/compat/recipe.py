"""The recipe that a config stands for."""

from __future__ import annotations

import os
from typing import Any

from sm_tiered.recipe import Recipe
from sm_tiered_dcp.compat.config import SageMakerCheckpointConfig

__all__ = ["CLUSTER", "MEMORY", "S3", "recipe_of"]

MEMORY, CLUSTER, S3 = "memory", "cluster", "s3"
"""Names of the tiers, fast to durable."""


def recipe_of(config: SageMakerCheckpointConfig, service: str | None) -> Recipe:
    """Return the recipe of *config*, with a tier at the address *service* where there is one.

    What it does not say is set as in any recipe: ``SM_TIERED__TIERS__S3__KEEP='{latest: 5}'``.

    Raises:
        RecipeError: it can't be used, or the environment sets what can't be.
    """
    # No tier has a policy: each save names those that it goes to.
    tiers: dict[str, Any] = {MEMORY: {"kind": "memory", "path": "${CHECKPOINT_MEMORY:-}"}}
    if service is not None:
        tiers[CLUSTER] = {"kind": "hyperpod", "url": service}
    if config.s3_base:
        # All is kept: the predecessor deletes nothing from S3, and its users count on that.
        tiers[S3] = {"kind": "s3", "uri": config.s3_base, "keep": {"every_n_steps": 1}, **_store()}
    values = {"version": 1, "namespace": config.namespace, "tiers": tiers}
    return Recipe.parse(values, source="SageMakerCheckpointConfig")


def _store() -> dict[str, Any]:
    """What AWS's own variables say of an S3-compatible store: the drainer may be of a launch that had others."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    ignored = os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true"
    if ignored or not endpoint:
        return {}
    return {"endpoint_url": endpoint, "allow_http": True, "force_path_style": True}
