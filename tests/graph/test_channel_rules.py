"""Every rule about values, against what the operation does to a constant channel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsefx.graph import channel_rules
from sparsefx.graph.channels import RULES
from tests.graph.nets import Net, batch_norm, check_claims, image, kill

RULES_OF_ONE_OPERAND = tuple(getattr(channel_rules, name) for name in ("elementwise", "multiply", "divide", "identity"))
ELEMENTWISE = [key for key, rule in RULES.items() if rule in RULES_OF_ONE_OPERAND]
BINARY = ("add", "sub", "mul", "multiply", "div", "truediv", "add_", "sub_", "mul_", "div_")
ARGUMENTS: dict[str, tuple] = {
    "Threshold": (0.1, 20.0),
    "_threshold": (0.1, 20.0),
    "clamp": (-0.5, 0.5),
    "clamp_": (-0.5, 0.5),
    **dict.fromkeys(BINARY, (2.0,)),
}


def dead(kind: type = nn.Conv2d) -> nn.Module:
    """A convolution with 6 channels of which 1, 3 and 4 are constants, the middle one zero."""
    conv = kill(kind(3, 6, 3), outs=[1, 3, 4])
    with torch.no_grad():
        conv.bias[1], conv.bias[3], conv.bias[4] = 0.75, 0, -0.25
    return conv


def name_of(key: Any) -> str:
    return key.lstrip(".") if isinstance(key, str) else key.__name__


@pytest.mark.parametrize("key", ELEMENTWISE, ids=lambda key: str(key) if isinstance(key, str) else name_of(key))
def test_elementwise(key: Any) -> None:
    arguments = ARGUMENTS.get(name_of(key), ())
    root, graph = nn.Module(), fx.Graph()
    flat = key is nn.Dropout1d
    root.conv = dead(nn.Conv1d if flat else nn.Conv2d)
    x = graph.call_module("conv", (graph.placeholder("x"),))
    if isinstance(key, str):
        y = graph.call_method(name_of(key), (x, *arguments))
    elif isinstance(key, type):
        root.op = key(*arguments)
        y = graph.call_module("op", (x,))
    else:
        y = graph.call_function(key, (x, *arguments))
    graph.output(y)
    flow, traced = check_claims(fx.GraphModule(root, graph), torch.randn(2, 3, 6) if flat else image())
    found = flow.channels[next(node for node in traced.graph.nodes if node.op == "output").args[0]]  # pyright: ignore
    assert found.const[[0, 2, 5]].isnan().all()
    assert found.const[1].isfinite()


SPATIAL: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "max_pool": lambda net, x: F.max_pool2d(x, 3, 1, 1),
    "max_pool_module": lambda net, x: net.max(x),
    "average": lambda net, x: F.avg_pool2d(x, 2, ceil_mode=True),
    "average_padded": lambda net, x: F.avg_pool2d(x, 3, 1, 1),
    "average_padded_module": lambda net, x: net.average(x),
    "average_without_padding": lambda net, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "average_divided": lambda net, x: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive": lambda net, x: F.adaptive_avg_pool2d(x, 3),
    "adaptive_max": lambda net, x: F.adaptive_max_pool2d(x, 3),
    "nearest": lambda net, x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda net, x: F.interpolate(x, size=(5, 7), mode="bilinear", align_corners=False),
    "upsample": lambda net, x: net.up(x),
    "mean": lambda net, x: x.mean((2, 3)),
    "mean_negative": lambda net, x: x.mean(-1),
    "mean_first": lambda net, x: torch.mean(x, 0),
    "mean_keepdim": lambda net, x: torch.mean(x, dim=[2, 3], keepdim=True),
    "amax": lambda net, x: x.amax((2, 3)),
    "prelu": lambda net, x: net.prelu(x),
    "prelus": lambda net, x: net.prelus(x),
    "batch_norm": lambda net, x: net.norm(x),
    "dropout": lambda net, x: F.dropout(x, 0.5, False),
    "broadcast": lambda net, x: x * net.one(x),
    "scalar": lambda net, x: 2 - x / 3,
    "vector": lambda net, x: x + net.norm.weight.view(1, -1, 1, 1) * net.one.bias,
    "calculated": lambda net, x: x / (net.norm.running_var.reshape(1, -1, 1, 1) + 1).sqrt(),
    "concatenated": lambda net, x: torch.cat([x, net.norm(x), x], -3),
}


@pytest.mark.parametrize("name", SPATIAL)
@pytest.mark.parametrize("measured", [False, True])
def test_channelwise_operation(name: str, measured: bool) -> None:
    layers = {
        "conv": dead(),
        "max": nn.MaxPool2d(2),
        "average": nn.AvgPool2d(3, 1, 1),
        "up": nn.Upsample(scale_factor=2, mode="bilinear"),
        "prelu": nn.PReLU(),
        "prelus": nn.PReLU(6, 0.3),
        "norm": batch_norm(6),
        "one": nn.Conv2d(6, 1, 1),
    }
    net = Net(lambda net, x: SPATIAL[name](net, net.conv(x)), **layers)
    flow, traced = check_claims(net, image(), measured)
    result = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    assert result in flow.channels
    found = flow.channels[result].const.isfinite()[:6]
    partial = name in ("average_padded", "average_padded_module", "average_divided", "broadcast")
    assert found.nonzero().flatten().tolist() == ([3] if partial else [1, 3, 4])


BARRIERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "softmax": lambda net, x: x.softmax(1),
    "sum_of_channels": lambda net, x: x.mean(1),
    "all_mean": lambda net, x: x.mean(),
    "dropout_in_training": lambda net, x: F.dropout(x, 0.5, True),
    "indices": lambda net, x: F.max_pool2d(x, 2, return_indices=True)[0],
    "opaque_operand": lambda net, x: x + x.softmax(1),
    "batch_axis": lambda net, x: torch.cat([x, x], 0),
    "division_by_channels": lambda net, x: 1 / x,
    "root": lambda net, x: (x * x).sqrt(),
    "moved": lambda net, x: x + x.transpose(1, 2),
    "linear_over_space": lambda net, x: net.linear(x),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_barrier_reads_every_channel(name: str) -> None:
    net = Net(lambda net, x: BARRIERS[name](net, net.conv(x)), conv=dead(), linear=nn.Linear(6, 4))
    flow, traced = check_claims(net, image(size=8))
    conv = next(node for node in traced.graph.nodes if node.target == "conv")
    assert flow.needed[conv].all()
