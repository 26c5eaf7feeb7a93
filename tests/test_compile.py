"""torch.compile: one compilation, whatever masks and windows do (contract 8)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparsefx

pytestmark = pytest.mark.usefixtures("either_graph")


def make():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 9, 10),
    )
    return sparsefx.sparsify(model, 0.3, example_inputs=torch.randn(4, 3, 8, 8))


def train(model, call, steps: int) -> list[float]:
    """Train by `call`, which runs `model`; an update every 4 steps with a window of 2."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.1)
    model.scheduler.attach(optimizer, steps_per_update=4, total_steps=100)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        loss = F.cross_entropy(call(x), torch.arange(4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_masks_and_windows_compile_once_and_train_the_same():
    model, eager = make(), make()
    counter = CompileCounterWithBackend("inductor")
    losses = train(model, torch.compile(model, backend=counter, fullgraph=True), 14)
    assert len(model.scheduler.history) == 3
    assert model.scheduler.window.length == 2
    assert counter.frame_count == 1
    expected = train(eager, eager, 14)
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, mask in sparsefx.masks(model).items():
        assert torch.equal(mask, sparsefx.masks(eager)[name])


def test_eval_compiles_once_and_follows_the_masks():
    model = make().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        model[3].set_mask_(torch.rand_like(model[3].weight) < 0.1)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_double_backward_through_a_compiled_layer_names_it():
    model = make()
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    out = torch.ops.sparsefx.linear(
        model[6].weight.new_ones(2, 144).requires_grad_(), model[6].weight, None, model[6].weight_mask, model[6].handle
    )
    (grad,) = torch.autograd.grad(out.square().sum(), model[6].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="6: expected one backward"):
        grad.sum().backward()
    assert x.grad is None


def test_a_freed_layer_is_an_error():
    model = make()
    args = (torch.randn(1, 144), model[6].weight.detach().clone(), None, model[6].weight_mask.clone(), model[6].handle)
    copy.deepcopy(model)
    torch.ops.sparsefx.linear(*args)
    with pytest.raises(RuntimeError, match="expected a live layer"):
        torch.ops.sparsefx.linear(*args[:-1], 10**9)


def test_many_models_of_a_process_all_compile(either_graph):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for count in range(1, torch._dynamo.config.recompile_limit + 3):
        model = make()
        torch.compile(model, fullgraph=True, backend=counter)(torch.randn(4, 3, 8, 8))
        assert counter.frame_count == count
