"""Small networks with dead channels, and the check of what the liveness pass claims of every node."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsefx.graph.channels import NO_AXIS
from sparsefx.graph.compact import compact
from sparsefx.graph.liveness import Flow


class Net(nn.Module):
    """A model from its layers by name and its forward, `(net, x) -> y`."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def kill(layer: Any, outs: Sequence[int] = (), ins: Sequence[int] = ()) -> Any:
    """Zero the weights of some output and input channels of a plain layer."""
    with torch.no_grad():
        weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
        weight[list(outs)] = 0
        weight[:, list(ins)] = 0
    return layer


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """A BatchNorm with statistics and scales of its own in every channel."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.bias):
            tensor.normal_()  # pyright: ignore[reportOptionalMemberAccess]
        for tensor in (norm.running_var, norm.weight):
            tensor.uniform_(0.5, 2)  # pyright: ignore[reportOptionalMemberAccess]
    return norm


def image(channels: int = 3, size: int = 6) -> Tensor:
    """Two random images."""
    return torch.randn(2, channels, size, size)


def difference(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


def shrink(model: nn.Module, x: Tensor) -> Any:
    """Compact a model with and without example inputs, check that both are equal to it, and return the first."""
    model, x = model.double().eval(), x.double()
    with torch.no_grad():
        expected = model(x)
        assert expected.norm() > 0
        small = compact(model, x)
        assert small.compact_report["difference"] < 1e-9
        for result in (small, compact(model)):
            assert difference(result(x), expected) < 1e-9
        assert torch.equal(model(x), expected)
    return small


def sizes(layer: Any) -> tuple[int, int]:
    """Numbers of input and output channels of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def check_claims(model: nn.Module, x: Tensor, measured: bool = False) -> tuple[Flow, fx.GraphModule]:
    """Run a model and check ranks, numbers of channels and constants of every node that is not opaque."""
    traced = fx.symbolic_trace(model.double().eval())
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            values[n] = result.clone() if isinstance(result, Tensor) else result
            return result

    with torch.no_grad():
        Recorder(traced).run(x.double())
    shapes = {node: value.shape for node, value in values.items() if isinstance(value, Tensor)}
    flow = Flow(traced.graph, traced, shapes if measured else None)
    for node, channels in flow.channels.items():
        value = values[node]
        assert channels.ndim in (None, value.dim()), node
        if channels.axis == NO_AXIS:
            assert value.numel() == 1
            continue
        if channels.flat:
            value = value.unflatten(-1, (len(channels), -1))
        axis = -2 if channels.flat else channels.axis
        assert value.shape[axis] == len(channels), node
        known = channels.const.isfinite()
        rows = value.movedim(axis, 0).reshape(len(channels), -1)[known]
        assert channels.const.dtype == torch.float64
        torch.testing.assert_close(rows, channels.const[known, None].expand_as(rows), rtol=1e-12, atol=1e-12)
    return flow, traced


class RandomNet(nn.Module):
    """A random small CNN: convolutions of all kinds, BatchNorm, residual adds, concatenations and gates."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList()
        self.plan: list[tuple[str, int, int]] = []
        channels = [3]
        for _ in range(self._int(4, 9)):
            kind = ("conv", "conv", "depthwise", "grouped", "add", "cat", "gate")[self._int(0, 7)]
            source, other = self._int(max(0, len(channels) - 3), len(channels)), self._int(0, len(channels))
            kind, layer, out = self._layer(kind, channels[source], channels[other])
            self.layers.append(layer)
            self.plan.append((kind, source, other))
            channels.append(out)
        self.head = nn.Linear(9 * channels[-1], 4)
        self._zero()

    def _layer(self, kind: str, width: int, other: int) -> tuple[str, nn.Module, int]:
        out = self._int(4, 9)
        if kind == "add":
            return kind, self._conv(width, width), width
        if kind == "gate":
            return kind, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Hardsigmoid()), width
        if kind == "cat":
            return kind, self._conv(width + other, out), out
        if kind == "depthwise":
            return kind, self._conv(width, 2 * width, groups=width), 2 * width
        if kind == "grouped" and width % 2 == 0:
            return kind, self._conv(width, 6, groups=2), 6
        return "conv", self._conv(width, out), out

    def _int(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.random))

    def _conv(self, ins: int, outs: int, groups: int = 1) -> nn.Module:
        kernel, mode = (1, 3)[self._int(0, 2)], ("zeros", "zeros", "reflect")[self._int(0, 3)]
        bias = self._int(0, 2) == 1
        conv = nn.Conv2d(ins, outs, kernel, padding=kernel // 2, groups=groups, bias=bias, padding_mode=mode)
        acts = (nn.ReLU(), nn.ReLU6(inplace=True), nn.SiLU(), nn.LeakyReLU(), nn.Identity(), nn.Dropout())
        norm = batch_norm(outs) if self._int(0, 2) else nn.Identity()
        return nn.Sequential(conv, norm, acts[self._int(0, 6)])

    def _zero(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                dead, unread = (torch.rand(size, generator=self.random) < 0.4 for size in layer.weight.shape[:2])
                outs = [] if layer is self.head else dead.nonzero().flatten().tolist()
                kill(layer, outs, unread.nonzero().flatten().tolist())

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for (kind, source, other), layer in zip(self.plan, self.layers, strict=True):
            x = values[source]
            if kind == "add":
                x = x + layer(x)
            elif kind == "gate":
                x = layer(x) * x
            elif kind == "cat":
                x = layer(torch.cat((x, values[other]), 1))
            else:
                x = layer(x)
            values.append(x)
        return self.head(F.adaptive_max_pool2d(x, 3).flatten(1))
