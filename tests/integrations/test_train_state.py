"""Model, optimizer and scheduler as one object: training goes on bit for bit, in one process."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from sm_tiered.errors import MismatchError, StructureError
from sm_tiered_dcp.state import RngState, TrainState
from sm_tiered_dcp.target import Stored, Target
from sm_tiered_dcp.tree import flatten

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # spinning threads of several tests on a few cores cost more than the work
    yield
    torch.set_num_threads(threads)


class Tied(nn.Module):
    """A small language model whose embedding is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(tokens)))


class Run:
    """One process's training objects."""

    def __init__(self, make: Callable[[Any], Optimizer], seed: int, wrap: Callable[[Any], Any] = lambda m: m) -> None:
        torch.manual_seed(seed)
        self.model = wrap(Tied())
        self.optimizer = make(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)
        self.train_state = TrainState(self.model, self.optimizer, self.scheduler)
        self.state: dict[str, Any] = {
            "train": self.train_state,
            "step": 0,
            "per_rank": {"rng": RngState(), "losses": []},
        }

    def train(self, steps: int) -> None:
        for _ in range(steps):
            tokens = torch.randint(0, 11, (5,))
            loss = nn.functional.cross_entropy(self.model(tokens), tokens.flip(0))
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.state["step"] += 1
            self.state["per_rank"]["losses"].append(loss.item())


def snapshot(state: dict[str, Any]) -> tuple[dict[str, Stored], dict[str, Any], dict[str, Any]]:
    """What a storage keeps of a state: clones."""
    flat = flatten(state, rank=0)
    tensors, values = {**flat.tensors, **flat.per_rank_tensors}, {**flat.values, **flat.per_rank_values}
    stored = {name: Stored(path=leaf.path, is_tensor=True) for name, leaf in tensors.items()}
    stored |= {name: Stored(path=leaf.path, is_tensor=False) for name, leaf in values.items()}
    with torch.no_grad():
        return (
            stored,
            {name: leaf.value.detach().clone() for name, leaf in tensors.items()},
            {name: copy.deepcopy(leaf.value) for name, leaf in values.items()},
        )


def fill(state: dict[str, Any], saved: tuple[dict[str, Stored], dict[str, Any], dict[str, Any]]) -> None:
    stored, tensors, values = saved
    target = Target(state)
    target.open(stored, stored_rank=0)
    target.check_names()
    for name, tensor in target.tensors.items():
        target.check(name, tensors[name].size(), tensors[name].dtype)
        tensor.copy_(tensors[name])
    target.assign_values({name: copy.deepcopy(values[name]) for name in target.wanted_values})
    target.finish()


