"""`compact`: smaller, equal, and free of sparsefx."""

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import TraceWarning
from sparsefx.graph.compact import compact
from tests.graph.nets import Net, RandomNet, batch_norm, difference, image, kill, shrink, sizes


def test_unread_channels_go_all_the_way_up() -> None:
    a, b, c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), kill(nn.Conv2d(8, 4, 3), ins=[0, 1, 2])
    with torch.no_grad():
        b.weight[3:, 4:] = 0
    small = shrink(nn.Sequential(a, batch_norm(8), nn.ReLU(), b, batch_norm(8), nn.SiLU(), c), image(size=9))
    assert [sizes(small.get_submodule(name)) for name in "036"] == [(3, 4), (4, 5), (5, 4)]


def test_outputs_that_only_constants_feed_are_constant() -> None:
    a, b = kill(nn.Conv2d(3, 8, 3), outs=[0, 1]), nn.Conv2d(8, 6, 3)
    with torch.no_grad():
        b.weight[2, 2:] = 0
    small = shrink(nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Conv2d(6, 4, 1)), image())
    assert sizes(small.get_submodule("2")) == (6, 5)


def test_residual_channels_go_only_if_every_producer_agrees() -> None:
    a, b = kill(nn.Conv2d(3, 8, 3), outs=[0, 1, 2]), kill(nn.Conv2d(8, 8, 1), outs=[1, 2, 3])
    c = kill(nn.Conv2d(8, 4, 1), ins=[7])

    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.na(net.a(x)))
        return net.c(F.relu(x + net.nb(net.b(x))))

    small = shrink(Net(run, a=a, na=batch_norm(8), b=b, nb=batch_norm(8), c=c), image())
    assert sizes(small.c) == (6, 4)
    assert sizes(small.a)[1] == sizes(small.b)[1] == sizes(small.b)[0] == small.na.num_features == 6


def test_unread_channel_of_a_residual_stream_goes_from_every_producer() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        x = x + net.b(F.relu(x))
        x = x + net.c(F.relu(x))
        return net.d(x)

    layers = {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 8, 1), "c": nn.Conv2d(8, 8, 1), "d": nn.Conv2d(8, 4, 1)}
    for name in "bcd":
        kill(layers[name], ins=[2, 6])
    small = shrink(Net(run, **layers), image())
    assert [sizes(small.get_submodule(name)) for name in "abcd"] == [(3, 6), (6, 6), (6, 6), (6, 4)]


def test_concatenation_keeps_offsets() -> None:
    a, b = kill(nn.Conv2d(3, 5, 1), outs=[0, 4]), kill(nn.Conv2d(3, 6, 1), outs=[3])
    c = kill(nn.Conv2d(11, 4, 3), ins=[5, 6])
    small = shrink(Net(lambda net, x: net.c(torch.cat([net.a(x), net.b(x).sigmoid()], dim=1)), a=a, b=b, c=c), image())
    assert [sizes(small.get_submodule(name)) for name in "abc"] == [(3, 3), (3, 3), (6, 4)]


