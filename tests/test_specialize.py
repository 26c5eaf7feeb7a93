"""Plans are rebuilt where a mask changed and are the same objects elsewhere; choices are measured and replayed."""

import copy

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx import specialize
from sparsefx.kernels import ops
from sparsefx.kernels.runtime import Runtime


class Net(nn.Module):
    """Two convolutions and a linear layer; the first two are wide enough for compaction to pay."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def model():
    return sparsefx.sparsify(Net(), 0.2)


def step(model):
    model(torch.randn(4, 3, 12, 12)).square().sum().backward()


def narrow(layer, rows: int) -> torch.Tensor:
    """A mask with the same number of weights, all in the first `rows` output channels."""
    mask = torch.zeros_like(layer.weight_mask).flatten()
    mask[: rows * layer.weight_mask[0].numel()] = True
    return mask.view_as(layer.weight_mask)


def test_only_changed_layers_get_a_new_plan(model):
    step(model)
    specializer = model.scheduler.specializer
    plans = {name: specializer.plan(layer) for name, layer in model.scheduler.layers.items()}
    assert specializer.rebuilds == {"conv1": 1, "conv2": 1, "fc": 1}
    model.conv2.set_mask_(~model.conv2.weight_mask)
    model.conv1.set_mask_(model.conv1.weight_mask.clone())
    step(model)
    assert specializer.rebuilds == {"conv1": 1, "conv2": 2, "fc": 1}
    for name, layer in model.scheduler.layers.items():
        assert (specializer.plan(layer) is plans[name]) == (name != "conv2.weight")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("how", ["copy_", "data", "through data", "load", "deepcopy"])
def test_a_mask_written_by_hand_is_noticed(model, how, memory_format):
    model.to(memory_format=memory_format)
    assert model.conv2.weight_mask.is_contiguous(memory_format=memory_format)
    step(model)
    new = narrow(model.conv2, 8)
    if how == "copy_":
        model.conv2.weight_mask.copy_(new)
    elif how == "data":
        model.conv2.weight_mask.data = new
    elif how == "through data":
        model.conv2.weight_mask.data.copy_(new)
    elif how == "load":
        state = {**model.state_dict(), "conv2.weight_mask": new}
        state["conv1.weight_mask"] = model.conv1.weight_mask
        model.conv2.load_state_dict({k.removeprefix("conv2."): v for k, v in state.items() if k.startswith("conv2.")})
    else:
        model = copy.deepcopy(model)
        model.conv2.weight_mask.copy_(new)
    model.conv2.zero_missing_()
    assert model.scheduler.specializer.plan(model.conv2).live_out == 8
    x = torch.randn(4, 3, 12, 12)
    dense = Net()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "mask" not in k})
    torch.testing.assert_close(model(x), dense(x))


def test_a_layer_that_crosses_break_even_changes_backend(model, monkeypatch):
    monkeypatch.setattr(specialize, "interleaved", lambda calls, device: [2.0, 1.0, 3.0][: len(calls)])
    specializer = model.scheduler.specializer
    monkeypatch.setattr(specializer, "missing", "not wanted in this test")
    step(model)
    assert set(specializer.backends(model.conv2).values()) == {"dense"}
    model.conv2.set_mask_(narrow(model.conv2, 12))
    specializer.respecialize([model.conv2])
    assert specializer.backends(model.conv2) == dict.fromkeys(specialize.PASSES, "compaction")
    step(model)
    model.conv2.set_mask_(torch.ones_like(model.conv2.weight_mask))
    specializer.respecialize([model.conv2])
    assert set(specializer.backends(model.conv2).values()) == {"dense"}


def test_dense_loses_where_most_channels_are_dead():
    layer = nn.Conv2d(128, 128, 3, padding=1)
    sparsefx.sparsify(layer, 0.02, granularity="channel")
    x = torch.randn(8, 128, 16, 16, requires_grad=True)
    layer(x).sum().backward()
    assert layer.scheduler.specializer.backends(layer)["fprop"] != "dense"


@pytest.mark.parametrize("fastest", ["dense", "sparse"])
def test_the_fastest_backend_runs(model, monkeypatch, fastest):
    times = {"dense": [1.0, 2.0], "sparse": [2.0, 1.0]}[fastest]
    monkeypatch.setattr(specialize, "interleaved", lambda calls, device: list(times[: len(calls)]))
    x, twin = torch.randn(4, 3, 12, 12), Net()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "mask" not in k})
    for net in (model, twin):
        net(x).square().sum().backward()
    for name, layer in model.scheduler.layers.items():
        assert set(model.scheduler.specializer.backends(layer).values()) <= {fastest, "dense"}
        grad, mask = twin.get_parameter(name).grad, layer.weight_mask
        assert (layer.weight.grad - grad * mask).norm() <= 1e-5 * (grad * mask).norm()
        assert not layer.weight.grad[~mask].any()
    assert model.scheduler.specializer.backends(model.conv2) == dict.fromkeys(specialize.PASSES, fastest)


def test_without_a_compiler_there_is_one_warning_and_dense_runs(model, monkeypatch):
    def fail(mask, spec):
        raise specialize.CompilerUnavailable("no g++ here")

    monkeypatch.setitem(specialize.BACKENDS, "sparse", fail)
    with pytest.warns(sparsefx.errors.BackendWarning, match="no g\\+\\+ here") as caught:
        step(model)
    assert len(caught) == 1
    assert "sparse" not in model.scheduler.specializer.backends(model.conv2).values()
    assert "no g++ here" in str(sparsefx.summary(model))


def test_choices_are_replayed_and_not_measured_again(model, monkeypatch):
    model.conv2.set_mask_(narrow(model.conv2, 12))
    step(model)
    state = model.scheduler.specializer.state_dict()
    assert len(state["table"]) >= 3

    def never(calls, device):
        raise AssertionError("measured again")

    monkeypatch.setattr(specialize, "interleaved", never)
    other = sparsefx.sparsify(Net(), 0.2)
    other.scheduler.specializer.load_state_dict(state)
    other.conv2.set_mask_(narrow(other.conv2, 12))
    step(other)
    assert other.scheduler.specializer.backends(other.conv2) == model.scheduler.specializer.backends(model.conv2)


def test_choices_of_another_machine_are_dropped(model):
    state = {"machine": "another", "table": {"x": "compaction"}}
    with pytest.warns(sparsefx.errors.BackendWarning, match="another machine"):
        model.scheduler.specializer.load_state_dict(state)
    assert model.scheduler.specializer.table == {}


@pytest.mark.parametrize(
    ("times", "densities", "again"),
    [
        ([3.0, 1.0], (0.1, 0.15), False),
        ([3.0, 1.8], (0.1, 0.15), True),
        ([3.0, 1.8], (0.15, 0.1), False),
        ([1.0, 3.0], (0.1, 0.15), False),
        ([1.0, 1.8], (0.15, 0.1), True),
    ],
)
def test_a_new_mask_is_measured_only_where_old_times_leave_doubt(monkeypatch, times, densities, again):
    measured = []
    monkeypatch.setenv("SPARSEFX_CHOICES", "off")
    monkeypatch.setattr(specialize, "interleaved", lambda calls, device: measured.append(1) or times[: len(calls)])
    layer = nn.Conv2d(64, 64, 3)
    sparsefx.sparsify(layer, 0.1)
    for density in densities:
        measured.clear()
        layer.set_mask_(torch.rand_like(layer.weight) < density)
        with torch.no_grad():
            layer(torch.randn(32, 64, 8, 8))
        fastest = "sparse" if times[1] < times[0] else "dense"
        assert layer.scheduler.specializer.backends(layer)["fprop"] == fastest
    assert bool(measured) is again


def test_sparse_kernels_are_tried_for_nearly_full_layers_only_where_these_are_thin(monkeypatch):
    tried = {}

    def measure(self, names, plan, kind, *rest):
        tried[tuple(plan.mask.shape[:2]), kind] = names
        return dict.fromkeys(names, 1.0)

    monkeypatch.setattr(specialize.Specializer, "_measure", measure)
    net = nn.Sequential(nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5), nn.Conv2d(50, 12, 1))
    model = sparsefx.sparsify(net, 0.9, distribution="uniform")
    model(torch.randn(4, 1, 12, 12)).square().sum().backward()
    thin = {shape for (shape, _), names in tried.items() if "sparse" in names}
    assert thin == {(20, 1), (12, 50)}


def mlp(density=0.3, **scheduler):
    net = nn.Sequential(nn.Linear(70, 240), nn.ReLU(), nn.Linear(240, 10))
    return sparsefx.sparsify(net, density, scheduler=sparsefx.SparseMomentum(**scheduler))


def grad(layer):
    assert layer.weight.grad is not None
    return layer.weight.grad


def results(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


def test_linear_layers_that_run_dense_become_torchs_own_to_the_bit(monkeypatch):
    monkeypatch.setattr(specialize, "interleaved", lambda calls, device: list(range(len(calls))))
    model, x = mlp(), torch.randn(33, 70)
    ran = []
    real = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *args: ran.append(args[0].shape) or real(*args))
    operators = results(model, x)
    before = len(ran)
    assert before >= 2
    plain = results(model, x)
    assert len(ran) == before
    for one, other in zip(operators, plain, strict=True):
        assert torch.equal(one, other)
    for name, mask in sparsefx.masks(model).items():
        assert not grad(model.get_submodule(name.removesuffix(".weight")))[~mask].any()
    model[0].weight_mask.data[:, :35] = False
    model[0].zero_missing_()
    results(model, x)
    assert not grad(model[0])[:, :35].any()


def test_a_full_layer_needs_no_masking_until_it_loses_weights(monkeypatch):
    monkeypatch.setattr(specialize, "interleaved", lambda calls, device: list(range(len(calls))))
    model, x = mlp(), torch.randn(33, 70)
    model[2].set_mask_(torch.ones_like(model[2].weight_mask))
    results(model, x)
    masked = []  # layers whose gradient came masked, or was then
    passes, reach = Runtime.passes, Runtime.reach

    def passed(self, grad):
        found = passes(self, grad)
        masked.extend([self.name] * found)
        return found

    monkeypatch.setattr(Runtime, "passes", passed)
    monkeypatch.setattr(Runtime, "reach", lambda self, *args: masked.append(self.name) or reach(self, *args))
    results(model, x)
    assert masked == ["0"]
    model[2].weight_mask.data[:, :45] = False
    model[2].zero_missing_()
    results(model, x)
    assert masked == ["0", "2", "0"]
    assert not grad(model[2])[:, :45].any()
    assert grad(model[2])[:, 45:].all()


def test_a_linear_layer_that_runs_dense_collects_its_missing_gradient(monkeypatch):
    monkeypatch.setattr(specialize, "interleaved", lambda calls, device: list(range(len(calls))))
    model, x = mlp(dense_grad_window="always"), torch.randn(33, 70)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model.scheduler.attach(optimizer, steps_per_update=100, total_steps=1000)
    results(model, x)
    by_operator = [layer.runtime.collected.clone() for layer in (model[0], model[2])]
    results(model, x)
    for layer, collected in zip((model[0], model[2]), by_operator, strict=True):
        assert torch.equal(layer.runtime.collected, collected)
        assert torch.equal(grad(layer), collected * layer.weight_mask)


def test_a_burst_of_noise_decides_no_measurement(monkeypatch):
    """A neighbour that takes the processor for a while makes some runs of a short call long, in turn or in a row."""
    now, runs = [0.0], []
    monkeypatch.setattr(specialize.time, "perf_counter", lambda: now[0])

    def call(name, seconds, slow):
        runs.append(name)
        now[0] += seconds * (50 if runs.count(name) in slow else 1)

    calls = [lambda: call("slower", 4e-5, ()), lambda: call("faster", 2e-5, (1, 2, 3, 4))]
    slower, faster = specialize.interleaved(calls, torch.device("cpu"))
    assert (slower, faster) == pytest.approx((4e-5, 2e-5))


def test_long_calls_that_are_hopeless_are_measured_twice(monkeypatch):
    now, runs = [0.0], []
    monkeypatch.setattr(specialize.time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        runs.append(name)
        now[0] += seconds

    calls = [lambda: call("slow", 2.0), lambda: call("fast", 1.0), lambda: call("close", 1.2)]
    assert specialize.interleaved(calls, torch.device("cpu")) == pytest.approx([2.0, 1.0, 1.2])
    assert [runs.count(name) for name in ("slow", "fast", "close")] == [3, 6, 6]
