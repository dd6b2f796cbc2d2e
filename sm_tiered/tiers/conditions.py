"""Whether a tier keeps its word on conditional writes: without them two jobs, or a commit and a deletion, would mix."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from secrets import token_bytes

from sm_tiered.errors import KeyExistsError, TierRefusedError
from sm_tiered.tiers.base import Tier

__all__ = ["check_conditions"]

_NO_VERSION = '"0123456789abcdef0123456789abcdef"'


def check_conditions(tier: Tier, key: str) -> None:
    """See that *tier* refuses to write over *key* on a condition that does not hold. The key stays.

    Raises:
        TierRefusedError: it ignores conditions.
    """
    # New bytes each time: a retry that finds what an earlier try wrote takes it for its own success.
    with suppress(KeyExistsError):
        tier.put_if_absent(key, token_bytes(16))
    attempts: tuple[tuple[str, Callable[[], None]], ...] = (
        ("If-None-Match", lambda: tier.put_if_absent(key, token_bytes(16))),
        ("If-Match", lambda: tier.replace(key, token_bytes(16), version=_NO_VERSION)),
    )
    for condition, attempt in attempts:
        try:
            attempt()
        except KeyExistsError:
            continue
        raise TierRefusedError(
            f"the store ignores {condition}: it wrote over {key}",
            hint="Two jobs could not be kept apart there. Use a store with conditional writes, e.g. Amazon S3.",
            tier=tier.name,
            key=key,
        )
