"""Contract 6 at an update: what the window forgets, what pruned and grown weights keep, when there is an update."""

import copy
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import sparsefx
from sparsefx.errors import SchedulerError, UpdateWarning
from tests import oracle
from tests.masked_dense import (
    MOMENTUM,
    OPTIMIZERS,
    MakeOptimizer,
    MaskedDense,
    assert_equal_state,
    assert_moment,
    assert_same,
    assert_zero_missing,
    batches,
    first_moment,
    net,
    pair,
    train_step,
)

pytestmark = pytest.mark.usefixtures("either_graph")


class Recorder:
    """A `grow` rule that notes the first moments it is shown, and grows like "momentum"."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, score: Tensor, mask: Tensor, k: int) -> Tensor:
        self.seen.append(score.clone())
        order = score.abs().masked_fill(mask, -1).argsort(descending=True, stable=True)
        grown = mask.clone()
        grown[order[:k]] = True
        return grown


@pytest.mark.parametrize(
    ("make_optimizer", "window"), [(MOMENTUM, 44), (partial(Adam, lr=1e-3, betas=(0.8, 0.99)), 21)]
)
def test_windowed_moment_is_within_a_hundredth_of_what_always_had_at_window_start(
    make_optimizer: MakeOptimizer, window: int
) -> None:
    assert 0.9**44 < 0.01 < 0.9**43
    assert 0.8**21 < 0.01 < 0.8**20
    steps = 60
    recorded = {}
    at_start: list[float] = []
    for kind in ("always", "auto"):
        recorded[kind] = Recorder()
        model, optimizer, _ = pair(
            make_optimizer,
            kind,
            steps_per_update=steps,
            total_steps=10 * steps,
            redistribute="none",
            grow=recorded[kind],
        )
        for step, batch in enumerate(batches(steps), 1):
            train_step(model, optimizer, batch)
            if kind == "always" and step == steps - window:
                weights = [model.get_parameter(name) for name in sparsefx.masks(model)]
                at_start = [float(torch.linalg.vector_norm(first_moment(optimizer, w))) for w in weights]
    for always, windowed, start in zip(recorded["always"].seen, recorded["auto"].seen, at_start, strict=True):
        difference = float(torch.linalg.vector_norm(always - windowed))
        assert 0 < difference <= 0.01 * start


def test_always_never_forgets_across_updates() -> None:
    """The moment that an update sees is that of every dense gradient since the start."""
    recorder = Recorder()
    model, optimizer, reference = pair(steps_per_update=4, total_steps=100, redistribute="none", grow=recorder)
    for step, batch in enumerate(batches(12), 1):
        train_step(model, optimizer, batch)
        reference.backward(batch)
        reference.step()
        if step % 4 == 0:
            for (name, mask), seen in zip(reference.masks.items(), recorder.seen[-4:], strict=True):
                assert_moment(name, seen.view(mask.shape), reference.moment(name), mask)
            adopt_(reference, model, optimizer)
    assert len(recorder.seen) == 12
    assert_same(model, optimizer, reference)


@pytest.mark.parametrize("window", ["always", "auto"])
def test_pruned_weights_lose_their_moment_and_grown_ones_keep_what_was_collected(window: str) -> None:
    recorder = Recorder()
    model, optimizer, _ = pair(
        partial(SGD, lr=0.05, momentum=0.5),
        window,
        steps_per_update=8,
        total_steps=100,
        redistribute="none",
        grow=recorder,
    )
    before = {name: mask.clone() for name, mask in sparsefx.masks(model).items()}
    for batch in batches(8):
        train_step(model, optimizer, batch)
    for (name, mask), seen in zip(sparsefx.masks(model).items(), recorder.seen, strict=True):
        moment = first_moment(optimizer, model.get_parameter(name))
        seen = seen.view(mask.shape)
        assert (mask & ~before[name]).any()
        assert (~mask & before[name]).any()
        assert torch.equal(moment[mask], seen[mask])
        assert seen[mask & ~before[name]].all()
        assert torch.equal(moment[~mask], seen[~mask] if window == "always" else torch.zeros_like(seen[~mask]))
    assert_zero_missing(model)


@pytest.mark.parametrize("window", ["always", "auto"])
@pytest.mark.parametrize("name", ["sgd", "dampening", "adam", "adamw-fused"])
def test_the_first_automatic_updates_are_those_of_algorithm_1_on_dense_moments(name: str, window: str) -> None:
    """End to end with the oracle: the reference's own moments decide the masks, for three updates in a row."""
    model, optimizer, reference = pair(OPTIMIZERS[name], window, steps_per_update=5, total_steps=100)
    target = sum(int(mask.sum()) for mask in reference.masks.values())
    for step, batch in enumerate(batches(15), 1):
        reference.backward(batch)
        reference.step()
        layers = [layer_of(reference, weight) for weight in reference.masks]
        train_step(model, optimizer, batch)
        if step % 5 == 0:
            rate = oracle.prune_rate_at("cosine", 0.5, step, 100)
            expected = oracle.update(layers, rate, target)
            for (weight, mask), wanted in zip(sparsefx.masks(model).items(), expected.masks, strict=True):
                np.testing.assert_array_equal(mask.numpy(), wanted, err_msg=f"step {step}: {weight}")
            adopt_(reference, model, optimizer, forget=window == "auto")
    assert len(model.scheduler.history) == 3


