"""The layout pass: one region from the first sparse convolution to the head, the same results, borders kept to few."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsefx
from sparsefx import blocked
from sparsefx.errors import TraceWarning
from sparsefx.layers import sparse_layers
from tests.graph.region_nets import (
    NETS,
    Net,
    Residual,
    assert_drops_the_same_elements,
    assert_equals_twin,
    conversions,
    in_regions,
    pair,
    prefer_regions,
    relative,
)

__all__ = ["in_regions"]
pytestmark = pytest.mark.usefixtures("in_regions")


def image(n: int = 5, size: int = 12) -> torch.Tensor:
    return torch.randn(n, 3, size, size)


@torch.fx.wrap
def halved(sizes: list[int], x: torch.Tensor) -> torch.Tensor:
    """Writes into its argument, as the window sizes of torchvision's Video Swin do."""
    sizes[0] //= 2
    return x[:, : sizes[0]]


def test_a_function_may_write_into_a_list_of_the_graph():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.after = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.after(halved([16], self.conv(x)))

    model, twin = pair(Writes(), image())
    for x in (image(), image()):
        assert relative(model(x), twin(x.double())) < 1e-5
    assert conversions(model) == (2, 2)
    assert sparsefx.compact(model.eval(), x)(x).shape == (5, 4, 8, 8)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("images", [5, 33])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_masked_dense_model(kind, images, training):
    assert_equals_twin(kind, image(images), training)


@pytest.mark.parametrize("kind", ["resnet", "wrn", "densenet", "mobilenet"])
def test_one_region_from_the_first_convolution_to_the_head(kind):
    model, _ = pair(NETS[kind](), image())
    model(image())
    assert conversions(model) == (1, 1)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "squeezenet1_1"])
def test_torchvision_networks_stay_in_one_region(name):
    models = pytest.importorskip("torchvision.models")
    x = torch.randn(2, 3, 32, 32)
    model = sparsefx.sparsify(getattr(models, name)().eval(), 0.1, example_inputs=x)
    with torch.no_grad():
        model(x)
    convs = sum(isinstance(layer, nn.Conv2d) for _, layer in sparse_layers(model))
    assert conversions(model) == (1, 1)
    assert [node.target for node in model.graph.nodes].count(blocked.conv) == convs


def test_dropout_drops_the_same_elements():
    assert conversions(assert_drops_the_same_elements(image(19)))[1] == 1


def test_an_operator_that_regions_do_not_know_stands_between_two_of_them():
    class Shuffles(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.two(F.pixel_shuffle(F.pixel_unshuffle(self.one(x), 2), 2)).sum((2, 3))

    x = image(4, 14)
    model, twin = pair(Shuffles(), x)
    assert relative(model(x), twin(x.double())) < 1e-5
    assert conversions(model) == (2, 2)


def test_a_value_overwritten_and_read_again_keeps_the_graph_plain():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)

        def forward(self, x):
            y = self.conv(x)
            z = F.relu(y, inplace=True)
            return z + y

    model, twin = pair(Overwrites(), image())
    assert relative(model(image()), twin(image().double())) > 0.1  # other images
    x = image()
    assert relative(model(x), twin(x.double())) < 1e-5
    assert conversions(model) == (0, 0)


def test_a_hook_on_a_layer_sees_activations_as_the_model_knows_them():
    x = image()
    model, twin = pair(NETS["resnet"](), x)
    twin(x.double())
    model(x)
    assert conversions(model) == (1, 1)
    seen = []
    handle = model.body[0].conv2.register_forward_hook(lambda layer, args, out: seen.append(out.shape))
    assert relative(model(x), twin(x.double())) < 1e-5
    assert seen == [(5, 8, 12, 12)]
    handle.remove()
    model(x)
    assert len(seen) == 1
    assert conversions(model) == (1, 1)


def test_frozen_norm_uses_its_running_statistics():
    x = image()
    model, twin = pair(NETS["resnet"](), x)
    for net in (model, twin):
        net.body[1].norm1.eval()
    assert relative(model(x), twin(x.double())) < 1e-5
    assert relative(model(x), twin(x.double())) < 1e-5


def test_graphs_of_two_forwards_live_side_by_side():
    x, y = image(), image()
    model, twin = pair(NETS["vgg"](), x)
    model.zero_grad()
    twin.zero_grad()
    a, b = model(x), model(y)
    with torch.no_grad():
        model(image())
    a.square().sum().backward(retain_graph=True)
    b.square().sum().backward()
    a.square().sum().backward()
    (2 * twin(x.double()).square().sum() + twin(y.double()).square().sum()).backward()
    assert relative(model.stem.weight.grad, twin.stem.weight.grad * model.stem.weight_mask) < 1e-5


def test_a_layer_called_twice_sums_its_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.relu(self.conv(self.stem(x)))).sum((1, 2, 3))

    x = image()
    model, twin = pair(Twice(), x)
    model.zero_grad()
    model(x).square().sum().backward()
    twin(x.double()).square().sum().backward()
    assert conversions(model) == (1, 1)
    assert relative(model.conv.weight.grad, twin.conv.weight.grad * model.conv.weight_mask) < 1e-5


@pytest.mark.parametrize("kind", ["resnet", "vgg", "wrn"])
@pytest.mark.parametrize("training", [True, False])
def test_double_backward(kind, training):
    x = image(3)
    model, twin = pair(NETS[kind](), x)
    results = []
    for net, given in ((model, x), (twin, x.double())):
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        y = given.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net.train(training)(y).square().sum(), y, create_graph=True)
        grad.square().sum().backward()
        results.append((y.grad, net.get_parameter("stem.weight").grad))
    assert relative(results[0][0], results[1][0]) < 1e-4
    assert relative(results[0][1], results[1][1] * model.stem.weight_mask) < 1e-4


