"""What ``sm-tiered import`` says: each thing once, in the right order, and nothing that it does not know."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sm_tiered.cli import import_notes
from sm_tiered.inventory import list_checkpoints
from sm_tiered.settings import S3Settings
from sm_tiered.testing.daemon import StandInDaemon
from tests.integrations.predecessor_imports import again, filled_again
from tests.integrations.predecessor_made import NAMESPACE, made, two_ranks
from tests.integrations.test_predecessor_cli import TO, Job, filled
from tests.unit.acting import call, document
from tests.unit.cli_checkpoints import checkpoint, cluster_tier, write_checkpoint

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


@pytest.fixture
def job(tmp_path: Path, make_s3_settings: Callable[..., S3Settings], s3_client: S3Client) -> Job:
    return Job(tmp_path, make_s3_settings(), s3_client)


def both_layouts(job: Job, step: int) -> None:
    """Put *step*, and another save of it in the layout for Ray."""
    job.put(step)
    found = again(step, 77)
    files = {f"step_{step}/rank_{rank}/checkpoint.pt": data for rank, data in enumerate(found.shards)}
    for name, data in {**files, f"step_{step}/rank_0/metadata.metadata": found.pickled()}.items():
        job.client.put_object(Bucket=job.settings.bucket, Key=f"theirs/{NAMESPACE}/{name}", Body=data)


def test_of_two_copies_of_a_step_all_takes_the_one_that_latest_would(job: Job) -> None:
    both_layouts(job, 10)
    job.put(20)
    found = document(
        call("import", job.recipe, "--from", job.base, "--from-namespace", NAMESPACE, *TO, "--all", "--json")
    )
    told = [(each["step"], each["place"], each["ok"]) for each in found["checkpoints"]]
    assert told == [(10, "step_10", True), (20, "step_20", True)]
    assert found["notes"][0] == "step 10: step_10 (by step) was left alone: step_10 was taken"
    assert "step_10" in job.run(*TO, "--step", 10)


def test_a_copy_of_a_step_is_taken_where_the_first_one_is_damaged(job: Job) -> None:
    both_layouts(job, 10)
    job.put(10, cut=5)
    told = job.run(*TO, "--all", status=3)
    assert "1 of 2 from" in told
    assert "step_10 (by step)" in told


def doubted(job: Job, step: int) -> None:
    """Put *step* with a shard that was written a second or more after its metadata."""
    import time

    job.put(step)
    time.sleep(1.1)  # the clock of S3 has whole seconds
    key = f"theirs/{NAMESPACE}/rank_1/step_{step}/checkpoint.pt"
    job.client.put_object(Bucket=job.settings.bucket, Key=key, Body=two_ranks(step).shards[1])


def test_a_step_that_may_be_of_two_saves_is_taken_by_its_number_only(job: Job) -> None:
    job.put(10)
    doubted(job, 20)
    told = job.run(*TO, status=3)
    assert "the shard of rank 1 was written after the metadata" in told
    assert "Asked for by its number, it is taken all the same" in told
    assert job.directory(10).is_dir()
    assert not list((job.root / "local/ours").glob("step_0000000020-*"))
    assert "1 of 2 from" in job.run(*TO, "--all", status=3)
    told = job.run(*TO, "--step", 20)
    assert "imported, read back, committed" in told
    assert "the shard of rank 1 was written after the metadata" in told


def test_a_step_that_we_saved_too_is_not_to_be_restored_by_its_number(job: Job) -> None:
    from sm_tiered.policies.keep import Latest
    from sm_tiered.settings import LocalSettings
    from sm_tiered.tiers import open_tier

    job.put(10)
    job.put(20)
    settings = LocalSettings(name="local", save=None, keep=Latest(2), path=str(job.root / "local"), fsync=False)
    local = open_tier(settings, "ours")
    write_checkpoint(local, checkpoint(20, ordinal=3), durable=True)
    local.close()
    assert "To go on from here, restore step 10 by its number" in job.run("--to", "s3", "--step", 10)
    told = job.run("--to", "s3", "--step", 20)
    assert "ours has saves of its own, of attempts up to a3: a restore takes those first" in told
    assert "It has a step 20 too, which is taken even by that number" in told
    assert "--set namespace=NAME" in told


def test_a_refusal_is_told_once_and_a_save_that_never_ended_is_no_error(job: Job) -> None:
    job.put(10)
    job.put(30, but="rank_1/step_30/checkpoint.pt")
    job.put(40, but="metadata.metadata")
    told = job.run(*TO, status=3)
    assert told.count("the shard of rank 1 is missing") == 1
    assert told.count("its metadata is missing") == 1
    assert told.count("damaged") == 2, "in the table, and as it went on"
    assert "Error:" not in told
    assert "Error:" not in job.run(*TO, "--all", status=3)


def test_a_dry_run_says_what_is_there_already_and_what_stands_in_the_way(job: Job) -> None:
    job.put(10)
    job.run(*TO)
    assert "there already" in job.run(*TO, "--dry-run")
    job.put(10, again(10, 77))
    told = job.run(*TO, "--dry-run", status=1)
    assert "another save of that step, imported before, is committed there" in told


def test_what_will_be_given_up_is_asked_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask = import_notes.ask_keep
    monkeypatch.setattr(import_notes, "ask_keep", lambda keep, facts: asked.append(len(facts)) or ask(keep, facts))
    for step in (10, 20, 30, 40):
        job.put(step)
    assert "gives steps 10, 20 up at the next save there" in job.run(*TO, "--all")
    assert asked == [4]


def test_values_that_need_a_pickle_are_told_of_each_time(job: Job) -> None:
    import fractions

    job.put(10, made({"half": fractions.Fraction(1, 2), "n": 1}))
    base = ("import", job.recipe, "--from", job.base, "--from-namespace", NAMESPACE, *TO, "--allow-pickle", "--json")
    for already in (False, True):
        (found,) = document(call(*base))["checkpoints"]
        assert (found["already"], found["pickled"]) == (already, ["half"])


@pytest.mark.parametrize("place", ["http://[::1", "http://h:99999", "http://h h", "http://host/path", "http://me:x@h"])
def test_an_address_that_is_none_is_refused(place: str, job: Job) -> None:
    result = call("import", job.recipe, "--from", place, *TO)
    assert result.exit_code == 2
    assert "Error: --from: " in result.output


def test_all_of_them_to_the_cluster_s_memory(job: Job) -> None:
    with StandInDaemon() as theirs, StandInDaemon() as daemon:
        filled(theirs, 10, 20)
        to = ("--to", "cluster", "--set", f"tiers.cluster.url={daemon.url}")
        base = ("import", job.recipe, "--from", theirs.url, "--from-namespace", NAMESPACE, "--all", *to)
        result = call(*base)
        assert (result.exit_code, "2 of 2 from" in result.output) == (0, True), result.output
        with closing(cluster_tier(daemon.url, namespace="ours")) as tier:
            assert [(c.step, c.attempt.utc_secs) for c in list_checkpoints(tier)] == [(10, 2), (20, 3)]
        assert call(*base).output.count("there already") >= 2
        filled_again(theirs, 20)
        told = " ".join(call(*base).output.split())
        assert "another save of that step, imported before, is committed there" in told
