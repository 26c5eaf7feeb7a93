"""The fuse pass: which operators disappear into BatchNorm and convolution, and which may not."""

import copy

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx import blocked
from sparsefx.specialize import Specializer
from tests.graph.region_nets import NETS, Net, assert_equals_twin, in_regions, pair, relative

__all__ = ["in_regions"]
pytestmark = pytest.mark.usefixtures("in_regions")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def fused(model) -> list[tuple[bool, bool]]:
    """For each BatchNorm of the graph, whether it adds a residual and whether it clamps."""
    norms = [n for n in model.graph.nodes if n.target in (blocked.batch_norm, blocked.prepare)]
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


class Pooled(nn.Module):
    """A norm that a max pooling reads, and a convolution if `both`."""

    def __init__(self, both: bool = False, **options):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool, self.after = nn.MaxPool2d(3, 2, **options), nn.Conv2d(8, 8, 3, stride=2) if both else None

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        return self.pool(y) if self.after is None else self.pool(y) + self.after(y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("images", [5, 16])
@pytest.mark.parametrize("net", [Pooled(), Pooled(both=True), Pooled(padding=1), Pooled(ceil_mode=True)])
def test_max_poolings_normalize_what_they_read(net, images, training):
    x = torch.randn(images, 3, 8, 8) + 2
    model, twin = pair(Net(copy.deepcopy(net)), x)
    for one in (model, twin):
        one.train(training)
        torch.nn.init.uniform_(one.body.norm.bias)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("weight_mask")})
    out, expected = model(x), twin(x.double())
    assert prepared(model) == ["body.norm"]
    assert relative(out, expected) < 1e-5
    out.square().sum().backward()
    expected.square().sum().backward()
    masks = sparsefx.masks(model)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if q.grad.abs().max() > 1e-9:  # a bias before a norm has none
            assert relative(p.grad, q.grad * masks.get(name, 1)) < 1e-4, name


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


class Biased(nn.Module):
    """A convolution with a bias in front of a BatchNorm, which is read once more if `twice`."""

    def __init__(self, twice: bool, track: bool = True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=track)
        self.twice = twice

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y if self.twice else self.norm(y)


@pytest.mark.parametrize(
    ("twice", "training", "track", "zero"),
    [(False, True, True, True), (False, False, False, True), (False, False, True, False), (True, True, True, False)],
)
def test_a_bias_that_a_batch_mean_takes_off_has_gradient_zero(twice, training, track, zero):
    model, twin = pair(Net(Biased(twice, track)), X)
    for net in (model, twin):
        net.train(training)
    weights = torch.randn_like(model(X))
    (model(X) * weights).sum().backward()
    (twin(X.double()) * weights).sum().backward()
    got, expected = model.body.conv.bias.grad, twin.body.conv.bias.grad
    if zero:
        assert expected.abs().max() < 1e-12
        assert torch.equal(got, torch.zeros(8))
    else:
        assert relative(got, expected) < 1e-4


def prepared(model) -> list[str]:
    """Layers whose output is never written."""
    return [str(n.args[0].target) for n in model.graph.nodes if n.target is blocked.prepare]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("images", [5, 16])
def test_convolutions_normalize_what_they_read(training, images):
    """Pre-activation blocks: every norm before a convolution; gradients as those of the written norm."""
    x = torch.randn(images, 3, 8, 8) + 2
    model, twin = pair(NETS["wrn"](), x)
    for net in (model, twin):
        net.train(training)
        torch.nn.init.uniform_(net.body[0].norm1.bias)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("weight_mask")})
    torch.manual_seed(1)
    out = model(x)
    assert prepared(model) == [f"body.{k}.norm{i}" for k in (0, 1) for i in ((1, 2) if not training else (1,))]
    torch.manual_seed(1)
    expected = twin(x.double())
    assert relative(out, expected) < 1e-5
    out.square().sum().backward()
    expected.square().sum().backward()
    masks = sparsefx.masks(model)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert relative(p.grad, q.grad * masks.get(name, 1)) < 1e-4, name
    buffers = dict(model.named_buffers())
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(buffers[name].double(), buffer.double(), rtol=1e-5, atol=1e-6)


def test_a_norm_that_something_else_reads_is_written():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            y = torch.relu(self.norm(x))
            return self.conv(y) + y

    model, twin = pair(Net(Both()), X)
    assert relative(model(X), twin(X.double())) < 1e-5
    assert prepared(model) == []


