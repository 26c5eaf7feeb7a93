"""The paper's networks have the published sizes, trace whole, and keep shapes on the way."""

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.models import VGG16, AlexNet, LeNet5Caffe, LeNet300, WideResNet

PUBLISHED = {  # millions of parameters: Lee et al. 2019, Table 2; Zagoruyko & Komodakis 2016, Table 4
    "AlexNet-s": (lambda: AlexNet("s"), 5.1),
    "AlexNet-b": (lambda: AlexNet("b"), 8.5),
    "VGG16-C": (lambda: VGG16("C"), 10.5),
    "VGG16-D": (lambda: VGG16("D"), 15.2),
    "VGG16-like": (lambda: VGG16("like"), 15.0),
    "WRN-16-8": (lambda: WideResNet(16, 8), 11.0),
    "WRN-16-10": (lambda: WideResNet(16, 10), 17.1),
    "WRN-22-8": (lambda: WideResNet(22, 8), 17.2),
    "WRN-28-2": (lambda: WideResNet(28, 2), 1.5),
    "WRN-28-10": (lambda: WideResNet(28, 10), 36.5),
}


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_number(name: str) -> None:
    make, millions = PUBLISHED[name]
    with torch.device("meta"):
        model = make()
        norms = sum(size(m) for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)))
        counted = size(model) if name.startswith("WRN") else size(model) - norms  # Lee et al. count no BatchNorm
        assert round(counted / 1e6, 1) == millions
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)


def test_lenets_have_the_papers_parameters() -> None:
    assert size(LeNet300()) == 266_610
    assert size(LeNet5Caffe()) == 431_080


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: VGG16("C"), (2, 3, 32, 32)),
        (lambda: AlexNet("s"), (2, 3, 32, 32)),
        (lambda: WideResNet(10, 2), (2, 3, 16, 16)),
        (lambda: WideResNet(10, 1, dropout=0.3), (2, 3, 8, 8)),
        (LeNet5Caffe, (2, 1, 28, 28)),
    ],
)
def test_it_traces_whole(make, shape) -> None:
    model = sparsefx.sparsify(make(), 1.0)  # no kernel is measured
    x = torch.randn(shape)
    for mode in (False, True):
        model.train(mode)(x)
        assert model.graph is not None
    assert "own forward" not in {row.status for row in sparsefx.summary(model).rows}


def test_dropout_is_drawn_in_training_only() -> None:
    model = WideResNet(10, 1, dropout=0.3)
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("make", [lambda: VGG16("E"), lambda: AlexNet("m"), lambda: WideResNet(17, 2)])
def test_unknown_variant_raises(make) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()
