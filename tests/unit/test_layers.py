"""What the tree must look like: what an import loads, what is a package, what stands where."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "boto3", "botocore", "s3torchconnector", "pydantic", "yaml", "numpy", "typer", "rich")
TOP_LEVEL = {
    *(".ci", ".gitignore", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"),
    *("sm_tiered", "integrations", "recipes", "tests"),
}
# Where a machine and a workplace give themselves away. In pieces, so that this file does not.
GIVEAWAYS = re.compile(
    "|".join(
        [
            r"(?<![\w.])/(?:work|farm)" + r"/\w",
            r"(?<![\w.}])/root" + r"/[\w.]",
            r"/opt/" + r"(?:pypi|wheels)",
            r"\.py" + r"env/",
            r"shared/" + r"(?:design|research|reference)",
            r"pypi" + r"\.org|files\.python" + r"hosted|registry\." + r"npmjs",
        ]
    )
)


def loaded_by(statement: str) -> set[str]:
    """Return which of the heavy packages a fresh interpreter has loaded after *statement*."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    path = [str(ROOT), str(ROOT / "integrations")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout)) & set(HEAVY)


def core_modules() -> list[str]:
    """Return the names of all modules of the core."""
    names = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "sm_tiered").rglob("*.py"))
    return sorted({".".join(name.parts).removesuffix(".__init__") for name in names})


@cache
def tree() -> tuple[str, ...]:
    """Return what a commit of everything would hold."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"no git checkout: {done.stderr.strip()}")
    return tuple(name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())


@pytest.mark.parametrize(
    "module", ["sm_tiered", "sm_tiered.errors", "sm_tiered.policies", "sm_tiered.settings", "sm_tiered.manifest"]
)
def test_importing_the_foundations_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}") == set()


def test_no_module_of_the_core_loads_torch_when_imported() -> None:
    everything = [name for name in core_modules() if not name.startswith("sm_tiered.testing")]
    assert loaded_by("\n".join(f"import {name}" for name in everything)) & {"torch", "s3torchconnector"} == set()


def test_the_command_line_loads_neither_torch_nor_aws_before_it_knows_the_command() -> None:
    assert loaded_by("import sm_tiered.cli.app") & {"torch", "s3torchconnector", "boto3", "botocore"} == set()


def test_the_folder_of_integrations_is_no_package() -> None:
    assert not (ROOT / "integrations" / "__init__.py").exists()


def test_no_integration_has_a_name_that_hides_the_framework_itself() -> None:
    # An editable install puts integrations/ on sys.path: a "lightning" there would be everybody's lightning.
    inside = {path.stem for path in (ROOT / "integrations").iterdir() if path.name != "README.md"}
    assert all(name.startswith("sm_tiered_") for name in inside - {"__pycache__"}), inside


def test_every_package_is_typed_and_shipped_and_kept_in_its_layer() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    shipped = re.search(r"^packages = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)
    layered = re.search(r"^root_packages = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)
    assert shipped
    assert layered
    found = [path.parent for path in (*ROOT.glob("*/__init__.py"), *ROOT.glob("integrations/*/__init__.py"))]
    assert found
    for package in found:
        assert (package / "py.typed").exists(), f"{package.name} has no py.typed"
        assert f'"{package.relative_to(ROOT)}"' in shipped[1], f"{package.name} is not in the wheel"
        assert f'"{package.name}"' in layered[1], f"{package.name} is not checked by import-linter"


def test_the_top_level_holds_only_what_belongs_there() -> None:
    assert {name.split("/")[0] for name in tree()} <= TOP_LEVEL


def test_no_file_tells_of_the_machine_that_it_was_written_on() -> None:
    told: list[str] = []
    for name in tree():
        text = (ROOT / name).read_bytes().decode(errors="replace")
        told += [f"{name}: {text[max(0, m.start() - 20) : m.end() + 20]!r}" for m in GIVEAWAYS.finditer(text)]
    assert told == []


def test_the_giveaways_are_found_where_they_are() -> None:
    for text in ("see /wo" + "rk/main", "/ro" + "ot/.cache", "pip -i https://pypi" + ".org/simple"):
        assert GIVEAWAYS.search(text), text
    for text in ("s3://bucket/root/x", "a/work/b", "<root>/<namespace>", "at work/rest"):
        assert not GIVEAWAYS.search(text), text
