"""Each mutant still fits the sources: what it changes is there once, and so are the tests that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_that_a_mutant_changes_stands_once_in_its_file(mutant: Mutant) -> None:
    assert (ROOT / mutant.path).read_text().count(mutant.old) == 1, f"bring {mutant.name!r} up to date"
    assert mutant.new != mutant.old


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_that_a_mutant_names_are_there(mutant: Mutant) -> None:
    assert mutant.tests
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / path).read_text(), f"bring {mutant.name!r} up to date: {test} is gone"


def test_no_two_mutants_have_the_same_name() -> None:
    """`tests/mutants/run.py` chooses them by it."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