def test_squeeze_excitation_gate_goes_with_its_channel() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        gate = net.up(F.relu(net.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return net.b(x * gate)

    a = kill(nn.Conv2d(3, 8, 1, bias=False), outs=[0, 3])
    small = shrink(
        Net(run, a=a, down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), b=nn.Conv2d(8, 2, 3, padding=1)), image()
    )
    assert [sizes(small.get_submodule(name)) for name in ("a", "down", "up", "b")] == [(3, 6), (6, 4), (4, 6), (6, 2)]


def test_squeeze_excitation_with_linear_layers() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        gate = net.up(F.relu(net.down(x.mean((2, 3))))).sigmoid()
        return net.b(x * gate[:, :, None, None])

    a = kill(nn.Conv2d(3, 8, 1, bias=False), outs=[0, 3])
    down, up = nn.Linear(8, 4), nn.Linear(4, 8)
    small = shrink(Net(run, a=a, down=down, up=up, b=nn.Conv2d(8, 2, 3, padding=1)), image())
    assert [sizes(small.get_submodule(name)) for name in ("a", "down", "up", "b")] == [(3, 6), (6, 4), (4, 6), (6, 2)]


@pytest.mark.parametrize("how", ["module", "function", "method", "view", "reshape"])
def test_flatten_makes_blocks_of_features(how: str) -> None:
    flat: dict[str, Callable[[Net, Tensor], Tensor]] = {
        "module": lambda net, x: net.flat(x),
        "function": lambda net, x: torch.flatten(x, 1),
        "method": lambda net, x: x.flatten(start_dim=1),
        "view": lambda net, x: x.view(x.size(0), -1),
        "reshape": lambda net, x: x.reshape(x.shape[0], -1),
    }

    def run(net: Net, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(net.a(x)), 2)
        return net.b(F.relu(flat[how](net, x)))

    a, b = kill(nn.Conv2d(3, 8, 3), outs=[0, 3]), kill(nn.Linear(32, 5), ins=[4, 5, 6, 7, 8])
    small = shrink(Net(run, a=a, b=b, flat=nn.Flatten()), image())
    assert sizes(small.a) == (3, 5)
    assert sizes(small.b) == (20, 5)


def test_view_with_numbers_flattens_if_example_inputs_tell() -> None:
    a, b = kill(nn.Conv2d(3, 8, 3), outs=[0, 3]), nn.Linear(128, 5)
    model = Net(lambda net, x: net.b(net.a(x).view(-1, 128)), a=a, b=b)
    assert sizes(shrink(model, image()).b) == (96, 5)
    assert sizes(compact(model).b) == (128, 5)  # pyright: ignore[reportArgumentType]


def test_batch_norm_between_flatten_and_linear() -> None:
    norm = nn.BatchNorm1d(32)
    with torch.no_grad():
        norm.bias.normal_()
        norm.running_mean.normal_()
    a = kill(nn.Conv2d(3, 8, 5), outs=[0, 3])
    small = shrink(nn.Sequential(a, nn.Flatten(), norm, nn.ReLU(), nn.Linear(32, 5)), image())
    assert small.get_submodule("2").num_features == 24
    assert sizes(small.get_submodule("4")) == (24, 5)


def test_layer_called_twice_stays_whole() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.c(net.b(F.relu(net.b(x))))

    b = kill(nn.Conv2d(8, 8, 3, padding=1), outs=[0, 1], ins=[2, 3])
    small = shrink(Net(run, a=nn.Conv2d(3, 8, 1), b=b, c=nn.Conv2d(8, 4, 1)), image())
    assert [sizes(small.get_submodule(name)) for name in "abc"] == [(3, 8), (8, 8), (8, 4)]


def test_weight_read_by_a_function_stays_whole() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        return F.linear(net.b(net.a(x)), net.b.weight.t())

    b = kill(nn.Linear(8, 6), outs=[0], ins=[1])
    small = shrink(Net(run, a=nn.Linear(5, 8), b=b), torch.randn(2, 5))
    assert [sizes(small.get_submodule(name)) for name in "ab"] == [(5, 8), (8, 6)]


def test_shared_parameter_stays_shared() -> None:
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    kill(a, outs=[0], ins=[1])
    small = shrink(nn.Sequential(a, nn.ReLU(), b), torch.randn(2, 6))
    assert small.get_submodule("0").weight is small.get_submodule("2").weight


@pytest.mark.parametrize("padding", [0, 1])
def test_everything_dead_still_runs(padding: int) -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=padding), nn.Conv2d(8, 8, 3, padding=padding, groups=8), nn.Conv2d(8, 4, 3)]
    for layer in layers:
        kill(layer, outs=list(range(layer.out_channels)))
    small = shrink(nn.Sequential(layers[0], nn.ReLU(), layers[1], batch_norm(8), layers[2]), image(size=9))
    assert [sizes(small.get_submodule(name)) for name in "024"] == [(3, 1), (1, 1), (1, 4)]


@pytest.mark.parametrize("inplace", [False, True])
def test_overwritten_memory_keeps_its_readers_right(inplace: bool) -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        before = net.a(x)
        after = net.act(before)
        return net.b(before) + net.c(after)

    a = kill(nn.Conv2d(3, 8, 1), outs=[0, 1, 2, 3])
    layers = {"a": a, "act": nn.ReLU(inplace), "b": nn.Conv2d(8, 4, 1), "c": nn.Conv2d(8, 4, 1)}
    small = shrink(Net(run, **layers), image())
    assert sizes(small.a) == ((3, 8) if inplace else (3, 4))


def test_memory_that_an_unknown_operation_overwrites_is_not_known_any_more() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        x.atan_()
        return net.c(net.b(x))

    a, b = kill(nn.Conv2d(3, 8, 1), outs=[0, 1]), nn.Conv2d(8, 5, 1)
    with torch.no_grad():
        b.weight[0, 2:] = 0
    small = shrink(Net(run, a=a, b=b, c=nn.Conv2d(5, 4, 1)), image())
    assert sizes(small.b) == (8, 5)


