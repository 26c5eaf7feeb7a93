"""Sliced layers and parameters, and the constants they take over."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests.graph.nets import batch_norm, image, kill, shrink, sizes


@pytest.mark.parametrize("bias", [False, True])
def test_dead_outputs_fold_into_the_bias_of_a_pointwise_layer(bias: bool) -> None:
    a = kill(nn.Conv2d(3, 8, 3, padding=1), outs=[1, 5])
    model = nn.Sequential(a, batch_norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=bias))
    small = shrink(model, image())
    assert sizes(small.get_submodule("0")) == (3, 6)
    assert small.get_submodule("1").num_features == 6
    assert sizes(small.get_submodule("3")) == (6, 4)
    assert small.get_submodule("3").bias is not None
    assert small.compact_report["layers"]["0"] == {"in_before": 3, "in_after": 3, "out_before": 8, "out_after": 6}


def test_no_bias_is_made_where_nothing_folds() -> None:
    a, b = kill(nn.Conv2d(3, 8, 3, bias=False), outs=[1, 5]), nn.Conv2d(8, 4, 3, bias=False)
    small = shrink(nn.Sequential(a, nn.ReLU(), b), image())
    assert sizes(small.get_submodule("2")) == (6, 4)
    assert small.get_submodule("2").bias is None


def test_dead_outputs_that_are_zero_go_in_front_of_padding() -> None:
    a, b = kill(nn.Conv2d(3, 8, 3, bias=False), outs=[1, 5]), nn.Conv2d(8, 4, 3, padding=1)
    small = shrink(nn.Sequential(a, nn.ReLU(), b), image())
    assert sizes(small.get_submodule("2")) == (6, 4)


@pytest.mark.parametrize("padding", [1, (0, 2), "same"])
def test_constants_in_front_of_padding_merge_into_one(padding: int | tuple | str) -> None:
    a, b = kill(nn.Conv2d(3, 8, 3), outs=[1, 3, 5]), nn.Conv2d(8, 4, 3, padding=padding)
    small = shrink(nn.Sequential(a, batch_norm(8), nn.Sigmoid(), b), image())
    assert sizes(small.get_submodule("3")) == (6, 4)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_constants_fold_through_padding_that_repeats_them(mode: str) -> None:
    a, b = kill(nn.Conv2d(3, 8, 3), outs=[1, 3, 5]), nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode)
    small = shrink(nn.Sequential(a, nn.Sigmoid(), b), image())
    assert sizes(small.get_submodule("2")) == (5, 4)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups: int) -> None:
    a = kill(nn.ConvTranspose2d(4, 8, 3, stride=2, groups=groups), outs=[0, 1])
    b = kill(nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), ins=[6])
    small = shrink(nn.Sequential(a, nn.Sigmoid(), b, nn.Conv2d(6, 3, 1)), image(4))
    assert sizes(small.get_submodule("0")) == ((4, 6) if groups == 1 else (4, 8))
    assert sizes(small.get_submodule("2")) == ((6, 6) if groups == 1 else (8, 6))


def test_depthwise_channels_go_with_their_input() -> None:
    a = kill(nn.Conv2d(3, 8, 1, bias=False), outs=[0])
    depthwise = kill(nn.Conv2d(8, 16, 3, padding=1, groups=8), outs=[4, 5, 8])
    b = kill(nn.Conv2d(16, 4, 1), ins=[15, 14])
    small = shrink(nn.Sequential(a, nn.ReLU6(), depthwise, batch_norm(16), nn.ReLU6(), b), image())
    kept = small.get_submodule("2")
    assert sizes(small.get_submodule("0")) == (3, 5)
    assert (*sizes(kept), kept.groups) == (5, 10, 5)
    assert sizes(small.get_submodule("5")) == (10, 4)


def test_depthwise_constant_behind_padding_is_no_constant() -> None:
    a = kill(nn.Conv2d(3, 8, 1), outs=[0, 1])
    small = shrink(nn.Sequential(a, nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)), image())
    assert sizes(small.get_submodule("2")) == (8, 8)


def test_groups_go_as_a_whole() -> None:
    a = kill(nn.Conv2d(3, 8, 1), outs=[0, 1, 2])
    grouped = kill(nn.Conv2d(8, 12, 3, groups=4), outs=[0, 1, 2])
    small = shrink(nn.Sequential(a, nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(12, 4, 1)), image())
    kept = small.get_submodule("2")
    assert sizes(small.get_submodule("0")) == (3, 6)
    assert (*sizes(kept), kept.groups) == (6, 9, 3)


def test_grouped_convolution_of_the_model_input_stays() -> None:
    a = kill(nn.Conv2d(4, 8, 3, groups=4), outs=[0, 1])
    small = shrink(nn.Sequential(a, nn.ReLU(), nn.Conv2d(8, 4, 1)), image(4))
    assert sizes(small.get_submodule("0")) == (4, 8)


def test_layer_scale_is_sliced() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = kill(nn.Conv2d(3, 8, 1), outs=[1, 2]), nn.Conv2d(8, 4, 1)
            self.scale = nn.Parameter(torch.randn(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.scale)

    small = shrink(Scaled(), image())
    assert small.scale.shape == (6, 1, 1)
    assert isinstance(small.scale, nn.Parameter)


def test_frozen_batch_norm_is_sliced() -> None:
    norm = torchvision.ops.FrozenBatchNorm2d(8)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    a = kill(nn.Conv2d(3, 8, 1), outs=[1, 2])
    small = shrink(nn.Sequential(a, norm, nn.ReLU(), nn.Conv2d(8, 4, 1)), image())
    assert {name: buffer.shape for name, buffer in small.named_buffers()}["1.running_var"] == (6,)
