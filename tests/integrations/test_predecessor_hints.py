"""Every error of an import says what to do next, and its help says what its exit statuses mean."""

from __future__ import annotations

import ast
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sm_tiered import errors
from sm_tiered.cli import import_
from sm_tiered.errors import CorruptPartError, FormatError
from sm_tiered_dcp import predecessor
from sm_tiered_dcp.predecessor.metadata import read_contents
from tests.integrations.predecessor_imports import taken
from tests.integrations.predecessor_made import NAMESPACE, directory, two_ranks
from tests.integrations.test_predecessor_hostile import BOMBS, _with_stream
from tests.integrations.test_predecessor_metadata import LIES
from tests.unit.acting import call

FILES = [
    *sorted(Path(next(iter(predecessor.__path__))).glob("*.py")),
    *sorted(Path(import_.__file__).parent.glob("import_*.py")),
]
KINDS = frozenset(name for name in errors.__all__ if name.endswith("Error"))
TOLD_FURTHER_OUT = {"metadata.py"}
"""Where what is raised inside gets its hint: `read_contents`, see the next test."""


def without_a_hint(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in KINDS:
            continue
        if not any(keyword.arg == "hint" for keyword in node.keywords):
            yield f"{path.name}:{node.lineno} {ast.unparse(node)[:80]}"


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_whatever_is_raised_has_a_hint(path: Path) -> None:
    found = list(without_a_hint(path))
    assert path.name in TOLD_FURTHER_OUT or found == []


@pytest.mark.parametrize("kind", LIES)
def test_metadata_that_lies_is_told_with_what_to_do(kind: str) -> None:
    found = two_ranks(1)
    LIES[kind][0](found)
    with pytest.raises(FormatError) as caught:
        read_contents(found.pickled(), "it")
    assert caught.value.hint


@pytest.mark.parametrize("kind", BOMBS)
def test_what_is_no_metadata_is_told_with_what_to_do(kind: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_contents(BOMBS[kind], "it")
    assert "Import an older step" in (caught.value.hint or "")


@pytest.mark.parametrize("fqn", ["a", "epoch"])
def test_a_value_that_is_damaged_is_told_with_what_to_do(fqn: str, tmp_path: Path) -> None:
    found = two_ranks(10)
    place = next(info for index, info in found.metadata.storage_data.items() if index.fqn == fqn)
    data = bytearray(found.shards[0])
    data[place.offset : place.offset + 8] = b"no zip.."
    found.shards[0] = bytes(data)
    found.put(tmp_path / "base", 10)
    with pytest.raises(CorruptPartError) as caught:
        taken(tmp_path / "base", directory(tmp_path / "out", "ours"))
    assert f"{fqn} in base/{NAMESPACE}" in caught.value.message
    assert "Import an older step" in (caught.value.hint or "")


@pytest.mark.parametrize("fqn", ["a", "epoch"])
def test_a_zip_that_is_no_value_is_told_with_what_to_do(fqn: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("readme.txt", bytes(3000))
    _with_stream(two_ranks(10), fqn, stream.getvalue()).put(tmp_path / "base", 10)
    with pytest.raises(CorruptPartError, match=f"^{fqn} in ") as caught:
        taken(tmp_path / "base", directory(tmp_path / "out", "ours"))
    assert "Import an older step" in (caught.value.hint or "")


def test_the_help_tells_the_exit_statuses() -> None:
    told = " ".join(call("import", "--help").output.split())
    assert "Exit status: 0 all right, 1 a tier did not answer or nothing is there, 2 usage or recipe, 3 damage." in told


def test_what_was_given_and_what_is_allowed_is_told() -> None:
    found = two_ranks(1)
    found.metadata.planner_data.update(a=(1.5,))
    with pytest.raises(FormatError, match=r"a: its path is none, \(1.5,\): allowed are 1 to 256 texts and numbers"):
        read_contents(found.pickled(), "it")
    LIES["many dimensions"][0](found := two_ranks(1))
    with pytest.raises(FormatError, match="100 dimensions, allowed are 64"):
        read_contents(found.pickled(), "it")
    LIES["a sparse tensor"][0](found := two_ranks(1))
    with pytest.raises(FormatError, match=r"its layout is layout torch\.sparse_coo, allowed is torch\.strided"):
        read_contents(found.pickled(), "it")