def bits(value: Any) -> Any:
    """Something that is equal only for equal bits."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), bytes(value.detach().contiguous().view(-1).view(torch.uint8).tolist()))
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    return [bits(entry) for entry in value] if isinstance(value, (list, tuple)) else repr(value)


def everything(run: Run) -> Any:
    parts = (run.model.state_dict(), run.optimizer.state_dict(), run.scheduler.state_dict(), run.state["step"])
    return bits([*parts, run.state["per_rank"]["losses"], RngState().state_dict()])


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "adam-l2-amsgrad": lambda params: torch.optim.Adam(params, lr=0.1, weight_decay=0.1, amsgrad=True, foreach=False),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "adamw-tensor-lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.1), foreach=False),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "sgd-momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.1),
    "rprop": lambda params: torch.optim.Rprop(params, lr=0.1),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "groups": lambda params: _in_groups(list(params)),
}


def _in_groups(params: list[nn.Parameter]) -> Optimizer:
    groups = [{"params": params[:2], "lr": 0.1, "weight_decay": 0.0}, {"params": params[2:], "betas": (0.8, 0.9)}]
    return torch.optim.AdamW(groups, lr=0.01)


@pytest.mark.parametrize(
    ("name", "warm"), [*((name, False) for name in OPTIMIZERS), ("adam", True), ("sgd-momentum", True)]
)
def test_training_goes_on_bit_for_bit(name: str, warm: bool) -> None:
    run = Run(OPTIMIZERS[name], seed=1)
    run.train(3)
    saved = snapshot(run.state)
    run.train(3)
    other = Run(OPTIMIZERS[name], seed=2)
    if warm:  # a roll-back into objects that have gone on
        other.train(2)
    fill(other.state, saved)
    other.train(3)
    assert everything(other) == everything(run)


@pytest.mark.parametrize("name", ["adam", "sgd-momentum", "adafactor"])
def test_trap_a_a_save_before_the_first_step_creates_no_state(name: str) -> None:
    untouched = Run(OPTIMIZERS[name], seed=1)
    untouched.train(3)
    expected = everything(untouched)
    run = Run(OPTIMIZERS[name], seed=1)
    saved = snapshot(run.state)
    assert not run.optimizer.state
    run.train(3)
    assert everything(run) == expected
    for steps in (0, 2):  # fresh objects, and ones that have gone on
        other = Run(OPTIMIZERS[name], seed=2)
        other.train(steps)
        fill(other.state, saved)
        assert not other.optimizer.state
        other.train(3)
        assert everything(other) == expected


def test_trap_a_a_restore_that_fails_leaves_the_optimizer_without_state() -> None:
    run = Run(OPTIMIZERS["adam"], seed=1)
    run.train(3)
    stored, _, _ = snapshot(run.state)
    untouched = Run(OPTIMIZERS["adam"], seed=2)
    untouched.train(3)
    expected = everything(untouched)
    other = Run(OPTIMIZERS["adam"], seed=2)
    before = everything(other)
    Target(other.state).open(stored, stored_rank=0)  # and then, say, the bytes turn out to be damaged
    assert not other.optimizer.state
    assert everything(other) == before
    assert "train.optimizer.state" in flatten(other.state, rank=0).values  # a save now has no state either
    other.train(3)
    assert everything(other) == expected


def test_a_checkpoint_of_stock_dcp_that_has_no_optimizer_state_restores() -> None:
    run, other = Run(OPTIMIZERS["adamw-tensor-lr"], seed=1), Run(OPTIMIZERS["adamw-tensor-lr"], seed=2)
    other.train(1)
    stored, tensors, values = snapshot(run.state)
    del stored["train.optimizer.state"], values["train.optimizer.state"]  # stock DCP drops an empty dict
    fill(other.state, (stored, tensors, values))
    assert not other.optimizer.state


def test_to_create_state_leaves_no_trace() -> None:
    calls: list[str] = []
    run = Run(OPTIMIZERS["adam-l2-amsgrad"], seed=1)
    run.train(1)
    stored, _, _ = snapshot(run.state)
    other = Run(OPTIMIZERS["adam-l2-amsgrad"], seed=2)
    other.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    other.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    with torch.no_grad():
        other.model.head.weight[0] = torch.tensor([-0.0, 0.0, torch.inf, torch.nan, -torch.inf, 1e-45, 3e38, -1.0])
    grads = [torch.full_like(param, 0.5) for param in other.model.parameters()]
    for param, grad in zip(other.model.parameters(), grads, strict=True):
        param.grad = grad if param.requires_grad else None
    before, scheduled = everything(other), copy.deepcopy(other.scheduler.__dict__.get("_step_count"))
    made = other.train_state.state_dict_for([name.removeprefix("train.") for name in stored])
    assert set(made["optimizer"]["state"]) == {
        "embedding.weight",
        "body.0.weight",
        "body.0.bias",
        "body.2.weight",
        "body.2.bias",
    }
    assert everything(other) == before
    assert not other.optimizer.state
    assert calls == []
    assert other.scheduler._step_count == scheduled
    assert not getattr(other.optimizer, "_opt_called", False)  # by which the scheduler knows that training has begun
    assert all(
        param.grad is (grad if param.requires_grad else None)
        for param, grad in zip(other.model.parameters(), grads, strict=True)
    )
    other.train(1)
    assert calls == ["pre", "post"]


def test_state_that_the_checkpoint_lacks_is_dropped() -> None:
    run = Run(OPTIMIZERS["adam"], seed=1)
    run.train(2)
    saved = snapshot(run.state)
    other = Run(OPTIMIZERS["adam"], seed=2)
    (other.model.unused(torch.ones(3)).sum() + other.model(torch.ones(4, dtype=torch.long)).sum()).backward()
    other.optimizer.step()
    assert other.model.unused.weight in other.optimizer.state
    fill(other.state, saved)
    assert other.model.unused.weight not in other.optimizer.state
    assert everything(other)[1] == everything(run)[1]


class _Digits(Optimizer):
    """Keeps more digits than its parameters have, and settings that are no numbers."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "names": ["a", ("b", None)], "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    if not state:
                        state.update(sum=torch.zeros_like(param, dtype=torch.float64), n=0, nested={"log": [0, 0]})
                    state["sum"] += param.grad.double() / 3
                    state["n"] += 1
                    state["nested"]["log"].append(state["n"])
                    param.sub_(state["sum"].to(param.dtype), alpha=group["lr"])


