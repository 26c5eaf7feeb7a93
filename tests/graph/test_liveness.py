"""What the liveness pass says of whole graphs."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from sparsefx.graph.liveness import Live, liveness
from tests.graph.nets import Net, RandomNet, check_claims, difference, image, kill


def live(model: nn.Module) -> dict[str, Live]:
    traced = fx.symbolic_trace(model.eval())
    return liveness(traced.graph, traced)


def lists(found: Live) -> tuple[list[int], list[int]]:
    return found.live_in.tolist(), found.live_out.tolist()


def test_dead_outputs_are_not_read_and_fold() -> None:
    a, b = kill(nn.Conv2d(2, 4, 1), outs=[1]), nn.Conv2d(4, 3, 1)
    found = live(nn.Sequential(a, nn.Tanh(), b))
    assert lists(found["0"]) == ([0, 1], [0, 2, 3])
    assert lists(found["2"]) == ([0, 2, 3], [0, 1, 2])
    expected = b.bias.double() + b.weight[:, 1, 0, 0].double() * a.bias[1].double().tanh()  # pyright: ignore
    torch.testing.assert_close(found["2"].bias, expected.detach(), rtol=1e-12, atol=0)


def test_unread_outputs_need_not_be_computed() -> None:
    a, b, c = nn.Linear(4, 4), nn.Linear(4, 4), kill(nn.Linear(4, 2), ins=[0, 1])
    with torch.no_grad():
        b.weight[2:, 3] = 0
    found = live(nn.Sequential(a, nn.GELU(), b, nn.ReLU(), c))
    assert lists(found["0"]) == ([0, 1, 2, 3], [0, 1, 2])
    assert lists(found["2"]) == ([0, 1, 2], [2, 3])
    assert lists(found["4"]) == ([2, 3], [0, 1])


def test_constant_in_front_of_padding_is_read() -> None:
    found = live(nn.Sequential(kill(nn.Conv2d(2, 4, 1), outs=[1]), nn.Conv2d(4, 3, 3, padding=1)))
    assert lists(found["0"]) == ([0, 1], [0, 2, 3])
    assert lists(found["1"]) == ([0, 1, 2, 3], [0, 1, 2])


def test_residual_needs_no_agreement_here() -> None:
    a, b, c = nn.Conv2d(2, 4, 1), kill(nn.Conv2d(4, 4, 1), outs=[0, 1]), kill(nn.Conv2d(4, 2, 1), ins=[1, 2])

    def run(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.c(x + net.b(x))

    found = live(Net(run, a=a, b=b, c=c))
    assert lists(found["b"]) == ([0, 1, 2, 3], [3])
    assert lists(found["a"]) == ([0, 1], [0, 1, 2, 3])


def test_layer_that_several_places_use_says_what_its_weights_say() -> None:
    b = kill(nn.Linear(3, 3), outs=[0], ins=[1])
    found = live(Net(lambda net, x: net.c(net.b(net.b(x))), b=b, c=kill(nn.Linear(3, 2), ins=[2])))
    assert lists(found["b"]) == ([0, 2], [1, 2])
    assert torch.equal(found["b"].bias, b.bias.detach().double())


def test_layers_with_a_forward_of_their_own_are_left_out() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight - self.weight.mean(), self.bias)

    class Leaf(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.Conv2d)

    model = nn.Sequential(Standardized(2, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    assert liveness(Leaf().trace(model), model).keys() == {"1"}


class Restricted(nn.Module):
    """A layer that reads its live inputs and computes its live outputs only."""

    def __init__(self, layer: nn.Module, found: Live) -> None:
        super().__init__()
        self.layer, self.found = layer, found
        layer.bias = None

    def forward(self, x: Tensor) -> Tensor:
        axis = -1 if isinstance(self.layer, nn.Linear) else 1
        seen = torch.zeros_like(x).index_copy(axis, self.found.live_in, x.index_select(axis, self.found.live_in))
        bias = self.found.bias.view([-1] + [1] * (0 if axis == -1 else 2))
        y = self.layer(seen)
        out = (torch.zeros_like(y) + bias).index_copy(
            axis, self.found.live_out, (y + bias).index_select(axis, self.found.live_out)
        )
        return out


@pytest.mark.parametrize("seed", range(30))
def test_live_channels_are_enough(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = RandomNet(seed), image(size=5).double()
    _, traced = check_claims(model, x, measured=seed % 2 == 0)
    with torch.no_grad():
        expected = model(x)
        skipped = 0
        for name, found in liveness(traced.graph, traced).items():
            layer = traced.get_submodule(name)
            skipped += len(layer.weight) - len(found.live_out)  # pyright: ignore
            traced.set_submodule(name, Restricted(layer, found))
        assert skipped > 0
        assert difference(traced(x), expected) < 1e-9


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_claims_hold_in_torchvision_models(name: str) -> None:
    model = getattr(torchvision.models, name)(num_classes=4)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            kill(layer, outs=range(0, len(layer.weight), 3))
    flow, _ = check_claims(model, torch.randn(1, 3, 32, 32))
    assert sum(int(x.const.isfinite().sum()) for x in flow.channels.values()) > 100


def test_batch_norm_without_statistics_keeps_no_constants() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    flow, traced = check_claims(nn.Sequential(kill(nn.Conv2d(3, 4, 1), outs=[0]), norm), image())
    assert flow.channels[list(traced.graph.nodes)[2]].const.isnan().all()
