"""Files that ask a running job for a save: seen once, answered once, whoever made them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sm_tiered.errors import RecipeError, TierRefusedError
from sm_tiered.recipe import Recipe
from sm_tiered.requests import Requests, ask_for_save, request_files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "request.json"


def recipe(tiers: dict[str, object]) -> Recipe:
    return Recipe.parse({"version": 1, "namespace": "run", "tiers": tiers})


def test_a_request_is_noticed_until_a_save_takes_it(file: Path) -> None:
    requests = Requests([file])
    assert not requests.noticed()
    assert ask_for_save(file)
    assert not ask_for_save(file), "one is waiting already"
    assert requests.noticed()
    requests.take()
    assert not requests.noticed()
    assert not file.exists()
    assert ask_for_save(file)
    assert requests.noticed(), "another one"


def test_one_that_can_not_be_removed_is_answered_once_and_not_at_each_step(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    file.touch()
    requests = Requests([file])
    requests.take()
    assert not requests.noticed()
    os.utime(file, ns=(1, 1))
    assert requests.noticed(), "touched again: asked again"


def test_two_ranks_of_a_node_take_it_together(file: Path) -> None:
    first, second = Requests([file]), Requests([file])
    file.touch()
    first.take()
    second.take()
    assert not first.noticed()
    assert not second.noticed()


def test_a_file_of_ones_own_may_be_any_file(tmp_path: Path) -> None:
    own = tmp_path / "save-now"
    found = recipe({"disk": {"kind": "local", "path": str(tmp_path), "save": {"on_request": {"file": str(own)}}}})
    assert request_files(found.settings()) == (own,)


def test_without_a_name_it_stands_in_the_nearest_directory(tmp_path: Path, memory_dir: Path) -> None:
    local = {"kind": "local", "path": str(tmp_path), "save": {"any": ["on_request", {"every_n_steps": 5}]}}
    memory = {"kind": "memory", "path": str(memory_dir)}
    near = recipe({"memory": memory, "disk": local})
    assert request_files(near.settings()) == (memory_dir / "run" / "request.json",)
    far = recipe({"disk": local})
    assert request_files(far.settings()) == (tmp_path / "run" / "request.json",)


def test_nobody_looks_where_no_policy_waits(tmp_path: Path) -> None:
    plain = recipe({"disk": {"kind": "local", "path": str(tmp_path), "save": "on_end"}})
    assert request_files(plain.settings()) == ()


def test_a_recipe_without_any_directory_has_to_name_one() -> None:
    with pytest.raises(RecipeError, match=r"tiers\.s3: on_request has no directory.*on_request: \{file"):
        recipe({"s3": {"kind": "s3", "uri": "s3://bucket/prefix", "save": {"any": ["on_end", "on_request"]}}})


def test_asking_where_no_job_has_been_says_so(tmp_path: Path) -> None:
    with pytest.raises(TierRefusedError, match=r"no save can be asked for at .*after the job has begun"):
        ask_for_save(tmp_path / "nowhere" / "request.json")