def test_state_with_more_digits_than_the_parameters_keeps_them() -> None:
    run = Run(_Digits, seed=1)
    run.train(3)
    saved = snapshot(run.state)
    run.train(2)
    other = Run(_Digits, seed=2)
    fill(other.state, saved)
    other.train(2)
    assert everything(other) == everything(run)
    assert other.optimizer.state[other.model.head.weight]["sum"].dtype == torch.float64


def test_an_optimizer_that_can_not_step_by_itself_says_so() -> None:
    run = Run(lambda params: torch.optim.LBFGS([p for p in params if p.requires_grad]), seed=1)
    loss = lambda: (run.optimizer.zero_grad(), loss_of(run))[1]  # noqa: E731

    def loss_of(run: Run) -> torch.Tensor:
        value = run.model.unused(torch.ones(3)).sum()
        value.backward()
        return value

    cast("Any", run.optimizer).step(loss)
    stored, _, _ = snapshot({"train": TrainState(run.model, run.optimizer)})
    fresh = Run(lambda params: torch.optim.LBFGS([p for p in params if p.requires_grad]), seed=1)
    target = Target({"train": TrainState(fresh.model, fresh.optimizer)})
    with pytest.raises(MismatchError, match="LBFGS can't create its state.*Make one step"):
        target.open(stored)


def _same_structure(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same_structure(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same_structure, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize(
    ("name", "wrap"),
    [("adam", "plain"), ("sgd-momentum", "plain"), ("groups", "plain"), ("adagrad", "plain")]
    + [("groups", "compiled"), ("adam", "inner"), ("adam", "module")],
)
def test_the_structure_is_that_of_dcp(name: str, wrap: str) -> None:
    def compiled_inside(model: Any) -> Any:
        model.body[0] = torch.compile(model.body[0], backend="eager")
        return model

    def in_module(model: Any) -> Any:
        outer = nn.Module()
        outer.module = model
        outer.forward = model.forward
        return outer

    wraps = {
        "plain": lambda model: model,
        "compiled": lambda model: torch.compile(model, backend="eager"),
        "inner": compiled_inside,
        "module": in_module,
    }
    run = Run(OPTIMIZERS[name], 1, wraps[wrap])
    run.train(2)
    for _ in range(2):  # the second time with the names known
        ours = run.train_state.state_dict()
        model, optimizer = get_state_dict(run.model, run.optimizer)
        assert _same_structure(
            {"model": model, "optimizer": optimizer}, {key: ours[key] for key in ("model", "optimizer")}
        )
        run.train(1)


def test_several_optimizers_are_stored_as_one_and_may_be_regrouped() -> None:
    def make(model: Tied, split: bool) -> list[Optimizer]:
        one, two = list(model.embedding.parameters()), list(model.body.parameters())
        if split:
            return [torch.optim.Adam(one, lr=0.1), torch.optim.Adam(two, lr=0.2)]
        return [torch.optim.Adam([{"params": two, "lr": 0.9}, {"params": one}], lr=0.8)]

    models = [Tied(), Tied()]
    optimizers = [make(model, split) for model, split in zip(models, (True, False), strict=True)]
    models[0](torch.arange(4)).sum().backward()
    for optimizer in optimizers[0]:
        optimizer.step()
    fill({"t": TrainState(models[1], optimizers[1])}, snapshot({"t": TrainState(models[0], optimizers[0])}))
    merged = optimizers[1][0]
    assert [group["lr"] for group in merged.param_groups] == [0.2, 0.1]
    for name, param in models[0].body.named_parameters():
        there = models[1].body.get_parameter(name)
        assert bits(optimizers[0][1].state[param]) == bits(merged.state[there])
    joined = [torch.optim.Adam([*models[1].embedding.parameters(), *models[1].body.parameters()])]
    with pytest.raises(MismatchError, match="saved with different settings"):
        fill({"t": TrainState(models[1], joined)}, snapshot({"t": TrainState(models[0], optimizers[0])}))


def test_two_optimizers_with_state_for_one_parameter_are_refused() -> None:
    model = nn.Linear(2, 1)
    optimizers = [torch.optim.Adam(model.parameters()), torch.optim.Adam(model.parameters())]
    model(torch.ones(2)).backward()
    for optimizer in optimizers:
        optimizer.step()
    with pytest.raises(StructureError, match="two optimizers have state for 'weight'"):
        TrainState(model, optimizers).state_dict()


def test_a_parameter_that_the_model_does_not_have_is_refused() -> None:
    model = nn.Linear(2, 1)
    state = TrainState(model, torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(7))]))
    with pytest.raises(StructureError, match=r"shape \(7,\) that is not in the model"):
        state.state_dict()
    with pytest.raises(StructureError, match="epoch is a int without state_dict"):
        TrainState(model, None, None, epoch=3)


