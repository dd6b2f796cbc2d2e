"""What is said of a place given by ``--from``: of that place, and not of a tier that the recipe doesn't have."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

from sm_tiered.errors import TieredError, TierRefusedError, TierUnavailableError
from sm_tiered.recipe import Recipe
from sm_tiered.settings import S3Settings, Settings
from sm_tiered.testing.daemon import DaemonFault, StandInDaemon
from sm_tiered.tiers.s3_errors import classify
from sm_tiered_dcp.predecessor import open_origin
from sm_tiered_dcp.predecessor.origins import open_s3
from sm_tiered_dcp.predecessor.outside import Outside
from sm_tiered_dcp.predecessor.sources import Listed, Source
from tests.integrations.predecessor_made import source, two_ranks
from tests.unit.cli_checkpoints import write_recipe


def settings(directory: Path) -> Settings:
    """Those of a recipe, whose tier in the cluster's memory is hasty."""
    return Recipe.load(write_recipe(directory, cluster="http://127.0.0.1:9")).settings()


def said(place: Source) -> TieredError:
    """What a listing fails with."""
    with closing(place), pytest.raises(TieredError) as caught:
        place.listed()
    for words in ("predecessor", "tier ", "the tier", "PutObject"):
        assert words not in str(caught.value).replace("the recipe's S3 tier", ""), str(caught.value)
    return caught.value


def test_a_service_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        found = said(open_origin(url, "theirs", settings(tmp_path)))
    assert isinstance(found, TierUnavailableError)
    assert (found.hint or "").endswith("and import in one of its pods.")


@pytest.mark.parametrize(
    ("text", "hint"),
    [("<html>", "Something else than the checkpoint service answers at --from."), ("", "Make sure that --from is")],
)
def test_something_else_that_answers(text: str, hint: str, tmp_path: Path) -> None:
    with StandInDaemon() as daemon:
        daemon.restart(DaemonFault(kind="status", status=200 if text else 403, text=text))
        assert hint in (said(open_origin(daemon.url, "theirs", settings(tmp_path))).hint or "")


def test_a_bucket_that_is_not_there(tmp_path: Path, make_s3_settings: Callable[..., S3Settings]) -> None:
    real = make_s3_settings()
    more = f"  s3: {{kind: s3, uri: s3://{real.bucket}/ours, endpoint_url: {real.endpoint_url}, region: us-east-1}}\n"
    recipe = Recipe.load(write_recipe(tmp_path, more=more)).settings()
    place = "s3://nobody-made-this/checkpoints"
    assert said(open_origin(place, "theirs", recipe)).hint == "Correct the bucket's name in --from."
    (own,) = [tier for tier in recipe.tiers if isinstance(tier, S3Settings)]
    with closing(open_s3(own, "nobody-made-this", "", "theirs")) as of_a_tier, pytest.raises(TieredError) as caught:
        of_a_tier.listed()
    assert caught.value.tier == "s3", "a tier of the recipe is called what the recipe calls it"


class Refusing:
    """A source that refuses everything."""

    title = "there"

    def __init__(self, hint: str | None) -> None:
        self.hint = hint

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def refuse(*_: object, **__: object) -> None:
            raise TierRefusedError("no", hint=self.hint, tier="predecessor")

        return refuse

    def close(self) -> None:
        """Nothing is open."""


CODES = ("AccessDenied", "NoSuchBucket", "ExpiredToken", "PermanentRedirect", "InvalidAccessKeyId", "SlowDown")


@pytest.mark.parametrize("code", CODES)
def test_what_s3_says_is_told_without_a_tier(code: str) -> None:
    hint = classify(code, 403)[1]
    assert bool(said(Outside(cast("Source", Refusing(hint)))).hint) == bool(hint)


def test_so_it_is_whatever_is_asked(tmp_path: Path) -> None:
    place, step = (
        Outside(cast("Source", Refusing("Look at the tier's `url`."))),
        Listed(step=1, name="1", finished=True),
    )
    for ask in (
        lambda: place.sizes(step),
        lambda: place.identity(step, {0: 1}),
        lambda: place.metadata(step),
        lambda: place.shard(step, 0, end=1),
    ):
        with pytest.raises(TierRefusedError) as caught:
            ask()
        assert (caught.value.tier, caught.value.hint) == (None, "Look at --from.")


def test_a_shard_is_read_through_it_and_errors_of_others_stay_theirs(tmp_path: Path) -> None:
    two_ranks(10).put(tmp_path / "base", 10)
    place = Outside(source(tmp_path / "base"))
    (step,) = place.listed()
    with place.shard(step, 1, end=1) as shard:
        data = bytearray(shard.size)
        shard.read_into(0, memoryview(data))
        assert bytes(data) == two_ranks(10).shards[1]
        with pytest.raises(TieredError) as caught:
            shard.read_into(shard.size - 1, memoryview(bytearray(2)))
        assert caught.value.tier is None
    other = TierRefusedError("no", hint="Look at the tier's `url`.", tier="s3")
    with pytest.raises(TierRefusedError), place.shard(step, 1, end=1):
        raise other
    assert (other.tier, other.hint) == ("s3", "Look at the tier's `url`.")
