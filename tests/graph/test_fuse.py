"""The fuse pass: which operators disappear into BatchNorm and convolution, and which may not."""

import pytest
import torch
from torch import nn

from sparsefx import blocked
from tests.graph.region_nets import NETS, Net, in_regions, pair, relative

__all__ = ["in_regions"]
pytestmark = pytest.mark.usefixtures("in_regions")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def fused(model) -> list[tuple[bool, bool]]:
    """For each BatchNorm of the graph, whether it adds a residual and whether it clamps."""
    norms = [n for n in model.graph.nodes if n.target is blocked.batch_norm]
    return [(n.kwargs.get("residual") is not None, bool(n.kwargs.get("relu"))) for n in norms]


def calls(model) -> list[str]:
    return [n.name for n in model.graph.nodes if n.op in ("call_function", "call_method", "call_module")]


def test_residual_sum_and_relu_join_the_norm():
    model, _ = pair(NETS["resnet"](), X)
    model(X)
    assert sorted(fused(model)) == sorted([(False, True), (False, False), (True, True)] * 2)
    assert not any(name.startswith(("relu", "add", "iadd", "body")) for name in calls(model))


def test_convolution_takes_its_relu():
    model, _ = pair(NETS["densenet"](), X)
    model(X)
    convs = [n for n in model.graph.nodes if n.target is blocked.conv]
    assert [bool(n.kwargs.get("relu")) for n in convs] == [False, True, True, True]


def test_a_value_read_twice_is_not_fused_away():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return torch.relu(y) + y

    model, twin = pair(Net(Branches()), X)
    assert relative(model(X), twin(X.double())) < 1e-5
    assert fused(model) == [(False, False)]


def test_a_norm_added_to_itself_stays():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return y + y

    model, twin = pair(Net(Doubles()), X)
    assert relative(model(X), twin(X.double())) < 1e-5


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_every_kind_of_norm(affine, track):
    model, twin = pair(
        Net(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=affine, track_running_stats=track), nn.ReLU())),
        X,
    )
    for training in (True, True, False):
        for net in (model, twin):
            net.train(training)
        assert relative(model(X), twin(X.double())) < 1e-5
    assert fused(model) == [(False, True)]