def test_parameters_that_are_replaced_are_the_ones_that_are_saved() -> None:
    run = Run(OPTIMIZERS["sgd"], seed=1)
    run.train_state.state_dict()
    run.model.unused.weight = nn.Parameter(torch.full((3, 3), 5.0))
    run.model.extra = nn.Linear(1, 1)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    state = TrainState(run.model, run.optimizer).state_dict()
    run.model.unused.weight.data = torch.full((3, 3), 6.0)
    assert state["model"]["unused.weight"].data_ptr() == run.model.unused.weight.data_ptr()
    assert "extra.weight" in state["model"]
    assert "extra.weight" in state["optimizer"]["param_groups"][0]["params"]


def test_hooks_and_extra_state_of_a_module_are_not_passed_over() -> None:
    class Extra(nn.Linear):
        count = 0

        def get_extra_state(self) -> Any:
            return {"count": self.count}

        def set_extra_state(self, state: Any) -> None:
            self.count = state["count"]

    saved, fresh = Extra(2, 1), Extra(2, 1)
    saved.count = 5
    called: list[str] = []
    plain, hooked = nn.Linear(2, 1), nn.Linear(2, 1)
    hooked.register_load_state_dict_post_hook(lambda *_: called.append("post"))
    fill({"t": TrainState(fresh)}, snapshot({"t": TrainState(saved)}))
    assert fresh.count == 5
    assert torch.equal(fresh.weight, saved.weight)
    fill({"t": TrainState(hooked)}, snapshot({"t": TrainState(plain)}))
    assert called == ["post"]
    assert torch.equal(hooked.weight, plain.weight)


def test_a_state_dict_from_elsewhere_is_copied_into_the_objects() -> None:
    run, other = Run(OPTIMIZERS["adam"], seed=1), Run(OPTIMIZERS["adam"], seed=2)
    run.train(2)
    other.train_state.load_state_dict(copy.deepcopy(run.train_state.state_dict()))
    assert everything(other)[:3] == everything(run)[:3]
    pointers = {param.data_ptr() for param in run.model.parameters()}
    assert not pointers & {param.data_ptr() for param in other.model.parameters()}


def test_other_objects_come_along() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    first, second = TrainState(model, None, None, ema=copy.deepcopy(model)), TrainState(other, ema=copy.deepcopy(other))
    fill({"t": second}, snapshot({"t": first}))
    assert bits(second.state_dict()) == bits(first.state_dict())
    assert set(first.state_dict()) == {"model", "ema"}


def test_stock_dcp_saves_it_and_loads_it_into_fresh_objects(tmp_path: Any) -> None:
    run = Run(OPTIMIZERS["adamw"], seed=1)
    run.train(3)
    dcp_save({"train": run.train_state}, checkpoint_id=tmp_path)
    other = Run(OPTIMIZERS["adamw"], seed=2)
    stored = FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    names = [name.removeprefix("train.") for name in stored]
    dcp_load({"train": other.train_state.loading(names)}, checkpoint_id=tmp_path)
    assert everything(other)[:3] == everything(run)[:3]
    whole = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(whole.parameters())
    whole(torch.ones(2)).backward()
    optimizer.step()
    dcp_save({"train": TrainState(whole, optimizer)}, checkpoint_id=tmp_path / "whole")
    fresh = nn.Linear(2, 1)
    fresh_optimizer = torch.optim.Adam(fresh.parameters())
    dcp_load({"train": TrainState(fresh, fresh_optimizer).loading()}, checkpoint_id=tmp_path / "whole")
    assert bits(fresh_optimizer.state_dict()) == bits(optimizer.state_dict())


def test_random_numbers_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.random(), np.random.normal(), torch.rand(()).item()]

    draw()
    np.random.normal()
    saved = snapshot({"rng": RngState()})
    assert not saved[1]
    first = draw()
    draw()
    fill({"rng": RngState()}, saved)
    assert draw() == first


def test_the_random_state_loads_without_a_pickle_being_executed(tmp_path: Any) -> None:
    torch.save(RngState().state_dict(), tmp_path / "rng")
    loaded = torch.load(tmp_path / "rng", weights_only=True)
    first = torch.rand(3)
    RngState().load_state_dict(loaded)
    assert torch.equal(torch.rand(3), first)
