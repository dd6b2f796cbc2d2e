"""How a training with the Trainer ends, is told of and goes on; and what can't be served."""

from __future__ import annotations

import atexit
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.accelerate.test_trainer import EACH, END, NEVER, TWO, listed, made, trained
from tests.distributed.dcp_jobs import raised, recipe, run, steps


def stopped_early(rank: int, root: Path, which: Any) -> None:
    from tests.accelerate import hf_job

    class Stop(hf_job.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    made(root, which, Stop(), eval_strategy="steps", eval_steps=1)[0].train()


def test_an_end_that_an_evaluation_decides_on_is_saved(tmp_path: Path, memory_dir: Path) -> None:
    run(0, stopped_early, tmp_path, recipe(tmp_path, memory_dir, memory=EACH, disk=END))
    assert max(steps(memory_dir)) == 3
    assert list(steps(tmp_path / "disk", "manifest.json")) == [3]
    assert listed(tmp_path) == set()


def test_a_sigterm_ends_it_when_all_is_safe(tmp_path: Path, memory_dir: Path) -> None:
    from tests.accelerate.training import losses

    told = {"save": {"any": [{"every_n_steps": 4}, "on_preemption"]}}
    both: dict[str, Any] = {"memory": told, "disk": {"save": {"any": ["on_preemption", "on_end"]}}}
    for name in ("uncut", "cut"):
        (tmp_path / name).mkdir()
    whole = recipe(tmp_path / "uncut", memory_dir / "uncut", **both)
    which = recipe(tmp_path / "cut", memory_dir / "cut", **both)
    run(2, sent, tmp_path / "uncut", whole, None)
    ends = run(2, sent, tmp_path / "cut", which, 2)
    assert [end[1:] for end in ends] == [(True, 3)] * 2
    assert list(steps(tmp_path / "cut" / "disk", "manifest.json")) == [3]
    os.rename(memory_dir / "cut", memory_dir / "lost")
    ends = run(2, sent, tmp_path / "cut", which, None)
    assert ends == [("checkpoint-3", False, 6)] * 2
    for rank in range(2):
        assert losses(tmp_path / f"cut/losses.{rank}") == losses(tmp_path / f"uncut/losses.{rank}")


def sent(rank: int, root: Path, which: Any, at: int | None) -> tuple[str | None, bool, int]:
    from tests.accelerate import hf_job

    hf_job.join(rank, 2)
    tiered = hf_job.TieredTrainerCallback(which)
    cut = [hf_job.Cut(tiered, at, "term")] if at is not None else []
    trainer = hf_job.trainer(root / "hf", *cut, tiered, max_steps=6)
    trainer.out = f"{root}/losses"
    found = tiered.resolve()
    name = found and Path(found).name
    trainer.train(resume_from_checkpoint=found)
    return name, tiered.preempted, trainer.state.global_step


def test_where_nothing_is_left_to_train_the_end_is_brought_to_safety(tmp_path: Path, memory_dir: Path) -> None:
    options = {"max_steps": -1, "num_train_epochs": 1}
    run(0, trained, tmp_path, recipe(tmp_path, memory_dir, memory=TWO, disk=NEVER), options)
    assert not steps(tmp_path / "disk")
    (end,) = run(0, trained, tmp_path, recipe(tmp_path, memory_dir, memory=TWO, disk=END), options)
    assert end["began"] == "checkpoint-6"
    assert list(steps(tmp_path / "disk", "manifest.json")) == [6]


def twice(rank: int, root: Path, which: Any) -> None:
    from tests.accelerate import hf_job

    trainer, tiered = made(root, which, max_steps=3)
    assert tiered.resolve() is None
    trainer.train()
    assert raised(tiered.latest)[0] == "ConfigError"
    tiered.wait()
    trainer.args.max_steps = 5
    trainer.train(resume_from_checkpoint=tiered.resolve())
    assert trainer.state.global_step == 5

    # One that fails leaves nothing changed for the next, and nothing that holds up the end of the process.
    stock, meant = trainer._save_optimizer_and_scheduler, trainer.args.output_dir

    def fail(output_dir: str) -> None:
        raise ZeroDivisionError(output_dir)

    trainer._save_optimizer_and_scheduler = fail
    trainer.args.max_steps = 7
    with pytest.raises(ZeroDivisionError, match="staging"):
        trainer.train(resume_from_checkpoint=tiered.resolve())
    trainer._save_optimizer_and_scheduler = stock
    trainer.train(resume_from_checkpoint=tiered.resolve())
    assert (trainer.args.output_dir, trainer.state.global_step) == (meant, 7)
    trainer.add_callback(hf_job.Cut(tiered, 8, "raise"))
    trainer.args.max_steps = 9
    with pytest.raises(ZeroDivisionError, match="cut"):
        trainer.train(resume_from_checkpoint=tiered.resolve())
    begun = time.monotonic()
    atexit._run_exitfuncs()  # as the interpreter does; a rank of these tests ends without
    assert time.monotonic() - begun < 10


def test_trainings_one_after_the_other(tmp_path: Path, memory_dir: Path) -> None:
    run(0, twice, tmp_path, recipe(tmp_path, memory_dir, memory=EACH, disk=NEVER))
    assert max(steps(memory_dir)) == 8
    assert listed(tmp_path) == set()


def heard(rank: int, root: Path, which: Any, bound: bool) -> tuple[list[Any], list[Any]]:
    from tests.accelerate import hf_job

    class Tracker(hf_job.TrainerCallback):
        told: list[Any]

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.told = [*getattr(self, "told", []), {**logs, "step": state.global_step}]

    tracker = Tracker()
    trainer, tiered = made(root, which, tracker, logging_strategy="steps", logging_steps=1)
    if bound:
        tiered.log_with(trainer.log)
    trainer.train()
    return tracker.told, trainer.state.log_history


@pytest.mark.parametrize("bound", [False, True])
def test_figures_are_told(tmp_path: Path, memory_dir: Path, bound: bool) -> None:
    ((told, history),) = run(0, heard, tmp_path, recipe(tmp_path, memory_dir, memory=EACH, disk=END), bound)
    assert len([entry for entry in told if "loss" in entry]) == 5
    figures = [entry for entry in (told if bound else history) if any(name.startswith("sm_tiered/") for name in entry)]
    assert len(figures) == (6 if bound else 1)
    assert [entry["sm_tiered/memory_step"] for entry in figures if "sm_tiered/memory_step" in entry][-1] == 5
    (durable,) = [entry for entry in figures if "sm_tiered/durable_step" in entry]
    assert (durable["sm_tiered/durable_step"], durable["sm_tiered/drain_lag_steps"]) == (5, 0)
    assert bound or "train_runtime" in history[-1]
    assert not bound or not any(name.startswith("sm_tiered/") for name in told[0])


def refused(rank: int, root: Path, which: Any) -> list[tuple[str, str]]:
    from transformers import TrainerState

    from tests.accelerate import hf_job

    found = [raised(made(root, which, save_only_model=True)[0].train)]
    trainer, tiered = made(root, which)
    state = TrainerState(is_hyper_param_search=True)
    found.append(raised(lambda: tiered.on_train_begin(trainer.args, state, trainer.control)))
    trainer.train()
    trainer, tiered = made(root, which)
    tiered.resolve()
    found.append(raised(trainer.train))
    trainer, tiered = made(root, which)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    found.append(("warned", " ".join(str(one.message) for one in caught)))
    os.environ["WORLD_SIZE"] = "2"
    found.append(raised(hf_job.TieredTrainerCallback(which).resolve))
    return found


def test_what_can_not_be_served_is_refused(tmp_path: Path, memory_dir: Path) -> None:
    (found,) = run(0, refused, tmp_path, recipe(tmp_path, memory_dir, memory=EACH, disk=NEVER))
    kinds, texts = zip(*found, strict=True)
    assert kinds == ("ConfigError", "ConfigError", "ConfigError", "warned", "ConfigError")
    for text, words in zip(
        texts,
        (
            "save_only_model is True",
            "hyperparameter_search",
            "resolve() returned checkpoint-5, and this training begins at step 0",
            "step 5 of an earlier one can be restored",
            "WORLD_SIZE is 2",
        ),
        strict=True,
    ):
        assert words in text


def waiting_for_metrics(rank: int, root: Path, which: Any) -> tuple[str, str]:
    return raised(made(root, which)[0].train)


def test_a_policy_that_waits_for_an_evaluation_is_refused(tmp_path: Path, memory_dir: Path) -> None:
    better = {"when_improved": {"metric": "eval_loss", "mode": "min"}}
    which = recipe(tmp_path, memory_dir, memory=EACH, disk={"save": better})
    (found,) = run(0, waiting_for_metrics, tmp_path, which)
    assert found[0] == "ConfigError"
    assert "when_improved can't be served" in found[1]


def other(rank: int, root: Path, which: Any) -> tuple[str, str]:
    from sm_tiered_dcp.files import BytesFile, FileSet
    from sm_tiered_dcp.tiered_files import TieredFiles

    with TieredFiles.from_recipe(which) as files:
        files.save(3, lambda step: FileSet(shared={"model.safetensors": BytesFile(b"x")}), ["memory"]).wait("memory")
    return raised(made(root, which)[1].resolve)


def test_the_checkpoint_of_another_program_is_refused(tmp_path: Path, memory_dir: Path) -> None:
    ((kind, text),) = run(0, other, tmp_path, recipe(tmp_path, memory_dir))
    assert kind == "MismatchError"
    assert "the Trainer did not write this checkpoint: it has no trainer_state.json" in text