def test_autocast_rounds_no_more_than_the_dense_model():
    x = image(20)
    model, twin = pair(NETS["resnet"](), x)
    dense = copy.deepcopy(twin).float()
    results = []
    for net in (model, dense):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        out.float().square().sum().backward()
        results.append((out, net.stem.weight.grad * model.stem.weight_mask))
    wanted = twin(x.double())
    wanted.square().sum().backward()
    exact = wanted, twin.stem.weight.grad * model.stem.weight_mask
    assert conversions(model) == (1, 1)
    for ours, theirs, true in zip(*results, exact, strict=True):
        assert relative(ours, true) < 1.5 * relative(theirs, true)


def test_the_gradient_of_missing_weights_is_collected():
    x = image(6)
    model, twin = pair(Net(Residual(8, 8, 1)), x)
    layer, dense = model.body.conv1, twin.body.conv1
    layer.collect_(True)
    model.zero_grad()
    model(x).square().sum().backward()
    twin(x.double()).square().sum().backward()
    assert conversions(model)[0] == 1
    assert relative(layer.runtime.collected, dense.weight.grad) < 1e-5
    assert relative(layer.weight.grad, dense.weight.grad * layer.weight_mask) < 1e-5


def test_choices_by_shape_and_gradients():
    model, _ = pair(NETS["vgg"](), image())
    asked = []
    model._sparsefx.choose = lambda key, calls: asked.append(key) or prefer_regions(calls)
    chooser = model._sparsefx.current(model).chooser
    chooser.choose = model._sparsefx.choose
    model(image(7))
    model(image(7))
    with torch.no_grad():
        model(image(7))
    assert len(asked) == 2
    assert asked[0] != asked[1]


def test_summary_tells_of_regions():
    model, _ = pair(NETS["resnet"](), image())
    model(image())
    assert "7 convolutions run in regions of blocked activations, with 2 conversions in all" in str(
        sparsefx.summary(model)
    )


def test_regions_with_other_results_are_not_run(monkeypatch):
    monkeypatch.setattr(blocked, "mean", lambda x: x.mean((2, 3), keepdim=True) * 1.5)
    with pytest.warns(TraceWarning, match="the graph 'regions'"):
        model, twin = pair(NETS["wrn"]().eval(), image())
    assert conversions(model) == (0, 0)
    x = image()
    assert relative(model(x), twin(x.double())) < 1e-5


def test_the_first_call_runs_what_later_calls_run():
    x = image()
    model = sparsefx.sparsify(NETS["vgg"](), 0.4)
    first, second = model(x), model(x)
    assert conversions(model)[0] == 1
    assert torch.equal(first, second)


def test_a_loaded_table_decides_again():
    x = image()
    model, _ = pair(NETS["vgg"](), x)
    with torch.no_grad():
        inside = model(x)
    model._sparsefx.current(model).chooser.choose.specializer.choose_graph = lambda key, calls: "layers"
    state = model.scheduler.specializer.state_dict()
    with torch.no_grad():
        assert torch.equal(model(x), inside)
        model.scheduler.specializer.load_state_dict(state)
        model(x)
    assert conversions(model) == (0, 0)


def test_a_constant_channel_in_channels_last_does_not_cost_the_regions():
    """Torch's channels_last BatchNorm is percents off there; regions are not, and are not blamed for it."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3))
    body[0].bias.data.fill_(10.1234567)
    body[0].weight.data[:8] = 0
    x = torch.randn(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    model, twin = pair(body.to(memory_format=torch.channels_last), x)
    exact = F.batch_norm(twin[0](x.double()), None, None, training=True)[:, :8]
    rough = F.batch_norm(twin[0](x.double()).float(), None, None, training=True)[:, :8]
    assert exact.abs().max() < 1e-6
    assert rough.abs().max() > 0.1
    assert relative(model(x), twin(x.double())) < 1e-5
    assert conversions(model) == (1, 1)


def test_a_dropout_that_drops_nothing_is_left_out():
    x = image()
    model, twin = pair(NETS["wrn"]().eval(), x)
    with torch.no_grad():
        assert relative(model(x), twin(x.double())) < 1e-5
    assert conversions(model) == (1, 1)
    assert not any("drop" in node.name for node in model.graph.nodes)


def test_images_in_channels_last_are_measured_for_themselves():
    """Which graph is the fastest depends on the memory format; with one choice for both, one of them ran the slower."""
    model, _ = pair(NETS["vgg"](), image())
    chooser, asked = model._sparsefx.current(model).chooser, []
    chooser.choose = lambda key, calls: asked.append(key) or prefer_regions(calls)
    x = image(6)
    with torch.no_grad():
        for images in (x, x.contiguous(memory_format=torch.channels_last)) * 2:
            model(images)
    assert len(asked) == len(set(asked)) == 2


def test_ever_new_shapes_are_not_measured_for_ever():
    model, _ = pair(NETS["vgg"](), image())
    chooser, asked = model._sparsefx.current(model).chooser, []
    chooser.choose = lambda key, calls: asked.append(key) or prefer_regions(calls)
    with torch.no_grad():
        for images in range(2, 40):
            model(image(images))
    assert len(asked) < 20
