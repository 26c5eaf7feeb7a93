"""States load whole or not at all."""

import copy
import io

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.errors import CheckpointError


def make(density=0.3, seed=0):
    torch.manual_seed(seed)
    return sparsefx.sparsify(dense(seed), density, seed=seed)


def dense(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 5))


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(state, model):
    return all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_state_dict_is_the_originals_plus_masks():
    assert set(make().state_dict()) == {*dense().state_dict(), "0.weight_mask", "3.weight_mask"}


def test_round_trip_through_weights_only():
    model, other = make(seed=1), make(seed=2)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "scheduler": model.scheduler.state_dict()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    other.load_state_dict(loaded["model"])
    other.scheduler.load_state_dict(loaded["scheduler"])
    assert same(snapshot(model), other)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(model.eval()(x), other.eval()(x))


def test_whole_model_round_trip():
    model = make().eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert isinstance(other, nn.Sequential)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(model(x), other(x))
    assert str(sparsefx.summary(other))
    assert other.scheduler.layers["0.weight"] is other[0]


@pytest.mark.parametrize("masks", ["keep", "magnitude"])
def test_a_dense_checkpoint_loads(masks):
    model, source = make(), dense(seed=5)
    before = {k: v.clone() for k, v in sparsefx.masks(model).items()}
    sparsefx.load_dense(model, source.state_dict(), masks=masks)
    for name, mask in sparsefx.masks(model).items():
        weight = source.state_dict()[name]
        assert torch.equal(model.state_dict()[name], weight * mask)
        assert int(mask.sum()) == int(before[name].sum())
        if masks == "keep":
            assert torch.equal(mask, before[name])
        else:
            assert weight[mask].abs().min() >= weight[~mask].abs().max()


def broken(kind):
    state = make().state_dict()
    if kind == "shape":
        state["3.bias"] = torch.zeros(6)
    elif kind == "missing":
        del state["0.bias"]
    elif kind == "unexpected":
        state["4.weight"] = torch.zeros(1)
    elif kind == "one mask":
        del state["0.weight_mask"]
    elif kind == "mask type":
        state["0.weight_mask"] = state["0.weight_mask"].float()
    elif kind == "density":
        state = make(0.5).state_dict()
    return state


@pytest.mark.parametrize("kind", ["shape", "missing", "unexpected", "one mask", "mask type", "density"])
def test_a_state_that_does_not_fit_writes_nothing(kind):
    model = make(seed=1)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="expected"):
        model.load_state_dict(broken(kind))
    assert same(before, model)


def test_another_density_is_named():
    with pytest.raises(CheckpointError, match="density 0.5"):
        make().load_state_dict(make(0.5).state_dict())


def test_strict_false_takes_part_of_a_state():
    model = make(seed=1)
    state = {"3.bias": torch.full((5,), 7.0), "other": torch.zeros(1)}
    model.load_state_dict(state, strict=False)
    assert (model[3].bias == 7).all()


def test_deepcopy_carries_its_own_scheduler():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.scheduler.attach(optimizer, steps_per_update=2, total_steps=10)
    other = copy.deepcopy(model)
    assert other.scheduler is not model.scheduler
    assert not other.scheduler.attached
    assert other.scheduler.layers["0.weight"] is other[0]
    assert model.scheduler.layers["0.weight"] is model[0]
    second = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    other.scheduler.attach(second, steps_per_update=2, total_steps=10)
    for _ in range(3):
        other(torch.randn(2, 3, 6, 6)).square().sum().backward()
        second.step()
        second.zero_grad()
    assert len(other.scheduler.history) == 1
    assert model.scheduler.history == []
