"""`TieredTrainerCallback` and the Trainer's own ways: what it writes where, when, and what it is told."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.dcp_jobs import recipe, run, step_dir, steps

# Ranks alone load transformers, from `hf_job`: what runs in them imports it.

EACH = {"save": {"every_n_steps": 1}}
TWO = {"save": {"every_n_steps": 2}}
NEVER = {"save": None}
END = {"save": "on_end"}
FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "optimizer.pt", "rng_state.pth"),
    *("scheduler.pt", "trainer_state.json", "training_args.bin"),
}


def made(root: Path, which: Any, *callbacks: Any, **options: Any) -> tuple[Any, Any]:
    """Return a Trainer of five steps that writes to *root*, and its callback."""
    from tests.accelerate import hf_job

    hf_job.join(0, 0)
    tiered = hf_job.TieredTrainerCallback(which)
    return hf_job.trainer(root / "hf", *callbacks, tiered, **{"max_steps": 5, **options}), tiered


def trained(rank: int, root: Path, which: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Train, after what is there; return what can be seen of it."""
    from tests.accelerate import hf_job

    seen: list[bool] = []

    class Look(hf_job.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(found is not None and Path(found).exists())

    trainer, tiered = made(root, which, Look(), **options)
    found = tiered.resolve()
    trainer.train(resume_from_checkpoint=found)
    return {
        "began": found and Path(found).name,
        "seen": seen,
        "output_dir": trainer.args.output_dir,
        "strategy": trainer.args.save_strategy.value,
        "best": trainer.state.best_model_checkpoint,
        "history": trainer.state.log_history,
        "preempted": tiered.preempted,
    }


def listed(root: Path) -> set[str]:
    """The directories in which the Trainer was told to write."""
    return {path.name for path in (root / "hf").glob("*")}


def staged(memory: Path) -> list[Path]:
    """What was left on its way in."""
    return [path for path in memory.glob("run-1/.staging/*") if path.name]


def test_what_only_the_policies_want_is_written_to_memory_alone(tmp_path: Path, memory_dir: Path) -> None:
    (end,) = run(0, trained, tmp_path, recipe(tmp_path, memory_dir, memory=TWO, disk=END), {})
    assert listed(tmp_path) == set()
    assert staged(memory_dir) == []
    assert end["output_dir"] == str(tmp_path / "hf")
    assert end["strategy"] == "no"
    assert max(steps(memory_dir)) == 5
    assert set(steps(memory_dir)) >= {4, 5}
    assert list(steps(tmp_path / "disk")) == [5], "the end was not saved"
    found = step_dir(tmp_path / "disk", 5)
    assert {path.name for path in found.iterdir()} >= FILES
    assert json.loads((found / "trainer_state.json").read_text())["global_step"] == 5
    assert str(tmp_path / "hf").encode() in (found / "training_args.bin").read_bytes()
    assert str(memory_dir).encode() not in (found / "training_args.bin").read_bytes()


def test_it_goes_on_from_a_directory_that_is_gone_then(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory=TWO, disk=NEVER)
    (first,) = run(0, trained, tmp_path, which, {})
    (second,) = run(0, trained, tmp_path, which, {"max_steps": 8})
    assert (first["began"], second["began"]) == (None, "checkpoint-4")
    assert second["seen"] == [True, False, False, False]
    assert not list(memory_dir.glob("run-1/.restored/*"))
    assert max(steps(memory_dir)) == 8


def test_what_the_trainer_wants_itself_stays_where_it_is_told(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory=EACH, disk={**EACH, "keep": {"latest": 9}})
    own = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    run(0, trained, tmp_path, which, own)
    assert listed(tmp_path) == {"checkpoint-5"}, "rotation is the Trainer's, among its own"
    assert {path.name for path in (tmp_path / "hf" / "checkpoint-5").iterdir()} == FILES
    whole = list(steps(tmp_path / "disk", "manifest.json").items())
    assert whole
    for step, _ in whole:
        # Each was rotated away, or staged and removed, while the drain still ran.
        (end,) = run(0, looked_at, tmp_path, which, step)
        assert end == step


def looked_at(rank: int, root: Path, which: Any, step: int) -> int:
    tiered = made(root, which)[1]
    memory = Path(which["tiers"]["memory"]["path"])
    os.rename(memory / "run-1", memory / f"gone-{step}")
    found = Path(tiered.resolve(step))
    assert {path.name for path in found.iterdir()} >= FILES
    return json.loads((found / "trainer_state.json").read_text())["global_step"]


def slow(rank: int, root: Path, which: Any, options: dict[str, Any]) -> tuple[str | None, Any]:
    """Train with a second rank that is slow to write."""
    from tests.accelerate import hf_job

    stock = hf_job.Journal._save_rng_state

    def late(self: Any, output_dir: str) -> None:
        # As many a writer, it begins under another name.
        begun = Path(output_dir) / f".begun-{rank}"
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.touch()
        time.sleep(0.4 * rank)
        stock(self, output_dir)
        begun.unlink()

    hf_job.Journal._save_rng_state = late
    return hf_job.train(rank, 2, which, str(root), max_steps=3, **options)


@pytest.mark.parametrize("options", [{}, {"save_strategy": "steps", "save_steps": 1}])
def test_a_slow_rank_is_waited_for(tmp_path: Path, memory_dir: Path, options: dict[str, Any]) -> None:
    run(2, slow, tmp_path, recipe(tmp_path, memory_dir, memory=EACH, disk=END), options)
    names = {"rng_state_0.pth", "rng_state_1.pth", *(FILES - {"rng_state.pth"})}
    for root, step in ((memory_dir, 2), (memory_dir, 3), (tmp_path / "disk", 3)):
        assert {path.name for path in step_dir(root, step).iterdir()} >= names, (root, step)
    assert staged(memory_dir) == []
    assert listed(tmp_path) == ({"checkpoint-1", "checkpoint-2", "checkpoint-3"} if options else set())


def on_nodes(rank: int, root: Path, whiches: list[Any], options: dict[str, Any]) -> tuple[str | None, Any]:
    from tests.accelerate import hf_job

    hf_job.join(rank, 2)
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    tiered = hf_job.TieredTrainerCallback(whiches[rank])
    trainer = hf_job.trainer(root / "hf", tiered, **options)
    found = tiered.resolve()
    trainer.train(resume_from_checkpoint=found)
    assert trainer.args.save_on_each_node is False
    return found and Path(found).name, hf_job.weights(trainer)


def test_the_memory_of_each_node_has_all_that_it_needs(tmp_path: Path, memory_dir: Path) -> None:
    whiches = [recipe(tmp_path, memory_dir / str(node), memory=TWO, disk=NEVER) for node in range(2)]
    run(2, on_nodes, tmp_path, whiches, {"max_steps": 3})
    ends = run(2, on_nodes, tmp_path, whiches, {"max_steps": 4})
    assert [end[0] for end in ends] == ["checkpoint-2"] * 2
    assert ends[0][1] == ends[1][1]
    assert listed(tmp_path) == set()


@pytest.mark.parametrize("world", [0, pytest.param(2, marks=pytest.mark.long)])
def test_without_a_memory_tier_it_streams(tmp_path: Path, world: int) -> None:
    which = recipe(tmp_path, None, disk=TWO)
    run(world, streamed, world, tmp_path, which, {"max_steps": 3})
    ends = run(world, streamed, world, tmp_path, which, {"max_steps": 4})
    assert [end[0] for end in ends] == ["checkpoint-2"] * max(1, world)
    assert listed(tmp_path) == set()
    assert not list(tmp_path.glob("sm_tiered-*"))


def streamed(rank: int, world: int, root: Path, which: Any, options: dict[str, Any]) -> tuple[str | None, Any]:
    from tests.accelerate import hf_job

    tempfile.tempdir = str(root)
    return hf_job.train(rank, world, which, str(root), **options)


def test_epochs_and_what_an_evaluation_finds(tmp_path: Path, memory_dir: Path) -> None:
    best = {"keep": {"best": {"metric": "eval_loss", "mode": "min", "n": 2}}, "save": {"every_n_epochs": 1}}
    which = recipe(tmp_path, memory_dir, memory=NEVER, disk=best)
    (end,) = run(0, trained, tmp_path, which, {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"})
    evaluated = {entry["step"]: entry["eval_loss"] for entry in end["history"] if "eval_loss" in entry}
    assert list(evaluated) == [6, 12]
    found = {step: record(tmp_path / "disk", step)["metrics"] for step in steps(tmp_path / "disk")}
    assert found.keys() >= {12}
    assert found == {step: {"eval_loss": evaluated[step]} for step in found}


def record(root: Path, step: int) -> dict[str, Any]:
    found = json.loads((step_dir(root, step) / "record-00000.json").read_text())
    return found.get("body", found)


def test_the_trainers_best_stays_its_own(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={**EACH, "keep": {"latest": 9}}, disk=NEVER)
    # A rate at which the model gets worse again: not every evaluation is the best.
    own = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    run(0, trained_to_worse, tmp_path, which, own)


def trained_to_worse(rank: int, root: Path, which: Any, options: dict[str, Any]) -> None:
    trainer, _ = made(root, which, load_best_model_at_end=True, greater_is_better=False, **options)
    scores = iter([3.0, 2.0, 2.5, 1.0, 4.0])
    stock = trainer.evaluation_loop

    def scored(*given: Any, **more: Any) -> Any:
        output = stock(*given, **more)
        output.metrics["eval_loss"] = next(scores)
        return output

    trainer.evaluation_loop = scored
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(root / "hf" / "checkpoint-4")
    assert listed(root) == {"checkpoint-1", "checkpoint-2", "checkpoint-4"}
    memory = Path(which["tiers"]["memory"]["path"])
    assert list(steps(memory)) == [1, 2, 3, 4, 5]
    for step, best in {3: 2, 4: 4, 5: 4}.items():
        state = json.loads((step_dir(memory, step) / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(root / "hf" / f"checkpoint-{best}")
    assert trainer.args.save_strategy.value == "best"


def test_a_best_step_that_only_the_policies_save_is_no_best_model(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory=EACH, disk=NEVER)
    own = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    (end,) = run(0, trained, tmp_path, which, {**own, "metric_for_best_model": "eval_loss"})
    assert listed(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    assert end["best"] in (None, *(str(tmp_path / "hf" / f"checkpoint-{step}") for step in (2, 4)))
    for step in (3, 4):
        state = json.loads((step_dir(memory_dir, step) / "trainer_state.json").read_text())
        assert str(memory_dir) not in str(state["best_model_checkpoint"])


def pushed(rank: int, root: Path, which: Any) -> list[str]:
    trainer, _ = made(root, which, max_steps=3)
    found = list[str]()
    trainer._push_from_checkpoint = found.append
    trainer.args.push_to_hub = True
    trainer.train()
    return found


def test_what_goes_to_the_hub_is_written_where_it_was_told(tmp_path: Path, memory_dir: Path) -> None:
    (found,) = run(0, pushed, tmp_path, recipe(tmp_path, memory_dir, memory=TWO, disk=END))
    assert found == [str(tmp_path / "hf" / f"checkpoint-{step}") for step in (2, 3)]
    assert listed(tmp_path) == {"checkpoint-2", "checkpoint-3"}
    assert 2 in steps(memory_dir)
    assert list(steps(tmp_path / "disk", "manifest.json")) == [3]