def test_unknown_operation_reads_everything() -> None:
    a, b = kill(nn.Conv2d(3, 8, 1), outs=[0]), nn.Conv2d(8, 4, 1)
    small = shrink(Net(lambda net, x: net.b(net.a(x).softmax(1)), a=a, b=b), image())
    assert sizes(small.a) == (3, 8)


def test_hook_on_a_layer_runs_and_its_layer_stays_whole() -> None:
    a, b = kill(nn.Linear(5, 8), outs=[0, 1]), nn.Linear(8, 4)
    a.register_forward_hook(_flip)
    small = shrink(nn.Sequential(a, nn.ReLU(), b), torch.randn(2, 5))
    assert sizes(small.get_submodule("0")) == (5, 8)


def test_layer_with_a_forward_of_its_own_instance_stays_whole() -> None:
    a, b = kill(nn.Linear(5, 8), outs=[0, 1]), nn.Linear(8, 4)
    model = nn.Sequential(a, nn.ReLU(), b).double().eval()
    a.forward = _reversed
    x = torch.randn(2, 8).double()
    assert difference(compact(model)(x), model(x)) < 1e-9


def _reversed(x: Tensor) -> Tensor:
    return x.flip(-1)


def test_always_random_model_is_compared_from_one_state() -> None:
    a = kill(nn.Linear(5, 8), outs=[0, 1])
    model = Net(lambda net, x: F.dropout(net.b(net.a(x).relu()), 0.5, True), a=a, b=nn.Linear(8, 30)).eval()
    small = compact(model, torch.randn(2, 5))
    assert sizes(small.a) == (5, 6)  # pyright: ignore[reportArgumentType]
    assert small.compact_report["difference"] < 1e-6


def _flip(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.flip(-1)


def test_unstructured_zeros_remove_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), batch_norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight[torch.rand_like(layer.weight) < 0.5] = 0
    small = shrink(model, image())
    assert small.compact_report["layers"] == {}
    assert small.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), model.state_dict().values(), strict=True))


def test_result_is_trainable_and_the_model_untouched() -> None:
    model = nn.Sequential(kill(nn.Conv2d(3, 8, 3), outs=[0]), batch_norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).train()
    model[3].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small = compact(model)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    small.train()(image()).sum().backward()
    assert {name for name, p in small.named_parameters() if p.grad is None} == {"3.weight"}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_single_precision_is_equal_up_to_its_noise() -> None:
    a, b = kill(nn.Conv2d(3, 32, 3), outs=list(range(20))), nn.Conv2d(32, 8, 3, padding=1)
    model = nn.Sequential(a, batch_norm(32), nn.ReLU(), b).eval()
    small = compact(model, image())
    assert small.get_submodule("3").weight.dtype == torch.float32
    assert small.compact_report["difference"] < 1e-6


def test_report() -> None:
    model = nn.Sequential(kill(nn.Conv2d(3, 8, 3, bias=False), outs=[0, 1]), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
    report = shrink(model, image()).compact_report
    assert report["parameters"] == {"before": 216 + 32, "after": 162 + 24}
    assert report["multiply_adds"] == {"before": 2 * 16 * (216 + 32), "after": 2 * 16 * (162 + 24)}
    assert report["seconds"]["before"] > 0
    assert report["seconds"]["after"] > 0


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = kill(nn.Linear(4, 6), outs=[0]), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() if x.sum() > 0 else self.a(x))


def test_model_that_does_not_trace_comes_back_whole() -> None:
    model, x = Untraceable().eval(), torch.randn(3, 4)
    with pytest.warns(TraceWarning, match="Untraceable"):
        same = compact(model, x)
    assert torch.equal(same(x), model(x))
    assert same is not model
    assert same.compact_report["layers"] == {}
    assert "" in same.compact_report["untraced"]


def test_submodule_that_does_not_trace_stays_whole() -> None:
    head = Untraceable()
    small = shrink(
        nn.Sequential(kill(nn.Linear(5, 7), outs=[0, 1]), nn.ReLU(), nn.Linear(7, 4), head), torch.randn(3, 5)
    )
    assert sizes(small.get_submodule("0")) == (5, 5)
    assert sizes(small.get_submodule("3.a")) == (4, 6)
    assert small.compact_report["untraced"].keys() == {"3"}


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = kill(nn.Linear(4, 6), outs=[0]), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


