"""What somebody who imports should know beside what came of each step, a sentence each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing

from sm_tiered.cli.common import open_for_looking
from sm_tiered.cli.import_tables import Found
from sm_tiered.errors import CorruptPartError, FormatError, TieredError
from sm_tiered.inventory import list_attempts, list_checkpoints, read_manifest
from sm_tiered.policies.context import CommittedCheckpoint
from sm_tiered.policies.keep import ask_keep
from sm_tiered.records import Attempt, CheckpointId, Manifest
from sm_tiered.settings import Settings, TierSettings
from sm_tiered.tiers.base import Tier

__all__ = ["given_up", "order", "pickled"]


def pickled(found: Found) -> list[str]:
    """Say which values of *found* can't be restored without leave."""
    if not found.pickled:
        return []
    names = ", ".join(found.pickled[:8]) + (", …" if len(found.pickled) > 8 else "")
    return [f"step {found.checkpoint.step}: {names}: only a pickle can load it; restore with `allow_pickle: true`"]


def order(settings: Settings, step: int) -> list[str]:
    """Say how a restore gets at *step*, which was imported, where some tier has saves of our own."""
    attempts: set[Attempt] = set()
    steps: set[int] = set()
    silent: list[str] = []
    for tier in settings.tiers:
        try:
            with closing(open_for_looking(tier, settings.namespace)) as looked:
                own = [c for c in list_checkpoints(looked) if not c.attempt.is_imported]
                attempts.update(a for a in list_attempts(looked) if not a.is_imported)
        except TieredError as error:
            silent.append(f"{tier.name} did not answer: whether it has saves of its own is not known ({error.message})")
            continue
        attempts.update(checkpoint.attempt for checkpoint in own)
        steps.update(checkpoint.step for checkpoint in own)
    if not attempts:
        return silent
    how = (
        f"It has a step {step} too, which is taken even by that number: to go on from here, import into another "
        "namespace, --set namespace=NAME"
        if step in steps
        else f"To go on from here, restore step {step} by its number"
    )
    name = settings.namespace
    return [
        *silent,
        f"{name} has saves of its own, of attempts up to a{max(attempts).ordinal}: a restore takes those first. {how}",
    ]


def given_up(receiver: Tier, target: TierSettings, checkpoints: Collection[CheckpointId]) -> list[str]:
    """Say which of *checkpoints*, which are on *receiver*, the keep policy of *target* does not want."""
    committed = {c: manifest for c in list_checkpoints(receiver) if (manifest := _committed(receiver, c)) is not None}
    ordered = sorted(committed)
    facts = [
        CommittedCheckpoint(checkpoint=c, saved_at=committed[c].saved_at, metrics=committed[c].metrics) for c in ordered
    ]
    wanted = zip(ordered, ask_keep(target.keep, facts), strict=True)
    lost: Sequence[str] = [str(c.step) for c, keeps in wanted if c in checkpoints and not keeps]
    if not lost:
        return []
    which = f"step {lost[0]}" if len(lost) == 1 else f"steps {', '.join(lost)}"
    return [f"the keep policy of {target.name} gives {which} up at the next save there; --pin keeps them"]


def _committed(tier: Tier, checkpoint: CheckpointId) -> Manifest | None:
    try:
        manifest = read_manifest(tier, checkpoint)
    except (FormatError, CorruptPartError):  # retention does not judge it either
        return None
    return None if manifest is None or manifest.tombstone else manifest
