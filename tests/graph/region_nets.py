"""Networks of the kinds that regions must hold whole, and how to make one run in regions beside its masked twin."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparsefx
from sparsefx import blocked
from sparsefx.specialize import Specializer


class Residual(nn.Module):
    """ResNet's block: the sum of two normalized branches, then a ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += self.skip(x)
        return self.relu(y)


class PreActivation(nn.Module):
    """WRN's block: BatchNorm and ReLU first, dropout inside, a plain sum at the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(self.drop(F.relu(self.norm2(y))))


class Dense(nn.Module):
    """DenseNet's block: each layer reads the concatenation of all before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width * (k + 1), width, 3, 1, 1) for k in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.cat([x, torch.relu(conv(x))], 1)
        return F.avg_pool2d(x, 2)


class Inverted(nn.Module):
    """MobileNet's block: depthwise convolution, squeeze and excitation, hard activations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width, momentum=None)
        self.depth = nn.Conv2d(2 * width, 2 * width, 3, 1, 1, groups=2 * width)
        self.squeeze, self.excite = nn.Conv2d(2 * width, 4, 1), nn.Conv2d(4, 2 * width, 1)
        self.down, self.act = nn.Conv2d(2 * width, width, 1), nn.Hardswish()
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.depth(F.relu6(self.norm(self.up(x)))))
        scale = self.gate(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.down(y * scale)


class Plain(nn.Module):
    """VGG's kind: convolutions with bias, ReLU, max pooling of several kinds, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(12, 8, 3, padding=(1, 2), dilation=(1, 2)), nn.Tanh(), nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.layers(x), 2, ceil_mode=True) * 0.5
        return x.view(x.size(0), x.shape[1], x.shape[2], -1).mean(3, keepdim=True)


class Net(nn.Module):
    """A stem, one block, a global pooling and a linear head."""

    def __init__(self, body: nn.Module, width: int = 8, mean: bool = True) -> None:
        super().__init__()
        self.stem, self.body, self.mean = nn.Conv2d(3, 8, 3, padding=1), body, mean
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.stem(x))
        return self.head(y.mean((2, 3)) if self.mean else torch.flatten(self.pool(y), 1))


NETS: dict[str, Any] = {
    "resnet": lambda: Net(nn.Sequential(Residual(8, 8, 1), Residual(8, 12, 2)), 12, mean=False),
    "wrn": lambda: Net(nn.Sequential(PreActivation(8), PreActivation(8))),
    "densenet": lambda: Net(Dense(8), 32),
    "mobilenet": lambda: Net(Inverted(8)),
    "vgg": lambda: Net(Plain()),
}


def prefer_regions(calls: Any) -> str:
    """A choice between graphs: regions where the model has any."""
    return "regions" if "regions" in calls else "layers"


@pytest.fixture
def in_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions wherever they are possible, and sparse kernels in them: on shapes this small dense is faster."""
    monkeypatch.setattr(Specializer, "choose_graph", lambda self, key, calls: prefer_regions(calls))

    def choose(self: Specializer, plan: Any, key: Any, spec: Any, weight: Tensor, call: Any) -> str:
        x = weight if call is None else call[0]
        return self._candidates(plan, spec, x)[-1]

    monkeypatch.setattr(Specializer, "_choose", choose)


def pair(net: nn.Module, x: Tensor, density: float = 0.4) -> tuple[Any, nn.Module]:
    """A sparsified model, and a float64 copy of the dense one whose weights were multiplied by the same masks."""
    twin = copy.deepcopy(net)
    model = sparsefx.sparsify(net, density, example_inputs=x)
    with torch.no_grad():
        for name, mask in sparsefx.masks(model).items():
            twin.get_parameter(name).mul_(mask)
    return model, twin.double()


def conversions(model: Any) -> tuple[int, int]:
    """How many times the graph enters and leaves a region."""
    targets = [node.target for node in model.graph.nodes]
    return targets.count(blocked.enter), targets.count(blocked.leave)


def relative(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||."""
    return float((got.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def assert_equals_twin(kind: str, x: Tensor, training: bool) -> Any:
    """Check two steps of a network against its masked dense twin in float64; returns the sparse model."""
    model, twin = pair(NETS[kind](), x)
    for net in (model, twin):
        net.train(training)
    for module in [*model.modules(), *twin.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for _ in range(2):
        one, other = x.clone().requires_grad_(), x.double().requires_grad_()
        out, wanted = model(one), twin(other)
        out.square().sum().backward()
        wanted.square().sum().backward()
        assert relative(out, wanted) < 1e-5
        assert relative(one.grad, other.grad) < 1e-5
    masks = sparsefx.masks(model)
    for name, parameter in twin.named_parameters():
        grad = parameter.grad
        assert grad is not None
        grad = grad * masks[name] if name in masks else grad
        assert relative(model.get_parameter(name).grad, grad) < 2e-5, name
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(model.get_buffer(name).double(), buffer.double(), rtol=1e-5, atol=1e-6)
    return model


def assert_drops_the_same_elements(x: Tensor) -> Any:
    """Check that dropout in a region draws what the dense network draws; returns the sparse model."""
    model, twin = pair(NETS["wrn"](), x)
    torch.manual_seed(5)
    got = model(x)
    torch.manual_seed(5)
    with torch.no_grad():
        wanted = twin.float()(x)
    assert relative(got, wanted) < 1e-5
    return model


def assert_compiles_once(kind: str, x: Tensor) -> None:
    """Check that a region compiles whole, once, and follows its masks."""
    torch._dynamo.reset()
    model, twin = pair(NETS[kind](), x)
    assert conversions(model)[0] == 1
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    layer = model.stem
    for _ in range(3):
        model.zero_grad()
        twin.zero_grad()
        out, wanted = compiled(x), twin(x.double())
        out.square().sum().backward()
        wanted.square().sum().backward()
        assert relative(out, wanted) < 1e-5
        assert relative(layer.weight.grad, twin.stem.weight.grad * layer.weight_mask) < 1e-5
        layer.set_mask_(torch.rand_like(layer.weight) < 0.5)
        with torch.no_grad():
            twin.stem.weight.copy_(layer.weight)
    assert counter.frame_count == 1
    assert sparsefx.masks(model)["stem.weight"] is layer.weight_mask