def test_model_whose_trace_is_not_its_meaning_comes_back_whole() -> None:
    model, x = Counting().eval(), torch.randn(3, 4)
    with pytest.warns(TraceWarning, match="Counting"):
        same = compact(model, x)
    assert isinstance(same, Counting)
    assert model.calls == 0


def test_example_inputs_that_do_not_fit_raise() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        compact(nn.Linear(4, 2), torch.randn(3, 5))


def test_random_state_stays() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(1, 4)
    state = torch.get_rng_state()
    compact(model, x)
    assert torch.equal(state, torch.get_rng_state())


def test_example_inputs_tell_unbatched_images() -> None:
    a, b = kill(nn.Conv2d(3, 8, 1), outs=[0]), nn.Conv2d(8, 4, 1)
    model = nn.Sequential(a, nn.MaxPool2d(2), b).double().eval()
    x = torch.randn(3, 6, 6).double()
    assert difference(compact(model, x)(x), model(x)) < 1e-9


ALONE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparsefx":
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
x, expected = torch.load(sys.argv[2], weights_only=True)
model = torch.load(sys.argv[1], weights_only=False)
assert not model.training and model.compact_report["parameters"]["after"] > 0
with torch.no_grad():
    assert torch.equal(model(x), expected)
model.load_state_dict(model.state_dict())
"""


def test_result_runs_where_sparsefx_cannot_be_imported(tmp_path) -> None:
    a = kill(nn.Conv2d(3, 8, 3), outs=[0, 1])
    model = nn.Sequential(a, batch_norm(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    x = image()
    small = compact(model, x)
    with torch.no_grad():
        torch.save((x, small(x)), tmp_path / "data.pt")
    torch.save(small, tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", ALONE, tmp_path / "model.pt", tmp_path / "data.pt"], check=True)


@pytest.mark.parametrize("block", range(8))
def test_random_networks_are_equal(block: int) -> None:
    removed = 0
    for seed in range(block * 10, block * 10 + 10):
        torch.manual_seed(seed)
        model = RandomNet(seed).double().eval()
        x = image(size=5).double()
        with torch.no_grad():
            expected, small = model(x), compact(model)
            assert (small(x) - expected).norm() <= 1e-9 * expected.norm(), seed
        removed += len(small.compact_report["layers"]) > 0
    assert removed >= 8


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_torchvision_models_are_equal_and_smaller(name: str) -> None:
    model = getattr(torchvision.models, name)(num_classes=10)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight[torch.rand(len(layer.weight), generator=random) < 0.4] = 0
            if isinstance(layer, nn.BatchNorm2d):
                layer.bias.normal_(0, 0.3, generator=random)
                layer.running_mean.normal_(0, 0.3, generator=random)
    model, x = model.double().eval(), torch.randn(1, 3, 32, 32).double()
    small = compact(model)
    with torch.no_grad():
        assert difference(small(x), model(x)) < 1e-9
    counts = small.compact_report["parameters"]
    assert counts["after"] < 0.75 * counts["before"]


@pytest.mark.parametrize("granularity", ["channel", ("channel", "in"), "weight"])
def test_sparsified_model(granularity: str | tuple) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), batch_norm(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), batch_norm(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )
    model = sparsefx.sparsify(model.double(), density=0.4, granularity=granularity).eval()
    x = image(size=8).double()
    masks = {name: mask.clone() for name, mask in sparsefx.masks(model).items()}
    small = compact(model, x)
    with torch.no_grad():
        assert difference(small(x), model(x)) < 1e-9
    assert {type(module).__module__.split(".")[0] for module in small.children()} == {"torch"}
    assert {key for key in small.state_dict() if "mask" in key} == set()
    removed = small.compact_report["layers"]
    assert (len(removed) == 0) == (granularity == "weight")
    assert all(torch.equal(masks[name], mask) for name, mask in sparsefx.masks(model).items())
    assert model.scheduler is not None


def test_sparsified_single_layer_comes_back_dense() -> None:
    layer, x = sparsefx.sparsify(nn.Linear(8, 4), density=0.5, granularity="channel"), torch.randn(2, 8)
    with pytest.warns(TraceWarning, match="Linear"):
        small, expected = compact(layer), layer(x)
    assert type(small) is nn.Linear
    torch.testing.assert_close(small(x), expected)