def layer_of(reference: MaskedDense, name: str) -> oracle.Layer:
    weight = reference.model.get_parameter(name)
    state = reference.optimizer.state[weight]
    scaled = None
    if "exp_avg_sq" in state:
        eps = reference.optimizer.param_groups[0]["eps"]
        scaled = (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + eps)).numpy().copy()
    return oracle.Layer(
        weight.detach().numpy().copy(), reference.masks[name].numpy(), reference.moment(name).numpy().copy(), scaled
    )


@torch.no_grad()
def adopt_(reference: MaskedDense, model: nn.Module, optimizer: Optimizer, forget: bool = False) -> None:
    """Go on from the sparse model's masks: grown weights at zero, with their second moments as it set them.

    With `forget` the first moment of missing weights starts again from zero, as it does unless "always".
    """
    for name, mask in sparsefx.masks(model).items():
        reference.masks[name] = mask.clone()
        ours, weight = model.get_parameter(name), reference.model.get_parameter(name)
        grown = mask & (ours == 0)
        weight.masked_fill_(grown, 0)
        if forget:
            reference.moment(name).masked_fill_(~mask, 0)
        if "exp_avg_sq" in optimizer.state[ours]:
            second = optimizer.state[ours]["exp_avg_sq"]
            reference.optimizer.state[weight]["exp_avg_sq"][grown] = second[grown]
    reference.project_()


@pytest.mark.parametrize("make_optimizer", [partial(Adam, lr=1e-3), partial(AdamW, lr=1e-3, amsgrad=True)])
def test_grown_weights_start_with_the_mean_second_moment_of_their_layer(make_optimizer: MakeOptimizer) -> None:
    model, optimizer, reference = pair(make_optimizer, steps_per_update=6, total_steps=100)
    for batch in batches(6):
        train_step(model, optimizer, batch)
        reference.backward(batch)
        reference.step()
    for name, mask in sparsefx.masks(model).items():
        weight = model.get_parameter(name)
        grown, kept = mask & (weight == 0), mask & (weight != 0)
        second = optimizer.state[model.get_parameter(name)]["exp_avg_sq"]
        expected = reference.optimizer.state[reference.model.get_parameter(name)]["exp_avg_sq"]
        torch.testing.assert_close(second[kept], expected[kept], rtol=1e-9, atol=0)
        assert grown.any()
        torch.testing.assert_close(second[grown], expected[kept].mean().expand(int(grown.sum())), rtol=1e-9, atol=0)


def test_update_without_a_completed_window_raises_and_changes_nothing() -> None:
    model, optimizer, _ = pair(window="auto", steps_per_update=100, total_steps=1000)
    with pytest.raises(SchedulerError, match="attach"):
        sparsefx.sparsify(net(), 0.2).scheduler.update()
    for batch in [None, *batches(60)]:
        if batch is not None:
            train_step(model, optimizer, batch)
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        with pytest.raises(SchedulerError, match="window"):
            model.scheduler.update()
        assert_equal_state(state, (model.state_dict(), optimizer.state_dict()))
    assert model.scheduler.history == []


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize(("total", "updates"), [(12, [5, 10]), (10, [5]), (11, [5, 10])])
def test_prune_rate_falls_to_zero_and_no_update_follows_the_last_step(
    decay: str, total: int, updates: list[int]
) -> None:
    model, optimizer, _ = pair(decay=decay, prune_rate=0.4, steps_per_update=5, total_steps=total)
    for step, batch in enumerate(batches(2 * total)):
        expected = oracle.prune_rate_at(decay, 0.4, min(step, total), total)
        assert math.isclose(model.scheduler.prune_rate, expected, rel_tol=1e-12, abs_tol=1e-15)
        train_step(model, optimizer, batch)
        assert_zero_missing(model)
    rows = model.scheduler.history
    assert [row["step"] for row in rows] == updates
    for row in rows:
        expected = oracle.prune_rate_at(decay, 0.4, row["step"], total)
        assert math.isclose(row["prune_rate"], expected, rel_tol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_moment_skips_the_update_with_one_warning(bad: float) -> None:
    model, optimizer, _ = pair(steps_per_update=4, total_steps=100)
    data = batches(8)
    for batch in data[:3]:
        train_step(model, optimizer, batch)
    weight, mask = model[0].weight, sparsefx.masks(model)["0.weight"]
    at = tuple(mask.nonzero()[0])
    masks = {name: m.clone() for name, m in sparsefx.masks(model).items()}
    first_moment(optimizer, weight)[at] = bad
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_step(model, optimizer, data[3])
    assert [w.category for w in caught] == [UpdateWarning]
    assert "0.weight" in str(caught[0].message)
    assert model.scheduler.history[-1]["skipped"]
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsefx.masks(model).items())
    with torch.no_grad():
        weight[at] = 0.1
        first_moment(optimizer, weight)[at] = 0.0
    for batch in data[4:]:
        train_step(model, optimizer, batch)
    assert model.scheduler.history[-1]["skipped"] is None
    assert any(not torch.equal(mask, masks[name]) for name, mask in sparsefx.masks(model).items())
