"""Contract 4: plans follow the masks however these were written, for every backend."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import sparsefx
from sparsefx import specialize
from tests.masked_dense import batches, net

BACKENDS = ("dense", "compaction", "sparse")


def sparse(seed: int) -> nn.Module:
    """At this density every layer has empty channels, so that all backends are candidates."""
    return sparsefx.sparsify(net(torch.float32), 0.03, seed=seed)


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batches(1, torch.float32)[0][0])


def by_load(model: nn.Module, other: nn.Module) -> nn.Module:
    model.load_state_dict(other.state_dict())
    return model


def by_assigning_load(model: nn.Module, other: nn.Module) -> nn.Module:
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    return model


@torch.no_grad()
def by_copy(model: nn.Module, other: nn.Module) -> nn.Module:
    for name, value in model.state_dict().items():
        value.copy_(other.state_dict()[name])
    return model


def by_data(model: nn.Module, other: nn.Module) -> nn.Module:
    """As a broadcast of buffers writes them: no version counter moves."""
    for ours, theirs in zip(
        [*model.parameters(), *model.buffers()], [*other.parameters(), *other.buffers()], strict=True
    ):
        ours.data.copy_(theirs.data)
    return model


def by_deepcopy(model: nn.Module, other: nn.Module) -> nn.Module:
    return by_data(copy.deepcopy(model), other)


def by_pickle(model: nn.Module, other: nn.Module) -> nn.Module:
    return by_load(pickle.loads(pickle.dumps(model)), other)


def by_average(model: nn.Module, other: nn.Module) -> nn.Module:
    """An average that took one model is that model; its first update copies without gradients."""
    averaged = AveragedModel(model, use_buffers=True)
    output(averaged)
    averaged.update_parameters(other)
    return averaged.module


def by_wrapping(model: nn.Module, other: nn.Module) -> nn.Module:
    return nn.Sequential(by_data(model, other))


WAYS: list[Callable[[nn.Module, nn.Module], nn.Module]] = [
    by_load,
    by_assigning_load,
    by_copy,
    by_data,
    by_deepcopy,
    by_pickle,
    by_average,
    by_wrapping,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_written_from_outside_is_the_one_that_runs(
    backend: str, way: Callable[[nn.Module, nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"dense": 0, "compaction": 1, "sparse": -1}[backend]
    monkeypatch.setattr(
        specialize, "interleaved", lambda calls, device: [float(call is not calls[place]) for call in calls]
    )
    model, other = sparse(seed=1), sparse(seed=2)
    for _ in range(2):
        before = output(model)
    dense = net(torch.float32)
    dense.load_state_dict({name: value for name, value in other.state_dict().items() if "mask" not in name})
    expected = output(dense)
    assert not torch.allclose(before, expected, rtol=1e-3)
    changed = way(model, other)
    for _ in range(2):
        torch.testing.assert_close(output(changed), expected, rtol=1e-5, atol=1e-6)
