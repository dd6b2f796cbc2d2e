"""What the README says is so: its code runs, its commands and files are there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sm_tiered.handle import SaveHandle
from sm_tiered.recipe import Recipe
from tests.scripts import run_script

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def blocks(kind: str) -> list[str]:
    return [text for found, text in BLOCKS if found == kind]


def code(section: str, index: int = 0) -> str:
    """The Python of a section."""
    text = TEXT[TEXT.index(f"## {section}\n") :]
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[index]


def commands() -> list[list[str]]:
    """Every command line in the shell blocks, without comments."""
    lines = [line for text in blocks("bash") for line in text.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    assert found
    return [words for words in found if words]


@pytest.fixture
def folder(tmp_path: Path, memory_dir: Path) -> Path:
    """A directory with the README's recipe in it, whose memory tier is one of the tests'."""
    (text,) = blocks("yaml")
    assert "kind: memory " in text
    (tmp_path / "recipe.yaml").write_text(text.replace("kind: memory ", f"kind: memory\n    path: {memory_dir}"))
    return tmp_path


def run(folder: Path, *words: str) -> str:
    """Run a command as the README's reader would, and return what it printed."""
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "integrations"))
    environment = {name: value for name, value in os.environ.items() if name != "TRAINING_JOB_NAME"}
    done = subprocess.run(
        words,
        cwd=folder,
        env={**environment, "PYTHONPATH": paths, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_forked(folder: Path, program: str) -> None:
    """Run a program as the README's reader would, but for the seconds in which its framework is loaded."""
    path = folder / "training.py"
    path.write_text(program)
    ran = run_script(path, cwd=folder)
    assert ran.statuses == [0], ran.printed


@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(280)
def test_the_code_and_the_commands_do_what_they_say(folder: Path) -> None:
    loop, drop_in = code("The loop"), code("The loop", 1)
    # What is loaded must come from the checkpoint: the tensors are spoiled between the README's save and its load.
    saved, loaded = drop_in.split("dcp.load(")
    spoiled = f"{saved}tensors['weights'].fill_(-1)\ndcp.load({loaded}"
    program = "\n".join((loop, "assert start is None", 'assert len(state["progress"]["losses"]) == 100', spoiled))
    run(folder, sys.executable, "-c", f"{program}\nassert torch.equal(tensors['weights'], torch.arange(4.0))\n")
    # The script has ended; its last save is the drainer's.
    end = time.monotonic() + 30
    while not list((folder / "checkpoints/demo").glob("step_0000000200-*/manifest.json")):
        assert time.monotonic() < end, "step 200 was never committed"
        time.sleep(0.05)

    tool = (sys.executable, "-m", "sm_tiered.cli.app")
    listed = run(folder, *tool, "ls", "recipe.yaml")
    assert "memory" in listed
    assert "disk" in listed
    for words in commands():
        if words[0] == "sm-tiered":
            assert run(folder, *tool, *words[1:])
    found = json.loads(run(folder, *tool, "verify", "recipe.yaml", "--read-data", "10%", "--json"))
    assert found
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"demo"}
    steps = {int(path.name[5:15]) for path in (folder / "checkpoints/demo").glob("step_*")}
    assert steps == {50, 100, 200}


@pytest.mark.timeout(280)
def test_the_lightning_training_goes_on_from_its_last_step(folder: Path) -> None:
    training = code("Lightning")
    assert "tiered://step/50" in training
    run_forked(folder, training)
    longer = training.replace("max_steps=60", "max_steps=80")
    run_forked(folder, f"{longer}\nassert trainer.global_step == 80\n")
    run_forked(folder, f"{longer.replace('latest', 'step/50')}\nassert trainer.global_step == 80\n")


@pytest.mark.timeout(280)
def test_the_accelerate_training_ends_where_it_was_saved(folder: Path) -> None:
    # That it goes on from there: test_accelerate_recipe.py.
    training = code("Accelerate")
    run_forked(folder, f"{training}\nassert step == 100\nassert tiered.restored.step == 100\n")


@pytest.mark.timeout(280)
def test_the_hugging_face_training_goes_on_from_its_last_step(folder: Path) -> None:
    training = code("Hugging Face Trainer")
    run_forked(folder, training)
    resumed = "trainer.train(resume_from_checkpoint=tiered.resolve())"
    asked = (
        "found = tiered.resolve()\nassert found.endswith('/checkpoint-60')\ntrainer.train(resume_from_checkpoint=found)"
    )
    longer = training.replace("max_steps=60", "max_steps=80").replace(resumed, asked)
    run_forked(folder, f"{longer}\nassert trainer.state.global_step == 80\n")


@pytest.mark.long
@pytest.mark.timeout(280)
@pytest.mark.parametrize("section", ["Lightning", "Accelerate", "Hugging Face Trainer"])
def test_each_program_runs_from_a_plain_python(folder: Path, section: str) -> None:
    """The forked ones have everything loaded before they import it."""
    run(folder, sys.executable, "-c", code(section))


def test_the_recipe_is_one_and_says_what_the_comments_say() -> None:
    (text,) = blocks("yaml")
    settings = Recipe.parse(text, source="README").settings()
    assert settings.memory is not None
    assert settings.memory.path == f"/dev/shm/sm_tiered-{os.getuid()}"
    assert [tier.name for tier in settings.tiers] == ["memory", "disk"]
    other = re.search(r"# or \{(kind: s3, .*)\}", text)
    assert other is not None
    values = dict(pair.split(": ", 1) for pair in other[1].split(", "))
    Recipe.parse({"version": 1, "namespace": "x", "tiers": {"s3": values}})


def test_every_command_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {tuple(words[:2]) for words in commands()} | {("make", name) for name in re.findall(r"`make (\S+)`", TEXT)}
    assert {("make", "quickstart"), ("make", "test"), ("make", "bench"), ("sm-tiered", "verify")} <= named
    for program, argument in named:
        if program == "make":
            assert argument in targets
        else:
            assert program == "sm-tiered"
    assert 'sm-tiered = "sm_tiered.cli.app:main"' in (ROOT / "pyproject.toml").read_text()


def test_every_file_and_name_of_the_tour_exists() -> None:
    tour = TEXT[TEXT.index("## Architecture") :]
    files = set(re.findall(r"`([\w/]+\.py)`", tour))
    assert len(files) > 20
    for name in files:
        places = [ROOT / "sm_tiered" / name, *(ROOT / "integrations").glob(f"*/{name}")]
        assert any(place.is_file() for place in places), name
    for name in ("wait", "done", "exception"):
        assert f"handle.{name}(" in TEXT
        assert hasattr(SaveHandle, name)
