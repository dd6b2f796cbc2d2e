"""Shows that the tests would notice: every mutant of `mutants.py` must make one of its quick tests fail.

``python tests/mutants/run.py [WORD …]`` copies the tree, applies one mutant at a time to the copy, and runs the tests
named for it; words choose mutants by their name. It ends with 1 if a mutant survives, or no longer fits the sources.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutants.mutants import MUTANTS, Mutant  # noqa: E402

_COPIED = ("sm_tiered", "integrations", "tests", "recipes", "pyproject.toml", "README.md", "Makefile")
_IGNORED = shutil.ignore_patterns("__pycache__", ".*_cache", "*.pyc")
_TIMEOUT_SECS = 300
_FAILED = 1
"""What pytest ends with when a test failed, as opposed to one that can't be collected or found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one mutant."""

    mutant: Mutant
    killed: bool
    detail: str
    secs: float


def main(words: list[str]) -> int:
    """Run the mutants whose names contain any of *words*, or all; return the exit status."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    with tempfile.TemporaryDirectory(prefix="sm_tiered-mutants-") as directory:
        tree = Path(directory)
        _copy(tree)
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        status, output = _pytest(tree, tests)
        if status != 0:
            print(output)
            print("The tests fail without any mutant.")
            return 1
        width = max(len(mutant.name) for mutant in chosen)
        verdicts: list[Verdict] = []
        for mutant in chosen:
            verdicts.append(_try(tree, mutant))
            last = verdicts[-1]
            word = "killed  " if last.killed else "SURVIVED"
            print(f"{word}  {mutant.name:{width}}  {last.secs:5.1f} s  {last.detail}", flush=True)
    killed = sum(verdict.killed for verdict in verdicts)
    print(f"{killed}/{len(verdicts)} killed")
    return 0 if killed == len(verdicts) else 1


def _copy(tree: Path) -> None:
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=_IGNORED)
        elif source.exists():
            shutil.copy2(source, tree / name)


def _try(tree: Path, mutant: Mutant) -> Verdict:
    path, begun = tree / mutant.path, time.monotonic()
    original = path.read_text()
    count = original.count(mutant.old)
    if count != 1:
        detail = f"{mutant.path} has the text to change {count} times, not once: bring the mutant up to date"
        return Verdict(mutant=mutant, killed=False, detail=detail, secs=0.0)
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        status, output = _pytest(tree, mutant.tests)
    finally:
        path.write_text(original)
    failed = next((line for line in output.splitlines() if line.startswith("FAILED")), "")
    detail = failed.removeprefix("FAILED ").split(" - ")[0] or f"pytest ended with {status}"
    return Verdict(mutant=mutant, killed=status == _FAILED, detail=detail, secs=time.monotonic() - begun)


def _pytest(tree: Path, tests: Iterable[str]) -> tuple[int, str]:
    """Run quick *tests* on the copy, which shadows whatever is installed, and return status and output."""
    paths = os.pathsep.join(str(tree / name) for name in ("", "integrations", "recipes"))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not long", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECS, check=False
        )
    except subprocess.TimeoutExpired:
        return _FAILED, f"FAILED to end within {_TIMEOUT_SECS} s"
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