def test_a_norm_whose_input_is_written_over_is_written():
    class Over(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = x * 2
            y = self.norm(x)
            x = x.mul_(0.5)
            return self.conv(y) + x

    model, twin = pair(Net(Over()), X)
    assert relative(model(X), twin(X.double())) < 1e-5
    assert prepared(model) == []


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_a_gradient_of_a_gradient_through_a_prepared_input(backend, monkeypatch):
    monkeypatch.setattr(Specializer, "_choose", lambda *_: backend)
    model, twin = pair(Net(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))), X)
    found = []
    for net, x in ((model, X.clone().requires_grad_()), (twin, X.double().requires_grad_())):
        (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [net.stem.weight, net.body[0].weight]))
    assert prepared(model) == ["body.0"]
    masks = sparsefx.masks(model)
    assert relative(found[0][0], found[1][0] * masks["stem.weight"]) < 1e-4
    assert relative(found[0][1], found[1][1]) < 1e-4


def test_the_dense_gradient_is_collected_of_what_the_convolution_read():
    model, twin = pair(Net(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))), X)
    layer = model.body[2]
    layer.collect_(True)
    model(X).square().sum().backward()
    twin(X.double()).square().sum().backward()
    assert prepared(model) == ["body.0"]
    assert relative(layer.runtime.collected, twin.body[2].weight.grad) < 1e-5


def test_activations_are_kept_once():
    """Of a norm, its ReLU and the convolution behind them, backward needs what the norm read."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model, _ = pair(Net(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))), X)
    model(X)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(X)
    activations = [size for size in kept.values() if size == 16 * 8 * 64 * 4]
    assert len(activations) == 1
    out.sum().backward()


def test_autocast_rounds_what_is_read():
    model, _ = pair(Net(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))), X)
    norm, conv, x = model.body[0], model.body[2], blocked.enter(torch.randn(4, 8, 8, 8) + 1000)
    with torch.no_grad():
        exact = blocked.conv(conv, blocked.batch_norm(norm, x, 4, relu=True), 4)
        with torch.autocast("cpu", torch.bfloat16):
            rough = blocked.conv(conv, blocked.prepare(norm, x, 4, relu=True), 4)
    assert rough.dtype == torch.bfloat16
    assert relative(rough, exact.double()) < 0.02


class Around(nn.Module):
    """A norm whose input, and whose output, something else reads too; parts may keep their gradient back."""

    def __init__(self, detached: str = ""):
        super().__init__()
        self.norm, self.detached = nn.BatchNorm2d(8), detached
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = torch.relu(self.norm(x))
        one, other = self.conv1(y), self.conv2(y)
        one = one.detach() if "one" in self.detached else one
        other = other.detach() if "other" in self.detached else other
        return one + other + x


def forks(model) -> dict[str, tuple[bool, bool]]:
    """Of each norm of the graph that hands on its input or its output: which."""
    norms = [n for n in model.graph.nodes if n.target in (blocked.batch_norm, blocked.prepare)]
    return {str(n.args[0].target): tuple(n.kwargs["forks"]) for n in norms if "forks" in n.kwargs}


@pytest.mark.parametrize("kind", ["wrn", "resnet"])
def test_norms_of_residual_blocks_sum_what_reads_around_them(kind):
    model = assert_equals_twin(kind, X, True)
    wanted = {
        "wrn": {"body.0.norm1": (True, False), "body.1.norm1": (True, False)},
        "resnet": {"body.0.norm2": (False, True)},
    }
    assert forks(model) == wanted[kind]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("detached", ["", "one", "other", "one and other"])
def test_a_norm_sums_the_gradients_of_two_readers_each(detached, training):
    model, twin = pair(Net(Around(detached)), X)
    for net in (model, twin):
        net.train(training)
    one, other = X.clone().requires_grad_(), X.double().requires_grad_()
    model(one).square().sum().backward()
    twin(other).square().sum().backward()
    assert forks(model) == {"body.norm": (True, True)}
    assert relative(one.grad, other.grad) < 1e-5
    for name in ("body.norm.weight", "body.norm.bias"):
        got, wanted = model.get_parameter(name).grad, twin.get_parameter(name).grad
        assert (got is None or not got.any()) if detached == "one and other" else relative(got, wanted) < 1e-5


def test_a_gradient_of_a_gradient_through_a_norm_with_two_readers_each():
    model, twin = pair(Net(Around()), X)
    found = []
    for net, x in ((model, X.clone().requires_grad_()), (twin, X.double().requires_grad_())):
        (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [net.body.norm.weight, net.body.norm.bias]))
    for got, wanted in zip(*found, strict=True):
        assert relative(got, wanted) < 1e-4


def test_a_norm_that_more_or_earlier_nodes_read_around_hands_nothing_on():
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            z = torch.tanh(self.conv(x))
            y = self.norm(x)
            return torch.relu(y) + torch.tanh(y) + y + z

    model, twin = pair(Net(Early()), X)
    assert relative(model(X), twin(X.double())) < 1e-5
    assert forks(model) == {}
