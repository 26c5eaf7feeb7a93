"""The dense graph: torch's own layers on the stored weights, with what sparse training needs of them kept."""

import copy
import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsefx
from sparsefx.errors import TraceWarning
from sparsefx.graph.dense import run_dense
from sparsefx.kernels import ops
from sparsefx.specialize import Specializer


@pytest.fixture
def dense_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Specializer, "choose_graph", lambda self, key, calls: "dense")


def make(**options) -> tuple[nn.Module, nn.Module]:
    """A sparsified model, and a dense copy with the same weights."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(4 * 49, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    twin = copy.deepcopy(net)
    model = sparsefx.sparsify(net, 0.3, **options)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("weight_mask")})
    return model, twin


def ran_dense(model: nn.Module) -> list[str]:
    """Names of the layers that the model's graph runs as torch's."""
    return [str(node.args[0].target) for node in model.graph.nodes if node.target is run_dense]


@pytest.mark.usefixtures("dense_graph")
@pytest.mark.parametrize("collecting", [False, True])
def test_outputs_and_gradients_are_the_masked_ones_of_a_dense_model(collecting):
    model, twin = make()
    x = torch.randn(4, 3, 6, 6)
    for layer in model.scheduler.layers.values():
        layer.collect_(collecting)
    out, expected = model(x), twin(x)
    assert ran_dense(model) == ["0", "3", "5", "7"]
    assert torch.equal(out, expected)
    F.cross_entropy(out, torch.arange(4)).backward()
    F.cross_entropy(expected, torch.arange(4)).backward()
    for name, layer in model.scheduler.layers.items():
        whole = twin.get_parameter(name).grad
        assert whole is not None
        torch.testing.assert_close(layer.weight.grad, whole * layer.weight_mask, msg=name)
        missing = ~layer.weight_mask
        assert not layer.weight.grad[missing].any()
        if collecting:
            torch.testing.assert_close(layer.runtime.collected[missing], whole[missing], msg=name)


@pytest.mark.usefixtures("dense_graph")
def test_gradients_of_gradients_are_those_of_a_dense_model():
    model, twin = make()
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    model(x.detach())
    for net in (model, twin):
        (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert ran_dense(model) == ["0", "3", "5", "7"]
    for name, layer in model.scheduler.layers.items():
        whole = twin.get_parameter(name).grad
        assert whole is not None
        torch.testing.assert_close(layer.weight.grad, whole * layer.weight_mask, msg=name)


@pytest.mark.usefixtures("dense_graph")
def test_only_large_linear_layers_mask_their_gradients_as_they_write_them(monkeypatch):
    masked: list[torch.Size] = []
    real = ops.dense_linear
    monkeypatch.setattr(ops, "dense_linear", lambda *args: masked.append(args[1].shape) or real(*args))
    model, _ = make()
    x = torch.randn(4, 3, 6, 6)
    model(x)
    masked.clear()
    model(x)
    assert masked == [(100, 196)]
    with torch.no_grad():
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert len(masked) == 1


@pytest.mark.usefixtures("dense_graph")
def test_the_summary_and_the_history_say_dense():
    model, _ = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    model.scheduler.attach(optimizer, steps_per_update=2, total_steps=10)
    for _ in range(2):
        model(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    rows = [row for row in sparsefx.summary(model).rows if row.status == "sparse"]
    assert len(rows) == 4
    assert all(set(row.backends.values()) == {"dense"} for row in rows)
    history = model.scheduler.history[-1]["layers"].values()
    assert all(set(row["backends"].values()) == {"dense"} for row in history)


@pytest.mark.usefixtures("dense_graph")
def test_gradients_are_masked_where_no_hook_would_do_it():
    model, twin = make()
    x = torch.randn(4, 3, 6, 6)
    model(x)
    others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, others, (x,))
    torch.testing.assert_close(out, twin(x))
    grads = torch.autograd.grad(out.square().sum(), list(others.values()))
    masks = sparsefx.masks(model)
    for name, grad in zip(others, grads, strict=True):
        assert name not in masks or not grad[~masks[name]].any(), name


@pytest.mark.usefixtures("dense_graph")
def test_a_hook_on_a_layer_is_called():
    model, _ = make()
    x = torch.randn(4, 3, 6, 6)
    model(x)
    seen = []
    model[5].register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert seen == [1]
    assert "5" not in ran_dense(model)
    assert model.scheduler.specializer.graph == "layers", "a graph that no longer holds is not what ran"


@pytest.mark.usefixtures("graph_measured")
def test_a_model_whose_layers_are_slow_runs_dense(monkeypatch):
    plain = sparsefx.layers.SparseLinear.forward

    def slow(self, x):
        time.sleep(0.002)
        return plain(self, x)

    monkeypatch.setattr(sparsefx.layers.SparseLinear, "forward", slow)
    model, _ = make()
    x = torch.randn(4, 3, 6, 6)
    model(x)
    assert ran_dense(model)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        model(x)
        best = min(best, time.perf_counter() - start)
    assert best < 0.004, "two layers of 2 ms each were not left out"


def test_a_wrong_graph_is_dropped_alone(monkeypatch):
    offered: list[list[str]] = []

    def choose(self: Specializer, key: tuple, calls: dict) -> str:
        offered.append(sorted(calls))
        return "regions"

    monkeypatch.setattr(Specializer, "choose_graph", choose)
    monkeypatch.setattr("sparsefx.graph.dense.run_dense", lambda layer, x: run_dense(layer, x) * 2)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    model = sparsefx.sparsify(net, 0.3)
    with pytest.warns(TraceWarning, match="'dense'"):
        model(torch.randn(4, 3, 6, 6))
    model(torch.randn(5, 3, 6, 6))
    assert offered == [["layers", "regions"]] * 2
    assert "2 convolutions run in regions" in str(sparsefx.summary(model))
