"""Taking over on the fly: where a job's own tiers hold nothing, the newest checkpoint that the predecessor left."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing

from sm_tiered import deadline
from sm_tiered.errors import DeadlineExceededError, NothingRestorableError, TieredError, TierUnavailableError
from sm_tiered.log_lines import printable
from sm_tiered.recipe import Recipe
from sm_tiered.settings import HyperPodSettings, S3Settings, Settings, TierSettings
from sm_tiered.tiers import open_tier
from sm_tiered_dcp.predecessor.importing import OLDER, import_step
from sm_tiered_dcp.predecessor.looking import Imported
from sm_tiered_dcp.predecessor.origins import open_daemon, open_s3
from sm_tiered_dcp.predecessor.sources import Listed, Source

__all__ = ["adopt", "too_late"]

_logger = logging.getLogger("sm_tiered")


def adopt(recipe: Recipe, *, step: int | None = None) -> bool:
    """Commit the newest complete checkpoint of the predecessor, or *step*, to a durable tier of *recipe*, verified.

    Looked for in the recipe's own namespace, below each S3 tier and in the cluster's service. What may be of two saves
    (`doubt_about`) is passed over, unless *step* is that one. Not collective: one process does it. Returns False where
    the predecessor never ended a save there.

    A training waits for it, however slowly a place answers: all of it together, listing, import and reading back, ends
    with the recipe's ``commit_deadline_secs``, for it is one more durable save. The next try goes on with what is
    there.

    Raises:
        DeadlineExceededError: it took longer than that.
        TierUnavailableError: a place did not answer, so what is newest can't be told.
        NothingRestorableError: there are checkpoints, and none can be used; says why.
        MismatchError: a value can only be loaded by a pickle, and the recipe doesn't allow that.
        TieredError: it could not be committed.
    """
    settings = recipe.settings()
    with deadline.within(settings.commit_deadline_secs):
        try:
            return _adopt(settings, step)
        except TierUnavailableError as error:
            if deadline.remaining(1.0) > 0:
                raise
            raise too_late(settings, error.message, step=error.step or step) from error


def too_late(settings: Settings, why: str, *, step: int | None) -> DeadlineExceededError:
    """Return the error that tells that what the predecessor left could not be taken over in time."""
    return DeadlineExceededError(
        f"taking over what amzn-sagemaker-checkpointing left took longer than commit_deadline_secs, "
        f"{settings.commit_deadline_secs:g} s: {why}",
        hint="Start the job again, which goes on with what was written; allow longer, "
        "SM_TIERED__COMMIT_DEADLINE_SECS=7200; or take it over beforehand, `sm-tiered import`.",
        step=step,
    )


def _adopt(settings: Settings, step: int | None) -> bool:
    with ExitStack() as stack:
        sources = [stack.enter_context(closing(source)) for source in _sources(settings)]
        found, silent = _listed(sources)
        chosen = [(source, listed) for source, listed in found if step is None or listed.step == step]
        _check_told(settings, silent, nothing=not any(listed.finished for _, listed in chosen))
        target = _target(settings) if chosen else None
        if target is None:
            return False
        refused: list[TieredError] = []
        for source, listed in chosen:
            if _taken(source, listed, settings, target, refused, asked=step is not None):
                return True
        if not any(listed.finished for _, listed in chosen):
            return False
        reasons = "; ".join(error.message for error in refused[:5])
        raise NothingRestorableError(
            f"no checkpoint of amzn-sagemaker-checkpointing can be used: {reasons}",
            hint="`sm-tiered import --all --dry-run` tells of each of them. To start from scratch all the same, take a "
            "new namespace.",
            step=step,
        )


def _sources(settings: Settings) -> Iterator[Source]:
    for tier in settings.durable:
        if isinstance(tier, S3Settings):
            yield open_s3(tier, tier.bucket, tier.prefix, settings.namespace)
        elif isinstance(tier, HyperPodSettings):
            yield open_daemon(tier, settings.namespace)


def _listed(sources: Sequence[Source]) -> tuple[list[tuple[Source, Listed]], dict[str, TieredError]]:
    """All steps, newest first, those in S3 before others of their number; and the places that did not answer."""
    found: list[tuple[Source, Listed]] = []
    silent: dict[str, TieredError] = {}
    for source in sources:
        try:
            found += [(source, listed) for listed in source.listed()]
        except TierUnavailableError as error:
            silent[source.title] = error
    order = [source.title for source in sorted(sources, key=lambda source: not source.title.startswith("s3:"))]
    return sorted(found, key=lambda pair: (-pair[1].step, order.index(pair[0].title))), silent


def _check_told(settings: Settings, silent: dict[str, TieredError], *, nothing: bool) -> None:
    """A place that did not answer may hold what is newest. Only the cluster's service may be left out."""
    for title, error in silent.items():
        service = next((tier for tier in settings.durable if isinstance(tier, HyperPodSettings)), None)
        optional = service is not None and title.startswith(service.url) and service.unreachable == "skip"
        if nothing or not optional:
            raise error
        _logger.warning("%s did not answer and is left out: %s", printable(title), printable(error.message))


def _target(settings: Settings) -> TierSettings:
    """The first tier that lasts; else the cluster's memory."""
    lasting = [tier for tier in settings.durable if not isinstance(tier, HyperPodSettings)]
    return (*lasting, *settings.durable)[0]


def _taken(
    source: Source,
    listed: Listed,
    settings: Settings,
    target: TierSettings,
    refused: list[TieredError],
    *,
    asked: bool,
) -> bool:
    """Whether *listed* could be taken over; why not is added to *refused*. *asked*: for this very step."""
    where, facts = printable(f"{source.title}, {listed.name}"), {"step": listed.step}
    with closing(open_tier(target, settings.namespace)) as tier:
        try:
            found = import_step(
                source,
                listed,
                tier,
                namespace=settings.namespace,
                allow_pickle=settings.allow_pickle,
                asked=asked,
            )
        except OLDER as error:
            _logger.warning("%s is not taken over: %s", where, printable(error.message), extra=facts)
            refused.append(error)
            return False
    _tell(where, found, target, facts)
    return True


def _tell(where: str, found: Imported, target: TierSettings, facts: dict[str, int]) -> None:
    """Say what was taken over, and what of it nothing could be compared with."""
    for doubt in found.doubts:
        _logger.warning("%s: %s", where, doubt, extra=facts)
    _logger.info(
        "took over %s, which amzn-sagemaker-checkpointing wrote on %d ranks: %d values are on %s, read back; %d were "
        "compared with checksums that their save left",
        where,
        found.world,
        found.tensors + found.values,
        target.name,
        found.compared,
        extra=facts,
    )
    if found.bare:
        names = printable(", ".join(found.unchecked[:8]) + (", …" if len(found.unchecked) > 8 else ""))
        _logger.warning(
            "%s: %d values have no checksum, so nothing tells whether they are damaged: %s",
            where,
            found.bare,
            names,
            extra=facts,
        )
