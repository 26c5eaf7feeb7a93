"""What `attach` and `load_state_dict` refuse, and runs that are resumed at any step."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import sparsefx
from sparsefx.errors import CheckpointError, SchedulerError
from tests.masked_dense import (
    MOMENTUM,
    OPTIMIZERS,
    assert_equal_state,
    batches,
    net,
    pair,
    train_step,
)


def fresh(name: str, window: Any) -> tuple[nn.Module, Optimizer]:
    """At this density every channel is live, so no backend is chosen by timing."""
    model = net(seed=1)
    sparsefx.sparsify(model, 0.5, scheduler=sparsefx.SparseMomentum(dense_grad_window=window))
    return model, OPTIMIZERS[name](model.parameters())


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in history]


def test_an_optimizer_without_a_first_moment_is_refused_with_help() -> None:
    for optimizer_class, kwargs, match in (
        (SGD, {}, "momentum"),
        (torch.optim.Adagrad, {}, "Adagrad"),
        (torch.optim.RMSprop, {}, "RMSprop"),
    ):
        model = sparsefx.sparsify(net(), 0.2)
        optimizer = optimizer_class(model.parameters(), lr=0.1, **kwargs)
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        with pytest.raises(SchedulerError, match=match):
            model.scheduler.attach(optimizer, steps_per_update=5, total_steps=10)
        assert_equal_state(state, (model.state_dict(), optimizer.state_dict()))
        model.scheduler.attach(MOMENTUM(model.parameters()), steps_per_update=5, total_steps=10)


@pytest.mark.parametrize(
    "mistake",
    ["lacks the weights", "one of two lacks them", "none", "twice", "zero steps", "no total", "above total", "a float"],
)
def test_a_wrong_attach_raises_and_changes_nothing(mistake: str) -> None:
    model = sparsefx.sparsify(net(), 0.2)
    own = MOMENTUM(model.parameters())
    stranger = MOMENTUM(net().parameters())
    schedule: dict[str, Any] = {"steps_per_update": 5, "total_steps": 10}
    given: Any = own
    match mistake:
        case "lacks the weights":
            given = stranger
        case "one of two lacks them":
            given = [own, stranger]
        case "none":
            given = []
        case "twice":
            model.scheduler.attach(own, **schedule)
        case "zero steps":
            schedule["steps_per_update"] = 0
        case "no total":
            schedule["total_steps"] = 0
        case "above total":
            schedule["steps_per_update"] = 11
        case "a float":
            schedule["steps_per_update"] = 2.5
    hooks = len(own._optimizer_step_post_hooks)
    state = copy.deepcopy((model.state_dict(), own.state_dict(), model.scheduler.state_dict()))
    with pytest.raises(SchedulerError):
        model.scheduler.attach(given, **schedule)
    assert_equal_state(state, (model.state_dict(), own.state_dict(), model.scheduler.state_dict()))
    assert len(own._optimizer_step_post_hooks) == hooks
    if mistake != "twice":
        model.scheduler.attach(own, steps_per_update=5, total_steps=10)


@pytest.mark.parametrize("what", ["density", "granularity", "model"])
def test_a_state_of_another_run_is_refused_and_changes_nothing(what: str) -> None:
    model, optimizer, _ = pair(steps_per_update=3, total_steps=20)
    for batch in batches(4):
        train_step(model, optimizer, batch)
    other = net() if what != "model" else nn.Sequential(nn.Flatten(), nn.Linear(108, 7), nn.Linear(7, 5)).double()
    sparsefx.sparsify(
        other, 0.3 if what == "density" else 0.2, granularity=("column", 2) if what == "granularity" else "weight"
    )
    other_optimizer = MOMENTUM(other.parameters())
    other.scheduler.attach(other_optimizer, steps_per_update=3, total_steps=20)
    for batch in batches(4):
        train_step(other, other_optimizer, batch)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), without_times(model.scheduler.history)))
    with pytest.raises(CheckpointError):
        model.scheduler.load_state_dict(other.scheduler.state_dict())
    if what == "model":
        with pytest.raises((CheckpointError, RuntimeError)):
            model.load_state_dict(other.state_dict())
    assert_equal_state(state, (model.state_dict(), optimizer.state_dict(), without_times(model.scheduler.history)))
    assert model.scheduler.step == 4


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize(("name", "window"), [("sgd", 3), ("adam", "always"), ("dampening", "auto")])
def test_a_run_resumed_at_any_step_continues_bit_exactly(name: str, window: Any, attach_first: bool) -> None:
    schedule = {"steps_per_update": 5, "total_steps": 14}
    data = batches(14)
    model, optimizer = fresh(name, window)
    model.scheduler.attach(optimizer, **schedule)
    saved = []
    for batch in data:
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict(), model.scheduler.state_dict()), file)
        saved.append(file)
        train_step(model, optimizer, batch)
    assert [row["step"] for row in model.scheduler.history] == [5, 10]
    for start, file in enumerate(saved):
        if name != "sgd" and start not in (0, 2, 5, 9):
            continue
        file.seek(0)
        of_model, of_optimizer, of_scheduler = torch.load(file, weights_only=True)
        again, optimizer_again = fresh(name, window)
        if attach_first:
            again.scheduler.attach(optimizer_again, **schedule)
        again.load_state_dict(of_model)
        optimizer_again.load_state_dict(of_optimizer)
        if not attach_first:
            again.scheduler.attach(optimizer_again, **schedule)
        again.scheduler.load_state_dict(of_scheduler)
        for batch in data[start:]:
            train_step(again, optimizer_again, batch)
        assert_equal_state(again.state_dict(), model.state_dict())
        assert_equal_state(optimizer_again.state_dict(), optimizer.state_dict())
        assert again.scheduler.step == model.scheduler.step
        assert again.scheduler.prune_rate == model.scheduler.prune_rate
        assert without_times(again.scheduler.history) == without_times(model.scheduler.history)
